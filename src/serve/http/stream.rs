//! An answer in pieces. Dropped by the HTTP layer when the client leaves, which closes the sinks of its requests, which
//! cancels them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Bytes;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::Stream;

use super::dialect::{Dialect, Parts};
use super::errors::ApiError;
use crate::serve::{Event, Usage};

/// The body of a streamed answer.
pub(super) struct Chunks {
    receiver: UnboundedReceiver<(usize, Event)>,
    dialect: Box<dyn Dialect>,
    parts: Vec<Parts>,
    /// Choices that have not ended.
    open: usize,
    /// Choices to each prompt: a prompt's tokens are counted once.
    choices: usize,
    usage: Usage,
    ready: VecDeque<Bytes>,
}

impl Chunks {
    /// The stream of the choices of `parts`, `choices` to a prompt, whose events come from `receiver`.
    pub fn new(
        receiver: UnboundedReceiver<(usize, Event)>,
        mut dialect: Box<dyn Dialect>,
        parts: Vec<Parts>,
        choices: usize,
    ) -> Self {
        let mut lines = Vec::new();
        dialect.begin(&mut lines);
        let open = parts.len();
        Self { receiver, dialect, parts, open, choices, usage: Usage::default(), ready: lines.into() }
    }

    fn take(&mut self, index: usize, event: Event) {
        let mut lines = Vec::new();
        match event {
            Event::Delta(delta) => {
                for part in self.parts[index].push(delta) {
                    self.dialect.part(index, part, &mut lines);
                }
            }
            Event::Finished { delta, reason, usage } => {
                let (parts, ending) = self.parts[index].finish(delta, reason);
                for part in parts {
                    self.dialect.part(index, part, &mut lines);
                }
                self.dialect.end(index, &ending, usage, &mut lines);
                self.usage.add(usage, index.is_multiple_of(self.choices));
                self.open -= 1;
                if self.open == 0 {
                    self.dialect.done(self.usage, &mut lines);
                }
            }
            Event::Failed(error) => self.fail(&error.into()),
        }
        self.ready.extend(lines);
    }

    /// The status was sent long ago: the stream itself says that it failed, and ends.
    fn fail(&mut self, error: &ApiError) {
        let mut lines = Vec::new();
        self.dialect.failed(error, &mut lines);
        self.ready.extend(lines);
        self.open = 0;
        self.receiver.close();
    }
}

impl Stream for Chunks {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(bytes)));
            }
            if self.open == 0 {
                return Poll::Ready(None);
            }
            match ready!(self.receiver.poll_recv(context)) {
                Some((index, event)) => self.take(index, event),
                None => self.fail(&ApiError::unavailable("the answer was cut off")),
            }
        }
    }
}
