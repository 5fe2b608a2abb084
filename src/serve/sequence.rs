//! A request under way: its tokens, its pages, and the answer that grows.

use super::answer::Answer;
use super::limits::Limits;
use super::pool::{BlockPool, BlockTable};
use super::prefix::{Chain, Key};
use super::request::{Delta, Event, FinishReason, Request, Sink, Token, Usage};
use super::sampler::Sampler;
use crate::Error;

/// A request that waits or runs.
pub(super) struct Sequence {
    /// The prompt and the answer so far.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens whose keys and values are in the pool.
    pub computed: usize,
    /// Tokens of the prompt that were in the pool already, once it was admitted.
    cached: Option<usize>,
    /// Its first pages that others can find.
    learned: usize,
    /// Tokens at which the answer is cut.
    pub longest: usize,
    /// Its pages.
    pub table: BlockTable,
    chain: Chain,
    sampler: Sampler,
    answer: Answer,
    /// The adapter's id, -1 for none.
    pub adapter: i32,
    /// Where the answer goes.
    pub sink: Box<dyn Sink>,
    /// How it ended, if it has.
    pub ended: Option<Outcome>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// With an answer.
    Finished,
    /// With an error.
    Failed,
    /// Its caller left.
    Cancelled,
}

impl Sequence {
    /// A request that has passed [`Limits::check`].
    pub fn new(request: Request, limits: &Limits) -> Self {
        let Request { prompt, sampling, constraint, adapter, root, decoder, sink, urgent: _ } = request;
        let answer = Answer::new(decoder, &sampling.stop);
        let room = limits.longest() - prompt.len();
        Self {
            prompt: prompt.len(),
            computed: 0,
            cached: None,
            learned: 0,
            longest: prompt.len() + sampling.max_tokens.unwrap_or(room).min(room),
            table: BlockTable::default(),
            chain: Chain::new(root),
            sampler: Sampler::new(sampling, &prompt, constraint),
            answer,
            adapter,
            sink,
            ended: None,
            tokens: prompt,
        }
    }

    /// Tokens that are not computed yet.
    pub fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Takes the pages that hold the beginning of its tokens already. At least one token is left to compute, for its
    /// logits.
    pub fn adopt(&mut self, pool: &mut BlockPool) {
        let all_but_one = &self.tokens[..self.tokens.len() - 1];
        let count = self.table.adopt(pool, self.chain.keys(all_but_one, pool.block_tokens()));
        self.computed = count * pool.block_tokens();
        self.learned = count;
        self.cached.get_or_insert(self.computed);
    }

    /// The key of the first page of its beginning that is in nobody's hands; none when all are there, or it has no keys.
    pub fn missing(&mut self, pool: &BlockPool) -> Option<Key> {
        let all_but_one = &self.tokens[..self.tokens.len() - 1];
        let keys = self.chain.keys(all_but_one, pool.block_tokens());
        keys.get(pool.found(keys)).copied()
    }

    /// Whether the page of this key is one that it has not filled yet, but will with what it is given to compute.
    pub fn computes(&mut self, key: &Key, pool: &BlockPool) -> bool {
        self.chain.keys(&self.tokens, pool.block_tokens()).iter().skip(self.learned).any(|own| own == key)
    }

    /// Lets others find the pages that have become full.
    pub fn learn(&mut self, pool: &mut BlockPool) {
        let keys = self.chain.keys(&self.tokens[..self.computed], pool.block_tokens());
        for (number, &key) in keys.iter().enumerate().skip(self.learned) {
            self.table.learn(pool, number, key);
        }
        self.learned = keys.len();
    }

    /// Gives its pages up; what they held is computed again when its turn comes, as far as it is not found again.
    pub fn release(&mut self, pool: &mut BlockPool) {
        self.table.release(pool);
        self.computed = 0;
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt,
            cached_tokens: self.cached.unwrap_or(0),
            completion_tokens: self.tokens.len() - self.prompt,
        }
    }

    /// Ends it with an error.
    pub fn fail(&mut self, error: Error) {
        self.ended = Some(Outcome::Failed);
        self.sink.send(Event::Failed(error));
    }

    /// Takes the next token of the answer.
    pub fn advance(&mut self, logits: &[f32], end_ids: &[u32]) {
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
