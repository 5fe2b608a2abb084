//! Requests that wait, and whose turn it is.

use std::collections::VecDeque;

use super::fairness::{Fairness, Flow};
use super::prefix::Key;
use super::sequence::Sequence;

/// The waiting requests, in the order of their arrival.
#[derive(Default)]
pub(super) struct Queue {
    waiting: VecDeque<Sequence>,
    fairness: Fairness,
}

impl Queue {
    /// A new request; an urgent one before all others.
    pub fn add(&mut self, sequence: Sequence) {
        self.fairness.enter(sequence.flow);
        if sequence.first {
            self.waiting.push_front(sequence);
        } else {
            self.waiting.push_back(sequence);
        }
    }

    /// A sequence that had to give its pages up: it goes on before others begin.
    pub fn resume(&mut self, mut sequence: Sequence) {
        sequence.first = true;
        self.waiting.push_front(sequence);
    }

    /// Makes all that were passed candidates again, but those whose adapter is absent.
    pub fn again(&mut self, absent: impl Fn(i32) -> bool) {
        for sequence in &mut self.waiting {
            sequence.passed = absent(sequence.adapter);
            sequence.missed |= sequence.passed;
        }
    }

    /// The number of the one whose turn it is, of those that were not passed.
    pub fn next(&self) -> Option<usize> {
        let candidates = self.waiting.iter().enumerate().filter(|(_, sequence)| !sequence.passed);
        // the first of equals, which is the one that waits longest
        let next = candidates
            .min_by_key(|(_, sequence)| (!sequence.first, self.fairness.order(sequence.flow, sequence.prompt)));
        next.map(|(index, _)| index)
    }

    /// One of them.
    pub fn get(&mut self, index: usize) -> Option<&mut Sequence> {
        self.waiting.get_mut(index)
    }

    /// Takes one out to run it.
    pub fn take(&mut self, index: usize) -> Option<Sequence> {
        self.waiting.remove(index)
    }

    /// Takes those out that satisfy a condition; they have ended.
    pub fn remove(&mut self, mut gone: impl FnMut(&Sequence) -> bool) -> Vec<Sequence> {
        let (removed, kept) = self.waiting.drain(..).partition(|sequence| gone(sequence));
        self.waiting = kept;
        let removed: VecDeque<Sequence> = removed;
        removed.iter().for_each(|sequence| self.fairness.leave(sequence.flow));
        removed.into()
    }

    /// It is known where the keys under the adapter begin.
    pub fn rooted(&mut self, adapter: i32, root: Key, block_tokens: usize) {
        let waiting = self.waiting.iter_mut().filter(|sequence| sequence.adapter == adapter);
        waiting.for_each(|sequence| sequence.rooted(root, block_tokens));
    }

    /// A flow was served.
    pub fn charge(&mut self, flow: Flow, prompt: usize, generated: usize) {
        self.fairness.charge(flow, prompt, generated);
    }

    /// A running sequence of the flow has ended.
    pub fn leave(&mut self, flow: Flow) {
        self.fairness.leave(flow);
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.waiting.iter()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }
}
