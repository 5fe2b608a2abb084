//! Answers that are written in parts by somebody who decides between them what comes before: retrieval.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};

use super::engine::{Engine, Refused};
use super::language::Language;
use super::prefix::Key;
use super::request::{Event, Request, Sink};
use super::sampling::Sampling;

/// Somebody who writes answers; see `python/ftkit/serve/author.py`.
pub trait Author: Send + Sync {
    /// Answers a conversation with `pen`. Returns when the answer has ended, or nobody listens any more.
    fn answer(&self, messages: &[Value], sampling: &Sampling, pen: Pen);
}

/// A text that an answer was written under.
#[derive(Clone, Debug)]
pub struct Source {
    /// Where it stands.
    pub source: String,
    /// The text.
    pub text: String,
}

/// The sources of a request's choices, by their numbers; there before a choice ends.
#[derive(Clone, Debug, Default)]
pub struct Sources(Arc<Mutex<BTreeMap<usize, Vec<Source>>>>);

impl Sources {
    /// Notes those of a choice.
    pub fn set(&self, choice: usize, sources: Vec<Source>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(choice, sources);
    }

    /// Those of a choice; none for one that nobody retrieved for.
    pub fn of(&self, choice: usize) -> Option<Vec<Source>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&choice).cloned()
    }

    /// The same as JSON.
    pub fn shown(&self, choice: usize) -> Option<Value> {
        let shown = |source: Source| json!({"source": source.source, "text": source.text});
        self.of(choice).map(|sources| sources.into_iter().map(shown).collect())
    }
}

/// One choice of an answer: where its parts are asked for, and where they go.
pub struct Pen {
    /// Who computes.
    pub engine: Engine,
    /// Whose tokens.
    pub language: Arc<dyn Language>,
    /// The adapter's id, -1 for none; it stays until the answer has ended.
    pub adapter: i32,
    /// Where the keys of its pages begin.
    pub root: Option<Key>,
    /// Who asks.
    pub client: u64,
    /// Among the requests of the client.
    pub priority: i8,
    /// When the first token is due; parts that follow have no such time.
    pub deadline: Option<Instant>,
    /// Number of the choice.
    pub choice: usize,
    /// Where the sources go.
    pub sources: Sources,
    /// Where the answer goes.
    pub sink: Box<dyn Sink>,
}

impl Pen {
    /// Asks for a part of the answer, whose events go to `sink`; the prompt's last `answered` tokens are parts before it.
    pub fn submit(
        &mut self,
        prompt: Vec<u32>,
        answered: usize,
        sampling: Sampling,
        sink: Box<dyn Sink>,
    ) -> Result<(), Refused> {
        let request = Request {
            prompt,
            answered,
            sampling,
            constraint: None,
            adapter: self.adapter,
            root: self.root,
            decoder: self.language.decoder(false),
            sink,
            client: self.client,
            priority: self.priority,
            deadline: self.deadline.take(),
            urgent: false,
            embeds: false,
        };
        self.engine.submit(vec![request])
    }

    /// Ends the answer, or gives more of it; `false` when nobody listens any more.
    pub fn send(&mut self, event: Event, sources: Vec<Source>) -> bool {
        if matches!(event, Event::Finished { .. }) {
            self.sources.set(self.choice, sources);
        }
        self.sink.send(event)
    }
}
