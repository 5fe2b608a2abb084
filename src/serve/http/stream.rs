//! An answer in pieces, as server-sent events. Dropped by the HTTP layer when the client leaves, which closes the sinks
//! of its requests, which cancels them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Bytes;
use serde_json::Value;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::Stream;

use super::answers::{Envelope, Route, cost};
use super::errors::ApiError;
use crate::serve::{Delta, Event, Language, Usage};

/// The body of a streamed answer.
pub(super) struct Chunks {
    receiver: UnboundedReceiver<(usize, Event)>,
    envelope: Envelope,
    language: Arc<dyn Language>,
    /// Characters of each choice so far.
    offsets: Vec<usize>,
    /// Choices that have not ended.
    open: usize,
    /// Choices to each prompt: a prompt's tokens are counted once.
    choices: usize,
    include_usage: bool,
    usage: Usage,
    ready: VecDeque<Bytes>,
}

impl Chunks {
    /// The stream of `count` choices whose events come from `receiver`.
    pub fn new(
        receiver: UnboundedReceiver<(usize, Event)>,
        envelope: Envelope,
        language: Arc<dyn Language>,
        count: usize,
        choices: usize,
        include_usage: bool,
    ) -> Self {
        let mut chunks = Self {
            receiver,
            envelope,
            language,
            offsets: vec![0; count],
            open: count,
            choices,
            include_usage,
            usage: Usage::default(),
            ready: VecDeque::new(),
        };
        if chunks.envelope.route == Route::Chat {
            for index in 0..count {
                let opening = chunks.envelope.opening(index);
                chunks.send(vec![opening]);
            }
        }
        chunks
    }

    fn send(&mut self, choices: Vec<Value>) {
        let usage = self.include_usage.then_some(Value::Null);
        let chunk = self.envelope.chunk(choices, usage);
        self.ready.push_back(line(&chunk));
    }

    fn part(&mut self, index: usize, delta: &Delta, reason: Option<&str>) {
        let part = self.envelope.part(index, delta, self.offsets[index], reason, &*self.language);
        self.offsets[index] += delta.text.chars().count();
        self.send(vec![part]);
    }

    fn take(&mut self, index: usize, event: Event) {
        match event {
            Event::Delta(delta) => {
                if !delta.text.is_empty() || self.envelope.logprobs {
                    self.part(index, &delta, None);
                }
            }
            Event::Finished { delta, reason, usage } => {
                if !delta.text.is_empty() || self.envelope.logprobs && !delta.tokens.is_empty() {
                    self.part(index, &delta, None);
                }
                self.part(index, &Delta::default(), Some(reason.as_str()));
                self.usage.completion_tokens += usage.completion_tokens;
                if index.is_multiple_of(self.choices) {
                    self.usage.prompt_tokens += usage.prompt_tokens;
                }
                self.open -= 1;
                if self.open == 0 {
                    if self.include_usage {
                        let last = self.envelope.chunk(Vec::new(), Some(cost(self.usage)));
                        self.ready.push_back(line(&last));
                    }
                    self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                }
            }
            Event::Failed(error) => {
                // The status was sent long ago: the stream itself says that it failed, and ends without `[DONE]`.
                self.ready.push_back(line(&ApiError::from(error).json()));
                self.open = 0;
                self.receiver.close();
            }
        }
    }
}

fn line(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
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
                None => {
                    let error = ApiError::unavailable("the answer was cut off");
                    self.ready.push_back(line(&error.json()));
                    self.open = 0;
                }
            }
        }
    }
}
