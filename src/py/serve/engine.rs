//! The engine: prompts become answers on a thread of its own, in a terminal and over HTTP.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::author::PythonAuthor;
use super::desk::PythonDesk;
use super::listener::Listener;
use super::shelf::PythonShelf;
use super::step::PythonStep;
use super::stream::{Stream, stream};
use crate::error::{Error, Result};
use crate::py::text::{ChatTemplate, Tokenizer};
use crate::serve::fairness::MAX_PRIORITY;
use crate::serve::models::Models;
use crate::serve::names::Names;
use crate::serve::{Author, Desk, Language, Limits, Request, Sampling, Text, Traffic, http};

/// Makes prompts into answers on a thread of its own; the model is a Python function.
#[pyclass(module = "ftkit._core", frozen)]
pub(super) struct Engine {
    engine: crate::serve::Engine,
    language: Arc<dyn Language>,
    models: Arc<Models>,
    names: Arc<Names>,
    traffic: Arc<Traffic>,
    keys: Arc<http::keys::Ring>,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (tokenizer, template, step, workspace, *, name, content, batch_tokens, sequences, waiting,
        block_tokens, pages, page_bytes, context_tokens, draft_tokens, draft_model, vocabulary))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        step: Py<PyAny>,
        workspace: Vec<Py<PyAny>>,
        name: &str,
        content: &str,
        batch_tokens: usize,
        sequences: usize,
        waiting: usize,
        block_tokens: usize,
        pages: usize,
        page_bytes: u64,
        context_tokens: usize,
        draft_tokens: usize,
        draft_model: bool,
        vocabulary: usize,
    ) -> PyResult<Self> {
        let (tokenizer, template) = (tokenizer.0.clone(), template.map(|template| template.0.clone()));
        let end_ids = tokenizer.end_ids();
        let limits = Limits {
            batch_tokens,
            sequences,
            waiting,
            block_tokens,
            pages,
            context_tokens,
            draft_tokens,
            draft_model,
            vocabulary,
            end_ids,
        };
        let workspace = workspace
            .try_into()
            .map_err(|given: Vec<_>| Error::failure(format!("workspace: expected 6 tensors, got {}", given.len())))?;
        let shelf = PythonShelf { step: Python::attach(|py| step.clone_ref(py)), base: content.to_owned() };
        let engine = crate::serve::Engine::start(limits, PythonStep { step, workspace, drafts: draft_model }, shelf)?;
        engine.metrics().block_bytes.set(page_bytes);
        let language = Arc::new(Text::new(tokenizer, template));
        let (models, names) = (Arc::new(Models::new(name, content)), Arc::default());
        let (traffic, keys) = (Arc::default(), Arc::default());
        Ok(Self { engine, language, models, names, traffic, keys })
    }

    /// The names that requests may ask for.
    #[getter]
    fn models(&self) -> Vec<String> {
        self.models.list().into_iter().map(|model| model.name).collect()
    }

    fn add_adapter(&self, name: &str, adapter: i32) -> PyResult<()> {
        Ok(self.models.add(name, adapter)?)
    }

    fn remove_adapter(&self, name: &str) -> PyResult<i32> {
        Ok(self.models.remove(name)?)
    }

    fn replace_adapter(&self, name: &str, adapter: i32) -> PyResult<i32> {
        Ok(self.models.replace(name, adapter)?)
    }

    fn know(&self, adapter: i32) {
        self.engine.know(adapter);
    }

    fn forget(&self, adapter: i32) {
        self.engine.forget(adapter);
    }

    fn held(&self, adapter: i32) -> bool {
        self.models.held(adapter)
    }

    fn set_keys(&self, keys: &str) -> PyResult<()> {
        Ok(self.keys.replace(keys)?)
    }

    fn set_alias(&self, name: &str, targets: Vec<(String, u32)>) -> PyResult<()> {
        Ok(self.names.set(name, targets)?)
    }

    fn remove_alias(&self, name: &str) -> bool {
        self.names.remove(name)
    }

    #[pyo3(signature = (model, fingerprint))]
    fn describe(&self, model: &str, fingerprint: Option<&str>) {
        self.names.describe(model, fingerprint);
    }

    fn traffic(&self, model: &str) -> (u64, u64, u64) {
        self.traffic.model(model)
    }

    #[pyo3(signature = (prompt, sampling, model = None, priority = 0, first_token_seconds = None, answered = 0))]
    fn submit(
        &self,
        prompt: Vec<u32>,
        sampling: &str,
        model: Option<&str>,
        priority: i64,
        first_token_seconds: Option<f64>,
        answered: usize,
    ) -> PyResult<Stream> {
        let priority = i8::try_from(priority).ok().filter(|priority| (-MAX_PRIORITY..=MAX_PRIORITY).contains(priority));
        let Some(priority) = priority else {
            let message =
                format!("priority: expected a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}, got another");
            return Err(Error::input(message).into());
        };
        let deadline = first_token_seconds.map(seconds).transpose()?.map(|time| Instant::now() + time);
        let sampling = Sampling::from_json(sampling)?;
        let Some(model) = self.models.find(model) else {
            let message =
                format!("model: expected one of {}, got {:?}", self.models().join(", "), model.unwrap_or_default());
            return Err(Error::input(message).into());
        };
        let (stream, sink) = stream();
        let decoder = self.language.decoder(false);
        let request = Request {
            prompt,
            answered,
            sampling,
            constraint: None,
            adapter: model.adapter,
            root: model.root,
            decoder,
            sink,
            client: 0,
            priority,
            deadline,
            urgent: false,
            embeds: false,
        };
        self.engine.submit(vec![request]).map_err(Error::from)?;
        Ok(stream)
    }

    fn metrics(&self) -> std::collections::HashMap<&'static str, u64> {
        self.engine.metrics().snapshot().into_iter().collect()
    }

    #[pyo3(signature = (listener, ready, model, *, body_bytes, upload_bytes, stuck_seconds, api_key = None,
        desk = None, author = None, access_log = None, first_token_seconds = None))]
    #[allow(clippy::too_many_arguments)]
    fn serve(
        &self,
        py: Python<'_>,
        listener: &Listener,
        ready: Py<PyAny>,
        model: String,
        body_bytes: usize,
        upload_bytes: u64,
        stuck_seconds: f64,
        api_key: Option<String>,
        desk: Option<Py<PyAny>>,
        author: Option<Py<PyAny>>,
        access_log: Option<PathBuf>,
        first_token_seconds: Option<f64>,
    ) -> PyResult<()> {
        let first_token = first_token_seconds.map(seconds).transpose()?;
        let Some(socket) = listener.socket.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Err(Error::failure("listener: expected one that is not in use").into());
        };
        let (engine, language, models) = (self.engine.clone(), Arc::clone(&self.language), Arc::clone(&self.models));
        let settings = http::Settings {
            host: listener.host.clone(),
            loopback: listener.loopback,
            api_key,
            keys: Arc::clone(&self.keys),
            body_bytes,
            upload_bytes,
            first_token,
            model,
            names: Arc::clone(&self.names),
            traffic: Arc::clone(&self.traffic),
            desk: desk.map(|desk| Arc::new(PythonDesk(desk)) as Arc<dyn Desk>),
            author: author.map(|author| Arc::new(PythonAuthor(author)) as Arc<dyn Author>),
            access_log,
            stuck_after: Duration::try_from_secs_f64(stuck_seconds)
                .map_err(|_| Error::input(format!("stuck_seconds: expected a time, got {stuck_seconds}")))?,
        };
        py.detach(|| {
            let mut called = Ok(());
            http::Server::new(socket, engine, language, models, settings)?.run(|| {
                called = Python::attach(|py| ready.call0(py).map(drop));
            })?;
            called
        })
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.engine.stop());
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // The thread may be waiting for the lock that this one holds.
        Python::attach(|py| py.detach(|| self.engine.stop()));
    }
}

fn seconds(number: f64) -> Result<Duration> {
    // a year, so that no sum of times overflows
    match Duration::try_from_secs_f64(number) {
        Ok(time) if time > Duration::ZERO && number < 3.2e7 => Ok(time),
        _ => Err(Error::input(format!("first_token_seconds: expected a time above 0, got {number}"))),
    }
}
