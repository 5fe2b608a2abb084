//! What the next step computes: continuous batching over one block pool.
//!
//! A step has a budget of tokens. Sequences that generate go first, one token each, so that a long prompt never stalls
//! a running answer; what is left of the budget goes to prompts, in chunks. Whose turn it is to begin is the [`Queue`]'s
//! to say; it begins when the pool has room for it until the end, beside those that run ([`super::admission`]). Only an answer
//! that no bound was given for may come to need more than was expected: when pages run out, the youngest sequence gives
//! its pages up and goes back to the head of the queue with its tokens; its keys and values are computed again later, and
//! its answer goes on where it was. A prompt whose beginning the pool still holds, from another request or an earlier
//! turn, starts after it; one whose beginning is being computed for another lets others pass until that is done. Texts to
//! embed are such requests, too, with chunks in steps of their own, in turn with the others.
//! Everything here is plain bookkeeping: no clock, no thread, no randomness, so the tests drive it by hand.

mod begin;
mod counters;
mod draft;

use std::time::{Duration, Instant};

pub use self::counters::Counters;
use super::limits::Limits;
use super::pool::BlockPool;
use super::queue::Queue;
use super::request::{Event, Request};
use super::residency::{Fetched, Moves, Residency};
use super::sequence::{Outcome, Sequence};
use super::step::Batch;
use crate::{Error, Result};

/// The queue, the running sequences and the pool.
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    residency: Residency,
    queue: Queue,
    /// In the order of admission: the last is the youngest.
    running: Vec<Sequence>,
    /// The batch that is being computed: (index in `running`, tokens, of how many of the last logits are wanted).
    planned: Vec<(usize, usize, usize)>,
    /// Whether it is one of texts to embed.
    embeds: bool,
    counters: Counters,
    /// Seconds that a token took in the last steps.
    pace: f64,
    /// Requests that began since the last look: their priority, and when they came.
    begun: Vec<(i8, Instant)>,
}

impl Scheduler {
    /// An idle scheduler.
    pub fn new(limits: Limits) -> Self {
        let pool = BlockPool::new(limits.pages, limits.block_tokens);
        Self {
            limits,
            pool,
            residency: Residency::default(),
            queue: Queue::default(),
            running: Vec::new(),
            planned: Vec::new(),
            embeds: false,
            counters: Counters::default(),
            pace: 0.0,
            begun: Vec::new(),
        }
    }

    /// Queues a request; one that breaks the limits fails at once.
    pub fn add(&mut self, request: Request) {
        if let Err(error) = self.limits.check(&request.prompt, &request.sampling) {
            self.counters.failed += 1;
            let mut sink = request.sink;
            sink.send(Event::Failed(error));
            return;
        }
        if self.residency.gone(request.adapter) {
            self.counters.failed += 1;
            let mut sink = request.sink;
            sink.send(Event::Failed(Error::input("model: expected one that is there, got one just removed")));
            return;
        }
        let root = request.root.or_else(|| self.residency.root(request.adapter));
        self.queue.add(Sequence::new(Request { root, ..request }, &self.limits));
    }

    /// Whether there is nothing to do.
    pub fn idle(&self) -> bool {
        self.queue.len() == 0 && self.running.is_empty()
    }

    /// Number of waiting requests.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Number of running sequences.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// The pool's books.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// What was done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Adapters in the pool, used or not, and their pages.
    pub fn resident(&self) -> (usize, usize) {
        self.residency.resident(&self.pool)
    }

    /// Requests that began since the last call: their priority, and when they came.
    pub fn begun(&mut self) -> Vec<(i8, Instant)> {
        std::mem::take(&mut self.begun)
    }

    /// The priorities of the requests that wait.
    pub fn priorities(&self) -> impl Iterator<Item = i8> {
        self.queue.iter().map(|sequence| sequence.flow.priority)
    }

    /// The adapters that live in the pool.
    pub fn residency(&mut self) -> &mut Residency {
        &mut self.residency
    }

    /// What the model has to do before the next step.
    pub fn moves(&mut self) -> Moves {
        let moves = self.residency.moves(&mut self.pool);
        self.counters.adapter_evictions += moves.pushed_out;
        moves
    }

    /// An adapter was read from disk, or could not be: then those who wait for it fail.
    pub fn fetched(&mut self, adapter: i32, outcome: Result<Fetched>) {
        self.residency.fetched(adapter, &outcome);
        match outcome {
            Ok(fetched) => self.queue.rooted(adapter, fetched.root, self.limits.block_tokens),
            Err(error) => {
                for mut sequence in self.queue.remove(|sequence| sequence.adapter == adapter) {
                    sequence.fail(error.clone());
                    self.counters.failed += 1;
                }
            }
        }
    }

    /// The weights of an adapter could not be written to its pages: the planned batch fails.
    pub fn lost(&mut self, adapter: i32, error: &Error) {
        self.fail(error);
        for sequence in self.running.iter_mut().filter(|sequence| sequence.adapter == adapter) {
            sequence.fail(error.clone());
        }
        self.retire();
        self.residency.lost(adapter, &mut self.pool);
    }

    /// Whether a waiting or running request uses the adapter.
    pub fn uses(&self, adapter: i32) -> bool {
        self.queue.iter().chain(&self.running).any(|sequence| sequence.adapter == adapter)
    }

    /// Drops the requests whose callers have left, and frees their pages.
    pub fn drop_cancelled(&mut self) {
        self.counters.cancelled += self.queue.remove(|sequence| sequence.sink.closed()).len() as u64;
        for sequence in self.running.iter_mut().filter(|sequence| sequence.sink.closed()) {
            sequence.ended = Some(Outcome::Cancelled);
        }
        self.retire();
    }

    /// Fails the requests whose first token cannot come in time any more, before more is spent on them.
    pub fn drop_late(&mut self, now: Instant) {
        let (pool, pace) = (&self.pool, self.pace);
        let late = |sequence: &Sequence| {
            let needed = Duration::try_from_secs_f64(pace * sequence.cost(pool) as f64).unwrap_or_default();
            sequence.silent() && sequence.deadline.is_some_and(|deadline| now + needed > deadline)
        };
        let error = Error::busy("the first token is due before it can be there").hint("try again later");
        for mut sequence in self.queue.remove(late) {
            sequence.fail(error.clone());
            self.counters.failed += 1;
            self.counters.late += 1;
        }
        for sequence in self.running.iter_mut().filter(|sequence| late(sequence)) {
            sequence.fail(error.clone());
            self.counters.late += 1;
        }
        self.retire();
    }

    /// A step of so many tokens took so long.
    pub fn took(&mut self, tokens: usize, time: Duration) {
        let pace = time.as_secs_f64() / tokens.max(1) as f64;
        // the first says all that is known, later ones a third
        self.pace = if self.pace == 0.0 { pace } else { 0.7 * self.pace + 0.3 * pace };
    }

    /// The next batch, or none when there is nothing to compute.
    pub fn plan(&mut self) -> Option<Batch> {
        self.planned.clear();
        self.running.iter_mut().for_each(Sequence::undraft);
        let wanted: Vec<i32> = self.queue.iter().map(|sequence| sequence.adapter).collect();
        self.residency.wish(&wanted);
        if self.residency.doomed() {
            self.residency.bury(&mut self.pool, |adapter| wanted.contains(&adapter));
        }
        // In turn; and at once where there is nothing else to do, for one that has just begun, too.
        if !self.embeds {
            self.embed();
        }
        if self.planned.is_empty() {
            self.answer();
        }
        if self.planned.is_empty() {
            self.embed();
        }
        // Rows under one adapter side by side, so that its matrices are read once.
        let running = &self.running;
        self.planned.sort_unstable_by_key(|&(index, _, _)| (running[index].adapter, index));
        (!self.planned.is_empty()).then(|| self.batch())
    }

    /// Plans a batch of answers and prompts.
    fn answer(&mut self) {
        self.embeds = false;
        let mut budget = self.limits.batch_tokens;
        // Sequences that generate.
        let mut index = 0;
        while index < self.running.len() && budget > 0 {
            if self.running[index].generates() && self.reserve(index) {
                self.planned.push((index, 1, 1));
                budget -= 1;
            }
            index += 1;
        }
        budget = self.prompts(budget, false);
        budget = self.begin(budget);
        self.draft(budget);
    }

    /// Plans a batch of texts to embed, if there are any.
    fn embed(&mut self) {
        self.prompts(self.limits.batch_tokens, true);
        self.embeds = !self.planned.is_empty();
    }

    /// Plans tokens of prompts under way, at most so many; how many more there may be. Their pages were reserved when
    /// they were admitted.
    fn prompts(&mut self, mut budget: usize, embeds: bool) -> usize {
        for (index, sequence) in self.running.iter().enumerate() {
            let left = sequence.left();
            let count = left.min(budget);
            if sequence.embeds() == embeds && !sequence.generates() && count > 0 {
                self.planned.push((index, count, usize::from(count == left && !embeds)));
                budget -= count;
            }
        }
        budget
    }

    /// The batch that is planned, with the drafts that there are.
    pub fn batch(&self) -> Batch {
        let mut batch = Batch { cu_seqlens: vec![0], embeds: self.embeds, ..Batch::default() };
        // Pages that a sequence needs for what it has and gets now.
        let pages =
            |&(index, count, _): &(usize, usize, usize)| self.pool.pages_for(self.running[index].computed + count);
        batch.blocks = self.planned.iter().map(pages).max().unwrap_or(0);
        for planned @ &(index, count, wanted) in &self.planned {
            let sequence = &self.running[index];
            for position in sequence.computed..sequence.computed + count {
                let known = sequence.tokens.get(position);
                let token = known.unwrap_or_else(|| &sequence.draft[position - sequence.tokens.len()]);
                batch.tokens.push(*token as i32);
                batch.positions.push(position as i32);
            }
            batch.cu_seqlens.push(batch.tokens.len() as i32);
            batch.adapter.push(sequence.adapter);
            let row = batch.block_table.len();
            batch.block_table.extend(sequence.table.pages()[..pages(planned)].iter().map(|&page| page as i32));
            batch.block_table.resize(row + batch.blocks, 0);
            let end = batch.tokens.len();
            batch.rows.extend((end - wanted..end).map(|row| row as i32));
        }
        batch
    }

    /// Takes the logits of the planned batch, or its hidden states: chooses tokens, sends events, retires what ended.
    pub fn apply(&mut self, logits: &[f32]) {
        if self.embeds {
            return self.pooled(logits);
        }
        let wanted: usize = self.planned.iter().map(|planned| planned.2).sum();
        if logits.len() != wanted * self.limits.vocabulary {
            let expected = wanted * self.limits.vocabulary;
            let message = format!("the step: expected {wanted} rows, {expected} logits, got {} logits", logits.len());
            return self.fail(&Error::failure(message));
        }
        let mut rows = logits.chunks_exact(self.limits.vocabulary);
        for (index, count, wanted) in std::mem::take(&mut self.planned) {
            let sequence = &mut self.running[index];
            let drafted = sequence.draft.len();
            let known = count - drafted;
            sequence.computed += known;
            if sequence.computed <= sequence.prompt || known > 1 {
                self.counters.prefilled_tokens += known as u64;
            }
            if wanted > 0 {
                let before = sequence.tokens.len();
                let right = sequence.follow(&rows.by_ref().take(wanted).collect::<Vec<_>>(), &self.limits.end_ids);
                // what follows a wrong token was computed in vain, and is overwritten
                sequence.computed += right;
                self.counters.drafted_tokens += drafted as u64;
                self.counters.accepted_tokens += right as u64;
                let generated = sequence.tokens.len() - before;
                self.counters.generated_tokens += generated as u64;
                self.queue.charge(sequence.flow, 0, generated);
                if before == sequence.prompt && sequence.tokens.len() > before {
                    self.counters.started += 1;
                }
            }
            sequence.learn(&mut self.pool);
        }
        self.retire();
    }

    /// Takes the hidden states of the planned batch, `[tokens, hidden]`.
    fn pooled(&mut self, hidden: &[f32]) {
        let tokens: usize = self.planned.iter().map(|planned| planned.1).sum();
        let width = hidden.len() / tokens.max(1);
        if width == 0 || hidden.len() != tokens * width {
            let message =
                format!("the step: expected the hidden states of {tokens} tokens, got {} numbers", hidden.len());
            return self.fail(&Error::failure(message));
        }
        let mut rows = hidden.chunks_exact(width);
        for (index, count, _) in std::mem::take(&mut self.planned) {
            self.running[index].pool(rows.by_ref().take(count));
            self.counters.prefilled_tokens += count as u64;
        }
        self.retire();
    }

    /// The planned batch failed: so do its requests. The others go on.
    pub fn fail(&mut self, error: &Error) {
        for (index, _, _) in std::mem::take(&mut self.planned) {
            self.running[index].fail(error.clone());
        }
        self.retire();
    }

    /// Ends every request with an error.
    pub fn fail_all(&mut self, error: &Error) {
        self.planned.clear();
        for mut sequence in self.queue.remove(|_| true) {
            sequence.fail(error.clone());
            self.counters.failed += 1;
        }
        self.running.iter_mut().for_each(|sequence| sequence.fail(error.clone()));
        self.retire();
    }

    fn retire(&mut self) {
        let (pool, counters, queue) = (&mut self.pool, &mut self.counters, &mut self.queue);
        let residency = &mut self.residency;
        self.running.retain_mut(|sequence| {
            let Some(outcome) = sequence.ended else { return true };
            sequence.release(pool);
            residency.leave(sequence.adapter, pool);
            queue.leave(sequence.flow);
            match outcome {
                Outcome::Finished => counters.finished += 1,
                Outcome::Failed => counters.failed += 1,
                Outcome::Cancelled => counters.cancelled += 1,
            }
            false
        });
    }
}

#[cfg(test)]
mod tests;
