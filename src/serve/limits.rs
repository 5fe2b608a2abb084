//! How much the engine may take on, and which requests it can answer at all.

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
    /// Most tokens of a draft; 0: none are made.
    pub draft_tokens: usize,
    /// Whether a smaller model makes the drafts; else they are looked up.
    pub draft_model: bool,
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
