//! Bindings of the `serve` room: the engine whose step is a Python function, the server, and CPU attention over pages.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::PyTuple;
use serde_json::Value;

use super::decoder::DecoderStep;
use super::tensor::Memory;
use super::text::{ChatTemplate, Tokenizer};
use crate::decoder::attention::Rows;
use crate::decoder::step::Tokens;
use crate::error::{Error, Result};
use crate::serve::fairness::MAX_PRIORITY;
use crate::serve::models::{Models, NO_ADAPTER};
use crate::serve::names::Names;
use crate::serve::prefix::root;
use crate::serve::{
    Batch, Delta, Desk, Event, Fetched, FinishReason, Language, Limits, Refusal, Request, Sampler, Sampling, Shelf,
    Sink, Step, Text, Traffic, http,
};

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Engine>()?;
    module.add_class::<Stream>()?;
    module.add_class::<Listener>()?;
    module.add_class::<Pen>()?;
    module.add_function(wrap_pyfunction!(sampling_probabilities, module)?)?;
    module.add_function(wrap_pyfunction!(hashed_key, module)?)?;
    module.add_function(wrap_pyfunction!(content_hash, module)?)?;
    Ok(())
}

/// Makes prompts into answers on a thread of its own; the model is a Python function.
#[pyclass(module = "ftkit._core", frozen)]
struct Engine {
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

    #[pyo3(signature = (prompt, sampling, model = None, priority = 0, first_token_seconds = None))]
    fn submit(
        &self,
        prompt: Vec<u32>,
        sampling: &str,
        model: Option<&str>,
        priority: i64,
        first_token_seconds: Option<f64>,
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
            author: author.map(|author| Arc::new(PythonAuthor(author)) as Arc<dyn crate::serve::Author>),
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

/// A desk that is a Python function: `(what, arguments as JSON) -> answer as JSON`.
struct PythonDesk(Py<PyAny>);

impl Desk for PythonDesk {
    fn call(&self, what: &str, arguments: &Value) -> Result<Value, Refusal> {
        let failed = || Refusal {
            status: 500,
            message: format!("{what}: the server failed; its log says how"),
            param: None,
            code: None,
        };
        let text = Python::attach(|py| {
            let answer = self.0.call1(py, (what, arguments.to_string()))?;
            answer.extract::<String>(py)
        });
        let mut answer: Value = text.ok().and_then(|text| serde_json::from_str(&text).ok()).ok_or_else(failed)?;
        let Some(refused) = answer.get_mut("refused") else { return Ok(answer["done"].take()) };
        let text = |name: &str| refused[name].as_str().map(str::to_owned);
        Err(Refusal {
            status: refused["status"].as_u64().and_then(|status| u16::try_from(status).ok()).unwrap_or(500),
            message: text("message").unwrap_or_default(),
            param: text("param"),
            code: text("code"),
        })
    }
}

/// An author that is a Python function: `(messages as JSON, sampling as JSON, pen)`.
struct PythonAuthor(Py<PyAny>);

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
struct Pen {
    pen: Mutex<crate::serve::Pen>,
}

impl Pen {
    fn lock(&self) -> std::sync::MutexGuard<'_, crate::serve::Pen> {
        self.pen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Pen {
    fn submit(&self, prompt: Vec<u32>, sampling: &str) -> PyResult<Stream> {
        let sampling = Sampling::from_json(sampling)?;
        let (stream, sink) = stream();
        self.lock().submit(prompt, sampling, sink).map_err(Error::from)?;
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

/// A port that is taken already, for a server that starts later.
#[pyclass(module = "ftkit._core", frozen)]
struct Listener {
    socket: Mutex<Option<TcpListener>>,
    #[pyo3(get)]
    url: String,
    host: String,
    #[pyo3(get)]
    loopback: bool,
}

#[pymethods]
impl Listener {
    #[new]
    fn new(py: Python<'_>, host: &str, port: u16) -> PyResult<Self> {
        let socket = py.detach(|| http::bind(host, port))?;
        let loopback = socket.local_addr().is_ok_and(|address| address.ip().is_loopback());
        let url = http::url(&socket)?;
        Ok(Self { socket: Mutex::new(Some(socket)), url, host: host.to_owned(), loopback })
    }
}

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
fn stream() -> (Stream, Box<dyn Sink>) {
    let (sender, receiver) = channel();
    let closed = Arc::new(AtomicBool::new(false));
    let sink = Box::new(Queue { sender, closed: Arc::clone(&closed) });
    (Stream { receiver: Mutex::new(receiver), closed }, sink)
}

type ShownToken = (u32, Option<f32>, Vec<(u32, f32)>);
type Shown = (String, Vec<ShownToken>, Option<&'static str>, Option<(usize, usize, usize)>);

/// One answer while it grows.
#[pyclass(module = "ftkit._core", frozen)]
struct Stream {
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

/// The model's step: one call into the core where the model can be computed so, and otherwise a Python function over
/// tensors that Python made.
struct PythonStep {
    step: Py<PyAny>,
    /// i32 tensors: tokens, positions, cu_seqlens, adapter, block table, rows.
    workspace: [Py<PyAny>; 6],
    /// Whether a smaller model makes drafts.
    drafts: bool,
}

impl Step for PythonStep {
    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<()> {
        self.compute(("whole", "__call__"), batch, logits)?;
        if !self.drafts {
            return Ok(());
        }
        let same = Batch { adapter: vec![NO_ADAPTER; batch.sequences()], rows: Vec::new(), ..batch.clone() };
        self.draft(&same, &mut Vec::new())
    }

    fn draft(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<()> {
        self.compute(("whole_draft", "draft"), batch, logits)
    }

    fn embed(&mut self, tokens: &[u32], adapter: i32) -> Result<Vec<f32>> {
        let embed = |py: Python<'_>| -> PyResult<Vec<f32>> {
            let result = self.step.call_method1(py, "embed", (tokens.to_vec(), adapter))?;
            let memory = Memory::<f32>::of("hidden", result.bind(py))?;
            // SAFETY: `result` keeps the tensor alive, and nobody else has it.
            Ok(unsafe { memory.slice() }.to_vec())
        };
        Python::attach(embed).map_err(|error| failed(&error))
    }

    fn install(&mut self, adapter: i32, pages: &[u32]) -> Result<()> {
        let install = |py: Python<'_>| self.step.call_method1(py, "install", (adapter, pages.to_vec())).map(drop);
        Python::attach(install).map_err(|error| failed(&error))
    }

    fn evict(&mut self, adapter: i32) {
        // It does nothing that could fail; if it did, the pages would still not be read under the adapter again.
        let _ = Python::attach(|py| self.step.call_method1(py, "evict", (adapter,)).map(drop));
    }
}

/// The adapters on disk, which Python reads.
struct PythonShelf {
    step: Py<PyAny>,
    /// The content of the base model.
    base: String,
}

impl Shelf for PythonShelf {
    fn fetch(&mut self, adapter: i32) -> Result<Fetched> {
        let fetch = |py: Python<'_>| -> PyResult<(usize, String)> {
            self.step.call_method1(py, "fetch", (adapter,))?.extract(py)
        };
        let (pages, content) = Python::attach(fetch).map_err(|error| unread(&error))?;
        Ok(Fetched { pages, root: root(&self.base, &content) })
    }

    fn forget(&mut self, adapter: i32) {
        let _ = Python::attach(|py| self.step.call_method1(py, "forget", (adapter,)).map(drop));
    }
}

/// Why an adapter could not be read: the message of an InputError is for whoever asked.
fn unread(error: &PyErr) -> Error {
    Python::attach(|py| {
        let text = error.value(py).str().map_or_else(|_| String::new(), |text| text.to_string());
        Error::failure(format!("adapter: {}", text.lines().next().unwrap_or("it could not be read")))
    })
}

fn failed(error: &PyErr) -> Error {
    Python::attach(|py| match error.value(py).str() {
        Ok(text) => {
            let kind = error.get_type(py).name().map_or_else(|_| String::new(), |name| name.to_string());
            Error::failure(format!("the model's step failed: {kind}: {text}"))
        }
        Err(_) => Error::failure("the model's step failed"),
    })
}

impl PythonStep {
    /// By the core where the step is one of its own and knows the adapters, else by a method.
    fn compute(&self, (whole, method): (&str, &str), batch: &Batch, logits: &mut Vec<f32>) -> Result<()> {
        let found =
            |py: Python<'_>| -> PyResult<Option<Py<DecoderStep>>> { Ok(self.step.bind(py).getattr(whole)?.extract()?) };
        match Python::attach(found).map_err(|error| failed(&error))? {
            Some(whole) if whole.get().all_known(&batch.adapter) => {
                let step = whole.get();
                logits.resize(batch.rows.len() * step.vocabulary(), 0.0);
                let rows = Rows {
                    positions: &batch.positions,
                    cu_seqlens: &batch.cu_seqlens,
                    block_table: &batch.block_table,
                };
                let tokens = Tokens { tokens: &batch.tokens, rows, adapters: &batch.adapter, wanted: &batch.rows };
                step.compute(tokens, logits)
            }
            _ => Python::attach(|py| self.call(py, method, batch, logits)).map_err(|error| failed(&error)),
        }
    }

    fn call(&self, py: Python<'_>, method: &str, batch: &Batch, logits: &mut Vec<f32>) -> PyResult<()> {
        let parts = [
            ("tokens", &batch.tokens),
            ("positions", &batch.positions),
            ("cu_seqlens", &batch.cu_seqlens),
            ("adapter", &batch.adapter),
            ("block_table", &batch.block_table),
            ("rows", &batch.rows),
        ];
        for ((name, values), tensor) in parts.into_iter().zip(&self.workspace) {
            let memory = Memory::<i32>::of(name, tensor.bind(py))?;
            if values.len() > memory.len {
                let message = format!("{name}: expected room for {} numbers, got {}", values.len(), memory.len);
                return Err(Error::failure(message).into());
            }
            // SAFETY: this object keeps the tensor alive, and the step that reads it has not been called yet.
            unsafe { memory.slice_mut()[..values.len()].copy_from_slice(values) };
        }
        let lengths = PyTuple::new(py, batch.cu_seqlens.windows(2).map(|ends| ends[1] - ends[0]))?;
        let adapters = PyTuple::new(py, &batch.adapter)?;
        let sizes = (batch.tokens.len(), batch.blocks, batch.rows.len(), lengths, adapters);
        let result = self.step.call_method1(py, method, sizes)?;
        let memory = Memory::<f32>::of("logits", result.bind(py))?;
        // SAFETY: `result` keeps the tensor alive, and nobody else has it.
        let values = unsafe { memory.slice() };
        py.detach(|| logits.extend_from_slice(values));
        Ok(())
    }
}

#[pyfunction]
fn hashed_key(key: &str) -> String {
    http::keys::hashed(key)
}

/// The hash of a file's content.
#[pyfunction]
fn content_hash(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    let mut hasher = blake3::Hasher::new();
    py.detach(|| hasher.update_mmap(&path).map(|hasher| hasher.finalize().to_hex().to_string()))
        .map_err(|error| Error::io(&path, &error).into())
}

#[pyfunction]
#[pyo3(signature = (logits, sampling, prompt = Vec::new(), generated = Vec::new()))]
fn sampling_probabilities(
    logits: Vec<f32>,
    sampling: &str,
    prompt: Vec<u32>,
    generated: Vec<u32>,
) -> PyResult<Vec<(u32, f64)>> {
    let sampling = Sampling::from_json(sampling)?;
    sampling.check(logits.len())?;
    let mut sampler = Sampler::new(sampling, &prompt, None);
    for token in generated {
        sampler.accept(token)?;
    }
    Ok(sampler.probabilities(&logits)?)
}
