//! What the next step computes: continuous batching over one block pool.
//!
//! A step has a budget of tokens. Sequences that generate go first, one token each, so that a long prompt never stalls
//! a running answer; what is left of the budget goes to prompts, in chunks. A request is admitted when the pool has room
//! for its prompt. When pages run out in the middle of an answer, the youngest sequence gives its pages up and goes back
//! to the head of the queue with its tokens; its keys and values are computed again later, and its answer goes on where
//! it was. Everything here is plain bookkeeping: no clock, no thread, no randomness, so the tests drive it by hand.

use std::collections::VecDeque;

use super::answer::Answer;
use super::pool::{BlockPool, BlockTable};
use super::request::{Delta, Event, FinishReason, Request, Sink, Token, Usage};
use super::sampler::Sampler;
use super::step::Batch;
use crate::{Error, Result};

/// The engine's bounds.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most tokens a step computes.
    pub batch_tokens: usize,
    /// Most sequences that run at the same time.
    pub sequences: usize,
    /// Most requests that wait.
    pub waiting: usize,
    /// Tokens in a page.
    pub block_tokens: usize,
    /// Pages in the pool.
    pub pages: usize,
    /// Most tokens of a prompt and its answer.
    pub context_tokens: usize,
    /// Number of logits of a row.
    pub vocabulary: usize,
    /// Tokens that end an answer.
    pub end_ids: Vec<u32>,
}

impl Limits {
    /// Most tokens that a sequence can have: the context, or what the pool holds.
    pub fn longest(&self) -> usize {
        self.context_tokens.min(self.pages * self.block_tokens)
    }

    /// Checks a request before it is queued.
    pub fn check(&self, prompt: &[u32], sampling: &super::Sampling) -> Result<()> {
        sampling.check(self.vocabulary)?;
        if prompt.is_empty() {
            return Err(Error::input("prompt: expected at least one token, got none"));
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= self.vocabulary) {
            return Err(Error::input(format!("prompt: expected token ids below {}, got {id}", self.vocabulary)));
        }
        // One token of the answer must fit as well.
        if prompt.len() >= self.longest() {
            let message = format!("prompt: expected fewer than {} tokens, got {}", self.longest(), prompt.len());
            let hint = if self.longest() < self.context_tokens {
                format!("the cache pool is smaller than the model's context of {} tokens", self.context_tokens)
            } else {
                "this is the model's context; shorten the conversation".to_owned()
            };
            return Err(Error::input(message).hint(hint));
        }
        Ok(())
    }
}

struct Sequence {
    /// The prompt and the answer so far.
    tokens: Vec<u32>,
    prompt: usize,
    /// Tokens whose keys and values are in the pool.
    computed: usize,
    /// Tokens at which the answer is cut.
    longest: usize,
    table: BlockTable,
    sampler: Sampler,
    answer: Answer,
    adapter: i32,
    sink: Box<dyn Sink>,
    ended: Option<Outcome>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Finished,
    Failed,
    Cancelled,
}

impl Sequence {
    fn usage(&self) -> Usage {
        Usage { prompt_tokens: self.prompt, completion_tokens: self.tokens.len() - self.prompt }
    }

    fn fail(&mut self, error: Error) {
        self.ended = Some(Outcome::Failed);
        self.sink.send(Event::Failed(error));
    }

    /// Takes the next token of the answer.
    fn advance(&mut self, logits: &[f32], end_ids: &[u32]) {
        let choice = match self.sampler.choose(logits) {
            Ok(choice) => choice,
            Err(error) => return self.fail(error),
        };
        self.tokens.push(choice.token);
        let (mut delta, mut reason) = (Delta::default(), None);
        if end_ids.contains(&choice.token) && !self.sampler.sampling().ignore_end {
            reason = Some(FinishReason::Stop);
            delta = self.answer.finish();
        } else {
            let (more, stopped) =
                self.answer.push(Token { id: choice.token, logprob: choice.logprob, top: choice.top });
            delta.text.push_str(&more.text);
            delta.tokens.extend(more.tokens);
            if let Some(number) = stopped {
                reason = Some(FinishReason::StopString(number));
            } else if self.tokens.len() >= self.longest {
                reason = Some(FinishReason::Length);
                let rest = self.answer.finish();
                delta.text.push_str(&rest.text);
                delta.tokens.extend(rest.tokens);
            }
        }
        if let Some(reason) = reason {
            self.ended = Some(Outcome::Finished);
            let usage = self.usage();
            self.sink.send(Event::Finished { delta, reason, usage });
        } else if (!delta.text.is_empty() || !delta.tokens.is_empty()) && !self.sink.send(Event::Delta(delta)) {
            self.ended = Some(Outcome::Cancelled);
        }
    }
}

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
        let Request { prompt, sampling, constraint, adapter, decoder, mut sink, urgent } = request;
        if let Err(error) = self.limits.check(&prompt, &sampling) {
            self.counters.failed += 1;
            sink.send(Event::Failed(error));
            return;
        }
        let answer = Answer::new(decoder, &sampling.stop);
        let room = self.limits.longest() - prompt.len();
        let longest = prompt.len() + sampling.max_tokens.unwrap_or(room).min(room);
        let sequence = Sequence {
            prompt: prompt.len(),
            computed: 0,
            longest,
            table: BlockTable::default(),
            sampler: Sampler::new(sampling, &prompt, constraint),
            answer,
            adapter,
            sink,
            ended: None,
            tokens: prompt,
        };
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
                sequence.table.release(pool);
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
            if self.running[index].tokens.len() - self.running[index].computed == 1 && self.reserve(index) {
                self.planned.push((index, 1, true));
                budget -= 1;
            }
            index += 1;
        }
        // Prompts under way; their pages were reserved when they were admitted.
        for (index, sequence) in self.running.iter().enumerate() {
            let left = sequence.tokens.len() - sequence.computed;
            let count = left.min(budget);
            if left > 1 && count > 0 {
                self.planned.push((index, count, count == left));
                budget -= count;
            }
        }
        // New ones, in order: nobody overtakes a request that waits for room.
        while budget > 0 && self.running.len() < self.limits.sequences {
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            let count = sequence.tokens.len();
            // A page is left for each running answer, so that admission doesn't cause a preemption at once.
            let room = self.pool.pages_for(count) + self.running.len() <= self.pool.free();
            if !room && !self.running.is_empty() || !sequence.table.reserve(&mut self.pool, count) {
                self.waiting.push_front(sequence);
                break;
            }
            let chunk = count.min(budget);
            self.planned.push((self.running.len(), chunk, chunk == count));
            budget -= chunk;
            self.running.push(sequence);
        }
        self.planned.sort_unstable();
        (!self.planned.is_empty()).then(|| self.batch())
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
            youngest.table.release(&mut self.pool);
            youngest.computed = 0;
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
            sequence.table.release(&mut self.pool);
            self.counters.failed += 1;
        }
    }

    fn retire(&mut self) {
        let (pool, counters) = (&mut self.pool, &mut self.counters);
        self.running.retain_mut(|sequence| {
            let Some(outcome) = sequence.ended else { return true };
            sequence.table.release(pool);
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
mod tests {
    use proptest::prelude::*;

    use super::super::Sampling;
    use super::super::fake::{FakeStep, Listener, VOCABULARY, request};
    use super::super::step::Step;
    use super::*;

    fn limits(pages: usize, batch_tokens: usize, sequences: usize) -> Limits {
        Limits {
            batch_tokens,
            sequences,
            waiting: 100,
            block_tokens: 3,
            pages,
            context_tokens: 60,
            vocabulary: VOCABULARY,
            end_ids: vec![0],
        }
    }

    fn sampling(seed: u64, max_tokens: usize) -> Sampling {
        Sampling { seed: Some(seed), max_tokens: Some(max_tokens), logprobs: Some(0), ..Sampling::default() }
    }

    /// Steps until nothing is left to do.
    fn finish(scheduler: &mut Scheduler, step: &mut FakeStep) {
        let mut logits = Vec::new();
        while let Some(batch) = scheduler.plan() {
            logits.clear();
            match step.run(&batch, &mut logits) {
                Ok(()) => scheduler.apply(&logits),
                Err(error) => scheduler.fail(&error),
            }
        }
    }

    fn alone(prompt: &[u32], sampling: &Sampling, adapter: i32) -> Listener {
        let mut scheduler = Scheduler::new(limits(20, 64, 1));
        let listener = Listener::default();
        scheduler.add(request(prompt, sampling.clone(), adapter, &listener));
        finish(&mut scheduler, &mut FakeStep::new(20, 3));
        listener
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// The same request gives the same tokens, alone or in a crowd, whatever the budget, the pool and the arrivals;
        /// and afterwards every page is free.
        #[test]
        fn a_crowd_changes_no_answer(
            requests in prop::collection::vec(
                (prop::collection::vec(1u32..VOCABULARY as u32, 1..30), 1usize..30, any::<u64>(), -1i32..3, 0usize..8), 1..12),
            pages in 20usize..40,
            batch_tokens in 4usize..40,
            sequences in 1usize..4,
        ) {
            let mut scheduler = Scheduler::new(limits(pages, batch_tokens, sequences));
            let mut step = FakeStep::new(pages, 3);
            let mut logits = Vec::new();
            let mut listeners = Vec::new();
            for (prompt, max_tokens, seed, adapter, steps) in &requests {
                let listener = Listener::default();
                scheduler.add(request(prompt, sampling(*seed, *max_tokens), *adapter, &listener));
                listeners.push(listener);
                for _ in 0..*steps {
                    if let Some(batch) = scheduler.plan() {
                        prop_assert!(batch.tokens.len() <= batch_tokens && batch.sequences() <= sequences);
                        logits.clear();
                        step.run(&batch, &mut logits).unwrap();
                        scheduler.apply(&logits);
                    }
                }
            }
            finish(&mut scheduler, &mut step);
            for ((prompt, max_tokens, seed, adapter, _), listener) in requests.iter().zip(&listeners) {
                let expected = alone(prompt, &sampling(*seed, *max_tokens), *adapter);
                prop_assert_eq!(listener.tokens(), expected.tokens());
                prop_assert_eq!(listener.text(), expected.text());
                prop_assert_eq!(listener.ending(), expected.ending());
            }
            prop_assert!(scheduler.idle());
            prop_assert_eq!(scheduler.pool().used(), 0);
            prop_assert_eq!(scheduler.counters().finished, requests.len() as u64);
        }

        #[test]
        fn who_leaves_frees_his_pages_and_disturbs_nobody(leaving in 0usize..5, after in 0usize..12) {
            let mut scheduler = Scheduler::new(limits(24, 8, 4));
            let mut step = FakeStep::new(24, 3);
            let listeners: Vec<Listener> = (0..5).map(|_| Listener::default()).collect();
            for (index, listener) in listeners.iter().enumerate() {
                scheduler.add(request(&[1 + index as u32; 7], sampling(index as u64, 20), -1, listener));
            }
            let mut logits = Vec::new();
            for _ in 0..after {
                if let Some(batch) = scheduler.plan() {
                    logits.clear();
                    step.run(&batch, &mut logits).unwrap();
                    scheduler.apply(&logits);
                }
            }
            listeners[leaving].close();
            scheduler.drop_cancelled();
            finish(&mut scheduler, &mut step);
            for (index, listener) in listeners.iter().enumerate().filter(|(index, _)| *index != leaving) {
                prop_assert_eq!(listener.text(), alone(&[1 + index as u32; 7], &sampling(index as u64, 20), -1).text());
            }
            prop_assert_eq!(scheduler.pool().used(), 0);
        }
    }

    #[test]
    fn too_few_pages_preempt_the_youngest_and_its_answer_goes_on() {
        // Each needs up to 10 pages of the 12; both fit at the beginning.
        let mut scheduler = Scheduler::new(limits(12, 32, 4));
        let long = Sampling { ignore_end: true, ..sampling(3, 25) };
        let listeners = [Listener::default(), Listener::default()];
        for listener in &listeners {
            scheduler.add(request(&[5, 6, 7], long.clone(), -1, listener));
        }
        finish(&mut scheduler, &mut FakeStep::new(12, 3));
        assert!(scheduler.counters().preempted > 0);
        let expected = alone(&[5, 6, 7], &long, -1);
        assert_eq!(expected.tokens().len(), 25);
        assert!(listeners.iter().all(|listener| listener.tokens() == expected.tokens()));
    }

    #[test]
    fn a_step_that_fails_takes_its_batch_and_nobody_else() {
        let mut scheduler = Scheduler::new(limits(20, 8, 1));
        let mut step = FakeStep::new(20, 3);
        let listeners = [Listener::default(), Listener::default()];
        for listener in &listeners {
            scheduler.add(request(&[5, 6, 7], sampling(3, 5), -1, listener));
        }
        step.fail_next();
        finish(&mut scheduler, &mut step);
        assert_eq!(listeners[0].ending(), "failed: told to");
        assert_eq!(listeners[1].text(), alone(&[5, 6, 7], &sampling(3, 5), -1).text());
        assert_eq!((scheduler.pool().used(), scheduler.counters().failed, scheduler.counters().finished), (0, 1, 1));
    }

    #[test]
    fn a_long_prompt_does_not_stall_a_running_answer() {
        let mut scheduler = Scheduler::new(limits(40, 6, 4));
        let mut step = FakeStep::new(40, 3);
        let (short, long) = (Listener::default(), Listener::default());
        scheduler.add(request(&[5], Sampling { ignore_end: true, ..sampling(3, 8) }, -1, &short));
        scheduler.add(request(&[6; 50], sampling(3, 2), -1, &long));
        let mut logits = Vec::new();
        for expected in 1..=8 {
            let batch = scheduler.plan().unwrap();
            assert_eq!(batch.tokens.len(), 6, "the budget is used up");
            logits.clear();
            step.run(&batch, &mut logits).unwrap();
            scheduler.apply(&logits);
            assert_eq!(short.tokens().len(), expected, "every step brings a token");
        }
    }

    #[test]
    fn impossible_requests_are_refused_with_both_values() {
        let mut scheduler = Scheduler::new(limits(10, 8, 1));
        for (prompt, sampling, expected) in [
            (vec![], sampling(1, 1), "prompt: expected at least one token, got none"),
            (vec![1; 30], sampling(1, 1), "prompt: expected fewer than 30 tokens, got 30"),
            (vec![VOCABULARY as u32], sampling(1, 1), "prompt: expected token ids below 31, got 31"),
            (
                vec![1],
                Sampling { temperature: f32::NAN, ..sampling(1, 1) },
                "temperature: expected a number from 0 to 100, got NaN",
            ),
        ] {
            let listener = Listener::default();
            scheduler.add(request(&prompt, sampling, -1, &listener));
            assert_eq!(listener.ending().lines().next(), Some(format!("failed: {expected}").as_str()));
        }
        assert!(scheduler.idle());
    }
}
