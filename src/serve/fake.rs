//! For tests: a tiny deterministic model that really keeps its memory in pages, and a caller that remembers.
//!
//! What it keeps of a token is a hash of the token, its position and the adapter's weights; its logits are a hash of all
//! that the page table leads to. So a wrong page, a page written by another sequence or under another adapter, a token
//! missing or computed twice gives another answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::prefix::root;
use super::request::{Decoder, Event, Request, Sink};
use super::residency::Fetched;
use super::sampling::Sampling;
use super::step::{Batch, Shelf, Step};
use crate::{Error, Result};

/// Number of tokens; 0 ends an answer.
pub(crate) const VOCABULARY: usize = 31;

/// The model.
pub(crate) struct FakeStep {
    memory: Vec<u64>,
    /// The tokens themselves.
    tokens: Vec<i32>,
    /// Added to the logit of the token three places before: a model that repeats itself.
    habit: f32,
    block_tokens: usize,
    fail: bool,
    /// Makes drafts.
    pub draft: Option<Box<FakeStep>>,
    /// The weights of adapters that were loaded anew under their ids.
    pub weights: HashMap<i32, u64>,
    /// Adapters in the pool, from [`PAGED`] on, with their pages.
    installed: HashMap<i32, Vec<u32>>,
    /// Sleeps in each step, so that tests can watch a request under way.
    pub pause: std::time::Duration,
}

impl FakeStep {
    pub fn new(pages: usize, block_tokens: usize) -> Self {
        Self {
            memory: vec![u64::MAX; pages * block_tokens],
            tokens: vec![0; pages * block_tokens],
            habit: 0.0,
            block_tokens,
            fail: false,
            draft: None,
            weights: HashMap::new(),
            installed: HashMap::new(),
            pause: std::time::Duration::ZERO,
        }
    }

    pub fn with_habit(pages: usize, block_tokens: usize, habit: f32) -> Self {
        Self { habit, ..Self::new(pages, block_tokens) }
    }

    /// What the adapter's weights come to; of one in the pool, they are read from its pages.
    fn weights_of(&self, adapter: i32) -> u64 {
        if adapter < PAGED {
            return self.weights.get(&adapter).copied().unwrap_or(adapter as u64);
        }
        let pages = &self.installed[&adapter];
        let slots =
            pages.iter().flat_map(|&page| page as usize * self.block_tokens..(page as usize + 1) * self.block_tokens);
        slots.fold(SEED, |hash, slot| mix(hash, self.memory[slot]))
    }

    pub fn fail_next(&mut self) {
        self.fail = true;
    }
}

const SEED: u64 = 0xcbf2_9ce4_8422_2325;

fn mix(hash: u64, value: u64) -> u64 {
    (hash ^ value).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
}

impl Step for FakeStep {
    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<()> {
        std::thread::sleep(self.pause);
        if std::mem::take(&mut self.fail) {
            return Err(Error::failure("told to"));
        }
        if let Some(draft) = &mut self.draft {
            draft.run(&Batch { adapter: vec![-1; batch.sequences()], rows: vec![], ..batch.clone() }, &mut vec![])?;
        }
        let mut rows = batch.rows.iter().peekable();
        for sequence in 0..batch.sequences() {
            let table = &batch.block_table[sequence * batch.blocks..(sequence + 1) * batch.blocks];
            let slot = |position: usize| {
                table[position / self.block_tokens] as usize * self.block_tokens + position % self.block_tokens
            };
            let adapter = batch.adapter[sequence];
            let weights = mix(SEED, self.weights_of(adapter));
            let tokens = batch.cu_seqlens[sequence] as usize..batch.cu_seqlens[sequence + 1] as usize;
            for index in tokens {
                let position = batch.positions[index] as usize;
                self.memory[slot(position)] = mix(mix(weights, batch.tokens[index] as u64), position as u64);
                self.tokens[slot(position)] = batch.tokens[index];
                if batch.embeds {
                    let hash = (0..=position).fold(weights, |hash, before| mix(hash, self.memory[slot(before)]));
                    logits.extend([(hash >> 40) as f32 / (1u64 << 24) as f32, adapter as f32]);
                }
                if rows.next_if(|&&row| row as usize == index).is_some() {
                    let mut hash = (0..=position).fold(weights, |hash, before| mix(hash, self.memory[slot(before)]));
                    for _ in 0..VOCABULARY {
                        hash = hash.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        logits.push((hash >> 40) as f32 / (1u64 << 24) as f32 * 4.0);
                    }
                    if position >= 2 {
                        let start = logits.len() - VOCABULARY;
                        logits[start + self.tokens[slot(position - 2)] as usize] += self.habit;
                    }
                }
            }
        }
        Ok(())
    }

    fn draft(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<()> {
        assert!(batch.adapter.iter().all(|&adapter| adapter == -1));
        self.draft.as_mut().ok_or_else(|| Error::failure("no draft model"))?.run(batch, logits)
    }

    fn install(&mut self, adapter: i32, pages: &[u32]) -> Result<()> {
        for (number, &page) in pages.iter().enumerate() {
            for slot in 0..self.block_tokens {
                let weight = mix(mix(SEED, adapter as u64), (number * self.block_tokens + slot) as u64);
                self.memory[page as usize * self.block_tokens + slot] = weight;
            }
        }
        self.installed.insert(adapter, pages.to_vec());
        Ok(())
    }

    fn evict(&mut self, adapter: i32) {
        self.installed.remove(&adapter);
    }
}

/// Adapters from this number on are on disk, and take as many pages as their number is above it, and one.
pub(crate) const PAGED: i32 = 100;

/// The disk.
pub(crate) struct FakeShelf;

impl Shelf for FakeShelf {
    fn fetch(&mut self, adapter: i32) -> Result<Fetched> {
        if adapter == PAGED + 99 {
            return Err(Error::input("adapter: expected one, got rubbish"));
        }
        Ok(Fetched { pages: (adapter - PAGED) as usize + 1, root: root("fake", &adapter.to_string()) })
    }

    fn forget(&mut self, _adapter: i32) {}
}

/// Token n is the n-th letter from `A` on.
pub(crate) struct Letters;

impl Decoder for Letters {
    fn push(&mut self, id: u32) -> String {
        char::from_u32('A' as u32 + id).map_or_else(String::new, String::from)
    }
    fn finish(&mut self) -> String {
        String::new()
    }
}

/// Remembers its events.
#[derive(Clone, Default)]
pub(crate) struct Listener(Arc<Mutex<(Vec<Event>, bool)>>, Arc<Mutex<Vec<f32>>>);

impl Listener {
    pub fn close(&self) {
        self.0.lock().unwrap().1 = true;
    }

    pub fn text(&self) -> String {
        self.each(|delta| delta.text.clone()).concat()
    }

    pub fn tokens(&self) -> Vec<u32> {
        self.each(|delta| delta.tokens.iter().map(|token| token.id).collect::<Vec<_>>()).concat()
    }

    /// What its prompt was embedded as.
    pub fn mean(&self) -> Vec<f32> {
        self.1.lock().unwrap().clone()
    }

    /// How it ended.
    pub fn ending(&self) -> String {
        match self.0.lock().unwrap().0.last() {
            Some(Event::Finished { reason, usage, .. }) => {
                format!("{} {} {}", reason.as_str(), usage.prompt_tokens, usage.completion_tokens)
            }
            Some(Event::Failed(error)) => format!("failed: {error}"),
            _ => "not".to_owned(),
        }
    }

    /// Tokens of the prompt that were there already.
    pub fn cached(&self) -> usize {
        match self.0.lock().unwrap().0.last() {
            Some(Event::Finished { usage, .. }) => usage.cached_tokens,
            _ => 0,
        }
    }

    fn each<T>(&self, part: impl Fn(&super::request::Delta) -> T) -> Vec<T> {
        let events = &self.0.lock().unwrap().0;
        let deltas = events.iter().filter_map(|event| match event {
            Event::Delta(delta) | Event::Finished { delta, .. } => Some(part(delta)),
            Event::Failed(_) => None,
        });
        deltas.collect()
    }
}

impl Sink for Listener {
    fn send(&mut self, event: Event) -> bool {
        let mut state = self.0.lock().unwrap();
        state.0.push(event);
        !state.1
    }
    fn closed(&self) -> bool {
        self.0.lock().unwrap().1
    }
    fn embedded(&mut self, mean: Vec<f32>) {
        *self.1.lock().unwrap() = mean;
    }
}

/// The same for an embedding of the prompt.
pub(crate) fn embedding(prompt: &[u32], adapter: i32, listener: &Listener) -> Request {
    Request { embeds: true, ..request(prompt, Sampling::default(), adapter, listener) }
}

pub(crate) fn request(prompt: &[u32], sampling: Sampling, adapter: i32, listener: &Listener) -> Request {
    Request {
        prompt: prompt.to_vec(),
        answered: 0,
        sampling,
        constraint: None,
        adapter,
        root: (adapter < PAGED).then(|| root("fake", &adapter.to_string())),
        decoder: Box::new(Letters),
        sink: Box::new(listener.clone()),
        client: 0,
        priority: 0,
        deadline: None,
        urgent: false,
        embeds: false,
    }
}
