//! What the engine is asked, and what it answers.

use std::time::Instant;

use super::constraint::Constraint;
use super::prefix::Key;
use super::sampling::Sampling;
use crate::Error;

/// Turns token ids into text, piece by piece; never gives out part of a character.
pub trait Decoder: Send {
    /// The text that this token completes, often its own.
    fn push(&mut self, id: u32) -> String;
    /// What is left when no token follows.
    fn finish(&mut self) -> String;
}

/// Where a request's events go. A closed sink cancels its request.
pub trait Sink: Send {
    /// Hands over an event; `false` when nobody listens any more.
    fn send(&mut self, event: Event) -> bool;
    /// Whether nobody listens any more.
    fn closed(&self) -> bool;
    /// Takes what a request that [embeds](Request::embeds) came to, `[hidden]`, and ends it; others never have it.
    fn embedded(&mut self, _mean: Vec<f32>) {}
}

/// One answer to generate.
pub struct Request {
    /// The prompt's tokens; not empty.
    pub prompt: Vec<u32>,
    /// Tokens at the prompt's end that belong to the answer already: penalties count them as such.
    pub answered: usize,
    /// How to choose tokens, and when to stop.
    pub sampling: Sampling,
    /// What the answer must look like, if that was asked for.
    pub constraint: Option<Constraint>,
    /// The adapter's id, -1 for none.
    pub adapter: i32,
    /// Where the keys of its pages begin ([`super::prefix::root`]); none: its pages are not shared with others.
    pub root: Option<Key>,
    /// Turns the answer's tokens into text.
    pub decoder: Box<dyn Decoder>,
    /// Where the answer goes.
    pub sink: Box<dyn Sink>,
    /// Who asks: clients share alike.
    pub client: u64,
    /// Among the requests of the client, −8 to 8; each step doubles the share.
    pub priority: i8,
    /// When the first token is due; a request that cannot have it by then fails at once.
    pub deadline: Option<Instant>,
    /// Served before the queue, and never refused: for health checks.
    pub urgent: bool,
    /// Wants no answer, but the last hidden states of the prompt, averaged over its tokens.
    pub embeds: bool,
}

/// One token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability under the model, if asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens here and their log-probabilities, if asked for.
    pub top: Vec<(u32, f32)>,
}

/// What became visible of an answer: text, and the tokens that end in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// More text.
    pub text: String,
    /// Tokens whose text is now all visible.
    pub tokens: Vec<Token>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it.
    Stop,
    /// The stop string of this number.
    StopString(usize),
    /// It has as many tokens as were allowed, or as the context or the pool hold.
    Length,
}

impl FinishReason {
    /// The API's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop | Self::StopString(_) => "stop",
            Self::Length => "length",
        }
    }
}

/// What a request consumed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt whose keys and values were there already.
    pub cached_tokens: usize,
    /// Tokens generated, the end token included.
    pub completion_tokens: usize,
}

impl Usage {
    /// Adds another answer's cost; its prompt may have been counted already.
    pub fn add(&mut self, other: Self, prompt: bool) {
        self.completion_tokens += other.completion_tokens;
        if prompt {
            self.prompt_tokens += other.prompt_tokens;
            self.cached_tokens += other.cached_tokens;
        }
    }
}

/// What happens to a request; `Finished` and `Failed` are the last.
#[derive(Clone, Debug)]
pub enum Event {
    /// More of the answer.
    Delta(Delta),
    /// The rest of the answer, and why it ended.
    Finished {
        /// What was held back until now.
        delta: Delta,
        /// Why the answer ended.
        reason: FinishReason,
        /// What it cost.
        usage: Usage,
    },
    /// No answer, or no more of it.
    Failed(Error),
}
