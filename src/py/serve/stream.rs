//! One answer while it grows, from the engine's thread to a Python iterator.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::serve::{Delta, Event, Sink};

/// Hands events to the thread that reads a [`Stream`].
struct Queue {
    sender: Sender<Event>,
    closed: Arc<AtomicBool>,
}

impl Sink for Queue {
    fn send(&mut self, event: Event) -> bool {
        !self.closed() && self.sender.send(event).is_ok()
    }

    fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// A stream, and what feeds it.
pub(super) fn stream() -> (Stream, Box<dyn Sink>) {
    let (sender, receiver) = channel();
    let closed = Arc::new(AtomicBool::new(false));
    let sink = Box::new(Queue { sender, closed: Arc::clone(&closed) });
    (Stream { receiver: Mutex::new(receiver), closed }, sink)
}

pub(super) type ShownToken = (u32, Option<f32>, Vec<(u32, f32)>);
pub(super) type Shown = (String, Vec<ShownToken>, Option<&'static str>, Option<(usize, usize, usize)>);

/// One answer while it grows.
#[pyclass(module = "ftkit._core", frozen)]
pub(super) struct Stream {
    receiver: Mutex<Receiver<Event>>,
    closed: Arc<AtomicBool>,
}

#[pymethods]
impl Stream {
    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Shown>> {
        loop {
            let event = py.detach(|| {
                let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
                receiver.recv_timeout(Duration::from_millis(100))
            });
            match event {
                Ok(Event::Delta(delta)) => return Ok(Some(shown(delta, None, None))),
                Ok(Event::Finished { delta, reason, usage }) => {
                    self.cancel();
                    let usage = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens);
                    return Ok(Some(shown(delta, Some(reason.as_str()), Some(usage))));
                }
                Ok(Event::Failed(error)) => {
                    self.cancel();
                    return Err(error.into());
                }
                // Ctrl-C while the engine works.
                Err(RecvTimeoutError::Timeout) => py.check_signals().inspect_err(|_| self.cancel())?,
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
            if self.closed.load(Ordering::Acquire) {
                return Ok(None);
            }
        }
    }

    /// All that is still to come, as one item. Python's lock is free for the engine's steps meanwhile.
    fn rest(&self, py: Python<'_>) -> PyResult<Shown> {
        let mut all = Delta::default();
        loop {
            let event = py.detach(|| {
                let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
                let until = Instant::now() + Duration::from_millis(100);
                loop {
                    match receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
                        Ok(Event::Delta(delta)) => append(&mut all, delta),
                        other => return other,
                    }
                }
            });
            match event {
                Ok(Event::Finished { delta, reason, usage }) => {
                    self.cancel();
                    append(&mut all, delta);
                    let usage = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens);
                    return Ok(shown(all, Some(reason.as_str()), Some(usage)));
                }
                Ok(Event::Failed(error)) => {
                    self.cancel();
                    return Err(error.into());
                }
                Ok(Event::Delta(delta)) => append(&mut all, delta),
                Err(RecvTimeoutError::Timeout) => py.check_signals().inspect_err(|_| self.cancel())?,
                Err(RecvTimeoutError::Disconnected) => return Ok(shown(all, None, None)),
            }
            if self.closed.load(Ordering::Acquire) {
                return Ok(shown(all, None, None));
            }
        }
    }

    fn cancel(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

fn append(all: &mut Delta, delta: Delta) {
    all.text.push_str(&delta.text);
    all.tokens.extend(delta.tokens);
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.cancel();
    }
}

fn shown(delta: Delta, reason: Option<&'static str>, usage: Option<(usize, usize, usize)>) -> Shown {
    let tokens = delta.tokens.into_iter().map(|token| (token.id, token.logprob, token.top)).collect();
    (delta.text, tokens, reason, usage)
}
