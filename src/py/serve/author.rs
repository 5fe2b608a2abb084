//! Who writes answers in parts, as a Python function, and the pen that he gets.

use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use serde_json::Value;

use super::stream::{ShownToken, Stream, stream};
use crate::error::Error;
use crate::serve::{Delta, Event, FinishReason, Sampling};

/// An author that is a Python function: `(messages as JSON, sampling as JSON, pen)`.
pub(super) struct PythonAuthor(pub(super) Py<PyAny>);

impl crate::serve::Author for PythonAuthor {
    fn answer(&self, messages: &[Value], sampling: &Sampling, pen: crate::serve::Pen) {
        let asked = (Value::from(messages).to_string(), serde_json::json!(sampling).to_string());
        Python::attach(|py| {
            let Ok(pen) = Py::new(py, Pen { pen: Mutex::new(pen) }) else { return };
            let called = self.0.call1(py, (asked.0, asked.1, pen.clone_ref(py)));
            if called.is_err() {
                pen.get().fail("the answer could not be written; the server's log says how", false);
            }
        });
    }
}

/// Where an author asks for the parts of an answer, and where he puts them.
#[pyclass(module = "ftkit._core", frozen)]
pub(super) struct Pen {
    pen: Mutex<crate::serve::Pen>,
}

impl Pen {
    fn lock(&self) -> std::sync::MutexGuard<'_, crate::serve::Pen> {
        self.pen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Pen {
    fn submit(&self, prompt: Vec<u32>, answered: usize, sampling: &str) -> PyResult<Stream> {
        let sampling = Sampling::from_json(sampling)?;
        let (stream, sink) = stream();
        self.lock().submit(prompt, answered, sampling, sink).map_err(Error::from)?;
        Ok(stream)
    }

    #[getter]
    fn closed(&self) -> bool {
        self.lock().sink.closed()
    }

    fn send(&self, text: String, tokens: Vec<ShownToken>) -> bool {
        self.lock().send(Event::Delta(delta(text, tokens)), Vec::new())
    }

    #[allow(clippy::too_many_arguments)]
    fn finish(
        &self,
        text: String,
        tokens: Vec<ShownToken>,
        reason: &str,
        stop: Option<usize>,
        usage: (usize, usize, usize),
        sources: Vec<(String, String)>,
    ) -> bool {
        let reason = match (reason, stop) {
            (_, Some(number)) => FinishReason::StopString(number),
            ("length", None) => FinishReason::Length,
            _ => FinishReason::Stop,
        };
        let (prompt_tokens, cached_tokens, completion_tokens) = usage;
        let usage = crate::serve::Usage { prompt_tokens, cached_tokens, completion_tokens };
        let sources = sources.into_iter().map(|(source, text)| crate::serve::Source { source, text }).collect();
        self.lock().send(Event::Finished { delta: delta(text, tokens), reason, usage }, sources)
    }

    fn fail(&self, message: &str, input: bool) -> bool {
        let error = if input { Error::input(message) } else { Error::failure(message) };
        self.lock().send(Event::Failed(error), Vec::new())
    }
}

fn delta(text: String, tokens: Vec<ShownToken>) -> Delta {
    let tokens = tokens.into_iter().map(|(id, logprob, top)| crate::serve::Token { id, logprob, top });
    Delta { text, tokens: tokens.collect() }
}
