//! What the next step computes: continuous batching over one block pool.
//!
//! A step has a budget of tokens. Sequences that generate go first, one token each, so that a long prompt never stalls
//! a running answer; what is left of the budget goes to prompts, in chunks. A request is admitted when the pool has room
//! for its prompt. When pages run out in the middle of an answer, the youngest sequence gives its pages up and goes back
//! to the head of the queue with its tokens; its keys and values are computed again later, and its answer goes on where
//! it was. A prompt whose beginning the pool still holds, from another request or an earlier turn, starts after it; one
//! whose beginning is being computed for another waits for that. Everything here is plain bookkeeping: no clock, no thread, no randomness, so the tests drive it by hand.

use std::collections::VecDeque;

use super::limits::Limits;
use super::pool::BlockPool;
use super::request::{Event, Request};
use super::sequence::{Outcome, Sequence};
use super::step::Batch;
use crate::Error;

/// What the scheduler did so far; the numbers only rise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests whose first token was generated.
    pub started: u64,
    /// Requests that ended with an answer.
    pub finished: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests whose caller left.
    pub cancelled: u64,
    /// Times that a sequence had to give up its pages.
    pub preempted: u64,
    /// Tokens of prompts computed, again after a preemption included.
    pub prefilled_tokens: u64,
    /// Tokens that were in the pool already.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
}

/// The queue, the running sequences and the pool.
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    waiting: VecDeque<Sequence>,
    /// In the order of admission: the last is the youngest.
    running: Vec<Sequence>,
    /// The batch that is being computed: (index in `running`, tokens, whether logits are wanted).
    planned: Vec<(usize, usize, bool)>,
    counters: Counters,
}

impl Scheduler {
    /// An idle scheduler.
    pub fn new(limits: Limits) -> Self {
        let pool = BlockPool::new(limits.pages, limits.block_tokens);
        Self {
            limits,
            pool,
            waiting: VecDeque::new(),
            running: Vec::new(),
            planned: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Queues a request; one that breaks the limits fails at once.
    pub fn add(&mut self, request: Request) {
        let urgent = request.urgent;
        if let Err(error) = self.limits.check(&request.prompt, &request.sampling) {
            self.counters.failed += 1;
            let mut sink = request.sink;
            sink.send(Event::Failed(error));
            return;
        }
        let sequence = Sequence::new(request, &self.limits);
        if urgent {
            self.waiting.push_front(sequence);
        } else {
            self.waiting.push_back(sequence);
        }
    }

    /// Whether there is nothing to do.
    pub fn idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Number of waiting requests.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
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

    /// Whether a waiting or running request uses the adapter.
    pub fn uses(&self, adapter: i32) -> bool {
        self.waiting.iter().chain(&self.running).any(|sequence| sequence.adapter == adapter)
    }

    /// Drops the requests whose callers have left, and frees their pages.
    pub fn drop_cancelled(&mut self) {
        let before = self.waiting.len() + self.running.len();
        self.waiting.retain(|sequence| !sequence.sink.closed());
        let pool = &mut self.pool;
        self.running.retain_mut(|sequence| {
            let stays = !sequence.sink.closed();
            if !stays {
                sequence.release(pool);
            }
            stays
        });
        self.counters.cancelled += (before - self.waiting.len() - self.running.len()) as u64;
    }

    /// The next batch, or none when there is nothing to compute.
    pub fn plan(&mut self) -> Option<Batch> {
        self.planned.clear();
        let mut budget = self.limits.batch_tokens;
        // Sequences that generate.
        let mut index = 0;
        while index < self.running.len() && budget > 0 {
            if self.running[index].left() == 1 && self.reserve(index) {
                self.planned.push((index, 1, true));
                budget -= 1;
            }
            index += 1;
        }
        // Prompts under way; their pages were reserved when they were admitted.
        for (index, sequence) in self.running.iter().enumerate() {
            let left = sequence.left();
            let count = left.min(budget);
            if left > 1 && count > 0 {
                self.planned.push((index, count, count == left));
                budget -= count;
            }
        }
        // New ones, in order: nobody overtakes a request that waits for room.
        while budget > 0 && self.running.len() < self.limits.sequences {
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            if self.coming(&mut sequence) || !self.admit(&mut sequence) {
                self.waiting.push_front(sequence);
                break;
            }
            let left = sequence.left();
            let chunk = left.min(budget);
            self.planned.push((self.running.len(), chunk, chunk == left));
            budget -= chunk;
            self.counters.cached_tokens += sequence.computed as u64;
            self.running.push(sequence);
        }
        self.planned.sort_unstable();
        (!self.planned.is_empty()).then(|| self.batch())
    }

    /// Whether a running sequence is computing the page that this one needs next.
    fn coming(&mut self, sequence: &mut Sequence) -> bool {
        let Some(next) = sequence.missing(&self.pool) else { return false };
        self.running.iter_mut().any(|other| other.left() > 1 && other.computes(&next, &self.pool))
    }

    /// Takes the pages that a new sequence needs to begin, if they are there.
    fn admit(&mut self, sequence: &mut Sequence) -> bool {
        sequence.adopt(&mut self.pool);
        let missing = self.pool.pages_for(sequence.tokens.len()) - sequence.table.pages().len();
        // A page is left for each running answer, so that admission doesn't cause a preemption at once.
        let room = missing + self.running.len() <= self.pool.free() || self.running.is_empty();
        if room && sequence.table.reserve(&mut self.pool, sequence.tokens.len()) {
            return true;
        }
        sequence.release(&mut self.pool);
        false
    }

    /// Makes room for all tokens of a running sequence, if need be by preempting the youngest; `false` when that is itself.
    fn reserve(&mut self, index: usize) -> bool {
        loop {
            let sequence = &mut self.running[index];
            if sequence.table.reserve(&mut self.pool, sequence.tokens.len()) {
                return true;
            }
            // `index` is in bounds, so there is a last one, and it comes no earlier than `index`: not planned yet.
            let Some(mut youngest) = self.running.pop() else { return false };
            youngest.release(&mut self.pool);
            self.counters.preempted += 1;
            self.waiting.push_front(youngest);
            if self.running.len() == index {
                return false;
            }
        }
    }

    fn batch(&self) -> Batch {
        let mut batch = Batch { cu_seqlens: vec![0], ..Batch::default() };
        // Pages that a sequence needs for what it has and gets now.
        let pages =
            |&(index, count, _): &(usize, usize, bool)| self.pool.pages_for(self.running[index].computed + count);
        batch.blocks = self.planned.iter().map(pages).max().unwrap_or(0);
        for planned @ &(index, count, wanted) in &self.planned {
            let sequence = &self.running[index];
            for position in sequence.computed..sequence.computed + count {
                batch.tokens.push(sequence.tokens[position] as i32);
                batch.positions.push(position as i32);
            }
            batch.cu_seqlens.push(batch.tokens.len() as i32);
            batch.adapter.push(sequence.adapter);
            let row = batch.block_table.len();
            batch.block_table.extend(sequence.table.pages()[..pages(planned)].iter().map(|&page| page as i32));
            batch.block_table.resize(row + batch.blocks, 0);
            if wanted {
                batch.rows.push(batch.tokens.len() as i32 - 1);
            }
        }
        batch
    }

    /// Takes the logits of the planned batch: chooses tokens, sends events, retires what ended.
    pub fn apply(&mut self, logits: &[f32]) {
        let wanted = self.planned.iter().filter(|planned| planned.2).count();
        if logits.len() != wanted * self.limits.vocabulary {
            let expected = wanted * self.limits.vocabulary;
            let message = format!("the step: expected {wanted} rows, {expected} logits, got {} logits", logits.len());
            return self.fail(&Error::failure(message));
        }
        let mut rows = logits.chunks_exact(self.limits.vocabulary);
        for (index, count, wanted) in std::mem::take(&mut self.planned) {
            let sequence = &mut self.running[index];
            sequence.computed += count;
            if sequence.computed <= sequence.prompt || count > 1 {
                self.counters.prefilled_tokens += count as u64;
            }
            sequence.learn(&mut self.pool);
            if let (true, Some(row)) = (wanted, rows.next()) {
                let before = sequence.tokens.len();
                sequence.advance(row, &self.limits.end_ids);
                self.counters.generated_tokens += (sequence.tokens.len() - before) as u64;
                if sequence.tokens.len() == sequence.prompt + 1 {
                    self.counters.started += 1;
                }
            }
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
        for sequence in self.waiting.drain(..).chain(self.running.drain(..)) {
            let mut sequence = sequence;
            sequence.fail(error.clone());
            sequence.release(&mut self.pool);
            self.counters.failed += 1;
        }
    }

    fn retire(&mut self) {
        let (pool, counters) = (&mut self.pool, &mut self.counters);
        self.running.retain_mut(|sequence| {
            let Some(outcome) = sequence.ended else { return true };
            sequence.release(pool);
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
