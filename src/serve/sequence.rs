//! A request under way: its tokens, its pages, and the answer that grows.

use std::time::Instant;

use super::admission::Load;
use super::answer::Answer;
use super::draft::{Trust, look_up};
use super::fairness::{Flow, MAX_PRIORITY};
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
    /// What the step that is planned computes beyond them.
    pub draft: Vec<u32>,
    /// Tokens that a model is still to draft, and the sampler that it is to be guessed with.
    guess: Option<(usize, Sampler)>,
    trust: Trust,
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
    /// Whether the request did not say how long its answer may be.
    open: bool,
    /// Its pages.
    pub table: BlockTable,
    chain: Chain,
    sampler: Sampler,
    answer: Answer,
    /// Of one that embeds, the sum of the hidden states that were computed, `[hidden]` once there are any.
    sums: Option<Vec<f64>>,
    /// The adapter's id, -1 for none.
    pub adapter: i32,
    /// Whom serving it is charged to.
    pub flow: Flow,
    /// When it came; the metrics alone look at it.
    pub came: Instant,
    /// It waited for its adapter to be read.
    pub missed: bool,
    /// When its first token is due.
    pub deadline: Option<Instant>,
    /// It was admitted before and goes on, or is urgent: before all others.
    pub first: bool,
    /// It cannot begin in the step that is planned, and others pass it.
    pub passed: bool,
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

/// What an answer without a bound is expected to have room for at least, in tokens.
const OPEN_TOKENS: usize = 128;

impl Sequence {
    /// A request that has passed [`Limits::check`].
    pub fn new(request: Request, limits: &Limits) -> Self {
        let Request { prompt, answered, sampling, constraint, adapter, root, decoder, sink, .. } = request;
        let Request { client, priority, deadline, urgent, embeds, .. } = request;
        let answer = Answer::new(decoder, &sampling.stop);
        let room = if embeds { 0 } else { limits.longest() - prompt.len() };
        // What others computed of an embedded text has no hidden states any more: it takes and leaves no pages.
        let mut chain = Chain::new(root.filter(|_| !embeds));
        chain.extend(&prompt, limits.block_tokens);
        Self {
            draft: Vec::new(),
            guess: None,
            trust: Trust::default(),
            prompt: prompt.len(),
            computed: 0,
            cached: None,
            learned: 0,
            longest: prompt.len() + sampling.max_tokens.unwrap_or(room).min(room),
            open: sampling.max_tokens.is_none(),
            table: BlockTable::default(),
            chain,
            sampler: Sampler::going_on(sampling, prompt.split_at(prompt.len().saturating_sub(answered)), constraint),
            answer,
            sums: embeds.then(Vec::new),
            adapter,
            flow: Flow { client, adapter, priority: priority.clamp(-MAX_PRIORITY, MAX_PRIORITY) },
            came: Instant::now(),
            missed: false,
            deadline,
            first: urgent,
            passed: false,
            sink,
            ended: None,
            tokens: prompt,
        }
    }

    /// It is known where its keys begin, before it runs.
    pub fn rooted(&mut self, root: Key, block_tokens: usize) {
        self.chain = Chain::new(Some(root).filter(|_| !self.embeds()));
        self.chain.extend(&self.tokens, block_tokens);
    }

    /// Tokens that are not computed yet.
    pub fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether hidden states are wanted of it, and no answer.
    pub fn embeds(&self) -> bool {
        self.sums.is_some()
    }

    /// Whether its next token is one that only generates the one after.
    pub fn generates(&self) -> bool {
        self.left() == 1 && !self.embeds()
    }

    /// Whether it has no token of its answer yet.
    pub fn silent(&self) -> bool {
        self.tokens.len() == self.prompt
    }

    /// What it may still ask of the pool. An answer without a bound is expected to become as long again as it is.
    pub fn load(&self, delay: usize, rate: usize, pool: &BlockPool) -> Load {
        // the last token of an answer is never computed
        let most = (self.longest - self.tokens.len()).saturating_sub(1);
        let more = if self.open { most.min(OPEN_TOKENS.max(self.tokens.len() - self.prompt)) } else { most };
        let shared = self.table.pages().iter().filter(|&&page| pool.holders(page) > 1).count();
        Load { tokens: self.tokens.len(), more, delay, rate, shared }
    }

    /// Takes the pages that hold the beginning of its tokens already. At least one token is left to compute, for its
    /// logits.
    pub fn adopt(&mut self, pool: &mut BlockPool) {
        let keys = self.chain.first((self.tokens.len() - 1) / pool.block_tokens());
        let count = self.table.adopt(pool, keys);
        self.computed = count * pool.block_tokens();
        self.learned = count;
    }

    /// Drafts at most so many tokens, for which it has or gets pages.
    pub fn propose(&mut self, most: usize, pool: &mut BlockPool) {
        // the last token of an answer is never computed
        let room = (self.longest - self.tokens.len()).saturating_sub(1);
        let most = self.trust.most(most.min(room));
        let found = look_up(&self.tokens, most);
        if !found.is_empty() && self.table.reserve(pool, self.tokens.len() + found.len()) {
            self.draft = found.to_vec();
        }
    }

    /// Has at most so many tokens drafted by a model, for which it has or gets pages.
    pub fn ask(&mut self, most: usize, pool: &mut BlockPool) {
        let room = (self.longest - self.tokens.len()).saturating_sub(1);
        let most = self.trust.most(most.min(room));
        let fits = most > 0 && self.table.reserve(pool, self.tokens.len() + most);
        self.guess = fits.then(|| (most, self.sampler.clone()));
    }

    /// Tokens that are still to be drafted.
    pub fn wishes(&self) -> usize {
        self.guess.as_ref().map_or(0, |(most, _)| most - self.draft.len())
    }

    /// Drafts a token from a row of the drafting model's logits: the one that the request's sampler, with its own next
    /// draw, would choose if they were the model's.
    pub fn guessed(&mut self, logits: &[f32], end_ids: &[u32]) {
        let Some((_, sampler)) = &mut self.guess else { return };
        // what follows an end is never looked at, and what can't be chosen is no guess
        let goes_on = |token: &u32, sampler: &Sampler| sampler.sampling().ignore_end || !end_ids.contains(token);
        match sampler.choose(logits) {
            Ok(choice) if goes_on(&choice.token, sampler) => self.draft.push(choice.token),
            _ => self.guess = None,
        }
        if self.wishes() == 0 {
            self.guess = None;
        }
    }

    /// Forgets what was drafted for a step.
    pub fn undraft(&mut self) {
        self.draft.clear();
        self.guess = None;
    }

    /// Takes the next tokens of the answer, from a row of logits after its last token and one after each of its draft; how
    /// many of the draft were right.
    pub fn follow(&mut self, rows: &[&[f32]], end_ids: &[u32]) -> usize {
        let draft = std::mem::take(&mut self.draft);
        let mut right = 0;
        for row in rows {
            let before = self.tokens.len();
            self.advance(row, end_ids);
            let expected = draft.get(right);
            if self.ended.is_some() || self.tokens.get(before) != expected {
                break;
            }
            right += 1;
        }
        if !draft.is_empty() {
            self.trust.learn(draft.len(), right);
        }
        right
    }

    /// Whether it was never admitted before.
    pub fn fresh(&self) -> bool {
        self.cached.is_none()
    }

    /// It was admitted: from now on it is known what was there already.
    pub fn admitted(&mut self) {
        self.cached.get_or_insert(self.computed);
    }

    /// Keys of the pages that it takes if they are there.
    fn wanted(&self, pool: &BlockPool) -> &[Key] {
        self.chain.first((self.tokens.len() - 1) / pool.block_tokens())
    }

    /// The key of the first page of its beginning that is in nobody's hands; none when all are there, or it has no keys.
    pub fn missing(&self, pool: &BlockPool) -> Option<Key> {
        let keys = self.wanted(pool);
        keys.get(pool.found(keys)).copied()
    }

    /// Tokens that it would have to compute if it began now.
    pub fn cost(&self, pool: &BlockPool) -> usize {
        self.left()
            - if self.table.pages().is_empty() { pool.found(self.wanted(pool)) * pool.block_tokens() } else { 0 }
    }

    /// Whether the page of this key is one that it has not filled yet, but will with what it is given to compute.
    pub fn computes(&self, key: &Key, pool: &BlockPool) -> bool {
        self.chain.first(self.tokens.len() / pool.block_tokens()).iter().skip(self.learned).any(|own| own == key)
    }

    /// Lets others find the pages that have become full.
    pub fn learn(&mut self, pool: &mut BlockPool) {
        self.chain.extend(&self.tokens[..self.computed], pool.block_tokens());
        let keys = self.chain.first(self.computed / pool.block_tokens());
        for (number, &key) in keys.iter().enumerate().skip(self.learned) {
            self.table.learn(pool, number, key);
        }
        self.learned = keys.len();
    }

    /// Gives its pages up; what they held is computed again when its turn comes, as far as it is not found again.
    pub fn release(&mut self, pool: &mut BlockPool) {
        self.chain.extend(&self.tokens, pool.block_tokens());
        self.table.release(pool);
        self.computed = 0;
        if let Some(sums) = &mut self.sums {
            sums.clear();
        }
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

    /// Takes the hidden states of its next tokens, `[hidden]` each; after the last, it has ended. They are added one by one
    /// in the order of the tokens, so that the mean is the same whatever chunks they came in.
    pub fn pool<'a>(&mut self, rows: impl ExactSizeIterator<Item = &'a [f32]>) {
        let Some(sums) = &mut self.sums else { return };
        self.computed += rows.len();
        for row in rows {
            sums.resize(row.len(), 0.0);
            sums.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
        }
        if self.computed == self.tokens.len() {
            let mean = sums.iter().map(|sum| (sum / self.computed as f64) as f32).collect();
            self.sink.embedded(mean);
            self.ended = Some(Outcome::Finished);
        }
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
