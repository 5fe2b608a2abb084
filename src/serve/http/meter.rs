//! What an answer costs, and how fast it comes: noted while it is made, settled before its end is told, or when its
//! caller leaves.

use std::sync::Arc;
use std::time::Instant;

use super::App;
use super::keys::Key;
use super::log::Record;
use crate::serve::Event;
use crate::serve::models::Model;

/// Who asks, in the extensions of a request.
#[derive(Clone)]
pub(super) struct Caller {
    /// His key.
    pub key: Arc<Key>,
    /// The request's line in the log.
    pub record: Arc<Record>,
}

/// One choice of an answer.
pub(super) struct Meter {
    app: Arc<App>,
    caller: Caller,
    /// The adapter stays while the answer is made; its name.
    model: Model,
    /// Choices of one prompt share its tokens; the first pays.
    prompt_tokens: usize,
    pays: bool,
    start: Instant,
    last: Option<Instant>,
    /// Tokens that came.
    seen: usize,
    settled: bool,
}

impl Meter {
    /// A meter for a choice of a request that came at `start`.
    pub fn new(app: Arc<App>, caller: Caller, model: Model, prompt_tokens: usize, pays: bool, start: Instant) -> Self {
        Self { app, caller, model, prompt_tokens, pays, start, last: None, seen: 0, settled: false }
    }

    /// The name of the model that answers.
    pub fn model(&self) -> &str {
        &self.model.name
    }

    /// Notes an event.
    pub fn event(&mut self, event: &Event) {
        let now = Instant::now();
        match self.last.replace(now) {
            None => self.app.engine.metrics().first_token_seconds.record(now - self.start),
            Some(last) => self.app.traffic.between_tokens.record(now - last),
        }
        match event {
            Event::Delta(delta) => self.seen += delta.tokens.len(),
            // Whoever asks again as soon as he has his answer has paid for it.
            Event::Finished { usage, .. } => self.settle(usage.completion_tokens),
            Event::Failed(_) => self.settle(self.seen),
        }
    }

    fn settle(&mut self, generated: usize) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        let prompt = if self.pays && self.last.is_some() { self.prompt_tokens } else { 0 };
        let counts = self.app.traffic.of(&self.caller.key.name, &self.model.name);
        counts.requests.add(1);
        counts.prompt_tokens.add(prompt as u64);
        counts.generated_tokens.add(generated as u64);
        self.caller.key.spend(prompt + generated);
        self.caller.record.tokens(prompt as u64, generated as u64);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        // An answer that nobody waited for costs what was made of it.
        self.settle(self.seen);
    }
}
