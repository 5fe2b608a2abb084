//! Who begins in the step that is planned, and who has to give way.

use std::collections::HashSet;

use super::super::admission::{Load, peak};
use super::super::limits::Limits;
use super::super::pool::BlockPool;
use super::super::residency::Residency;
use super::super::sequence::Sequence;
use super::Scheduler;
use crate::{Error, Result};

impl Scheduler {
    /// Plans the first tokens of waiting sequences, at most so many; how many more there may be. Who cannot begin is
    /// passed, but nobody overtakes a request that waits for room.
    pub(super) fn begin(&mut self, mut budget: usize) -> usize {
        self.residency.sync(&mut self.pool);
        let residency = &self.residency;
        self.queue.again(|adapter| !residency.ready(adapter));
        while budget > 0 && self.running.len() < self.limits.sequences {
            let Some(next) = self.queue.next() else { break };
            if self.absent(next) || self.coming(next) {
                continue;
            }
            let sequence = match self.admit(next) {
                Ok(Some(sequence)) => sequence,
                Ok(None) => break,
                Err(error) => {
                    self.refuse(next, error);
                    continue;
                }
            };
            if !sequence.embeds() {
                let left = sequence.left();
                let chunk = left.min(budget);
                self.planned.push((self.running.len(), chunk, usize::from(chunk == left)));
                budget -= chunk;
            }
            self.running.push(sequence);
        }
        budget
    }

    /// Whether a waiting sequence's adapter is not there any more; that one is then passed.
    fn absent(&mut self, waiting: usize) -> bool {
        self.residency.sync(&mut self.pool);
        let Some(sequence) = self.queue.get(waiting) else { return false };
        sequence.passed = !self.residency.ready(sequence.adapter);
        sequence.missed |= sequence.passed;
        sequence.passed
    }

    /// Whether a running sequence is computing the page that a waiting one needs next; that one is then passed.
    fn coming(&mut self, waiting: usize) -> bool {
        let Some(sequence) = self.queue.get(waiting) else { return false };
        sequence.passed = sequence
            .missing(&self.pool)
            .is_some_and(|next| self.running.iter().any(|other| other.left() > 1 && other.computes(&next, &self.pool)));
        sequence.passed
    }

    /// Takes a waiting sequence out and gives it the pages that it needs to begin, if it can stay until its end.
    ///
    /// # Errors
    /// It would not have room even alone.
    fn admit(&mut self, waiting: usize) -> Result<Option<Sequence>> {
        let Some(sequence) = self.queue.get(waiting) else { return Ok(None) };
        let own = self.residency.pages(sequence.adapter, &self.pool);
        let most = self.pool.pages().saturating_sub(own);
        // Even alone it would have no more, and nobody is to wait for what can't be.
        let longest = most * self.pool.block_tokens();
        if sequence.tokens.len() >= longest {
            return Err(Residency::too_large(own, &self.pool));
        }
        sequence.longest = sequence.longest.min(longest);
        let room = most.saturating_sub(self.residency.held_beside(sequence.adapter));
        sequence.adopt(&mut self.pool);
        let fits = self.running.is_empty() || need(&self.limits, &self.pool, &self.running, sequence) <= room;
        let (tokens, adapter) = (sequence.tokens.len(), sequence.adapter);
        if !fits || !self.residency.enter(adapter, &mut self.pool) {
            sequence.release(&mut self.pool);
            return Ok(None);
        }
        if !sequence.table.reserve(&mut self.pool, tokens) {
            sequence.release(&mut self.pool);
            self.residency.leave(adapter, &mut self.pool);
            return Ok(None);
        }
        if sequence.fresh() {
            if !sequence.first {
                self.begun.push((sequence.flow.priority, sequence.came));
            }
            self.counters.cache_hits += u64::from(sequence.computed > 0);
            if self.residency.knows(adapter) {
                self.counters.adapter_misses += u64::from(sequence.missed);
                self.counters.adapter_hits += u64::from(!sequence.missed);
            }
        }
        sequence.admitted();
        Ok(self.queue.take(waiting).map(|mut sequence| {
            sequence.first = false;
            self.counters.cached_tokens += sequence.computed as u64;
            self.queue.charge(sequence.flow, sequence.left(), 0);
            sequence
        }))
    }

    /// Ends a waiting sequence with an error.
    fn refuse(&mut self, waiting: usize, error: Error) {
        if let Some(mut sequence) = self.queue.take(waiting) {
            self.queue.leave(sequence.flow);
            self.counters.failed += 1;
            sequence.fail(error);
        }
    }

    /// Makes room for all tokens of a running sequence, if need be by preempting the youngest; `false` when that is itself.
    pub(super) fn reserve(&mut self, index: usize) -> bool {
        loop {
            let sequence = &mut self.running[index];
            if sequence.table.reserve(&mut self.pool, sequence.tokens.len()) {
                return true;
            }
            // `index` is in bounds, so there is a last one, and it comes no earlier than `index`: not planned yet.
            let Some(mut youngest) = self.running.pop() else { return false };
            youngest.release(&mut self.pool);
            self.residency.leave(youngest.adapter, &mut self.pool);
            self.counters.preempted += 1;
            self.queue.resume(youngest);
            if self.running.len() == index {
                return false;
            }
        }
    }
}

/// Pages that the running sequences and one more need at most, all together, until they have ended.
fn need(limits: &Limits, pool: &BlockPool, running: &[Sequence], next: &Sequence) -> usize {
    // Tokens of a step that prompts get whatever else runs.
    let least = limits.batch_tokens - limits.sequences.min(limits.batch_tokens) + 1;
    let (mut before, mut shared) = (0, HashSet::<u32>::new());
    let mut load = |sequence: &Sequence| -> Load {
        let pages = sequence.table.pages().iter();
        shared.extend(pages.filter(|&&page| pool.holders(page) > 1));
        // One that generates starts now. Prompts go one after the other, the first of them now.
        let left = sequence.left();
        before += if left > 1 { left } else { 0 };
        sequence.load(if left > 1 { before.div_ceil(least) - 1 } else { 0 }, 1 + limits.draft_tokens, pool)
    };
    let loads: Vec<Load> = running.iter().chain([next]).map(&mut load).collect();
    peak(&loads, shared.len(), pool.block_tokens())
}
