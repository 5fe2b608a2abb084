//! The HTTP side: routes that generate in the words of several APIs, models, health, metrics, and a page to chat with.
//!
//! ```text
//! connection (listen) → who may ask (guard) → route → body (here) → an API's words → parse → engine → parts
//!   → the API's words (dialect), whole or as a stream
//! ```
//! An API is one file: `openai`, `responses`, `anthropic`, `ollama` translate to what `parse` reads, and write parts.

mod anthropic;
mod complete;
mod dialect;
mod embeddings;
mod errors;
mod fields;
mod guard;
mod listen;
mod ollama;
mod openai;
mod page;
mod parse;
mod responses;
mod stream;
mod tools;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_stream::StreamExt;

pub use self::listen::{bind, url};

use self::errors::ApiError;
use super::models::{Model, Models};
use super::{Engine, Event, Language, Sampling, Sink};
use crate::{Error, Result};

/// A request's body must come within this time.
const BODY: Duration = Duration::from_secs(60);
/// A health check's token must come within this time.
const HEALTH: Duration = Duration::from_secs(30);
/// A health check that is no older answers the next one too.
const HEALTH_AGE: Duration = Duration::from_secs(1);

/// How to serve.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The name that the server was told to bind to.
    pub host: String,
    /// Whether that is this machine only.
    pub loopback: bool,
    /// The key that requests must bring.
    pub api_key: Option<String>,
    /// Most bytes of a request's body.
    pub body_bytes: usize,
    /// Time in which an answer's first token is due; a request that can't have it by then is refused.
    pub first_token: Option<Duration>,
    /// The model that answers requests which name none, and that is listed first.
    pub model: String,
}

/// What the routes share.
struct App {
    engine: Engine,
    language: Arc<dyn Language>,
    models: Arc<Models>,
    settings: Settings,
    /// The key's hash.
    key: Option<blake3::Hash>,
    health: tokio::sync::Mutex<Option<(Instant, bool)>>,
}

impl App {
    /// All models, the one that answers where none is named first.
    fn sorted(&self) -> Vec<Model> {
        let mut models = self.models.list();
        models.sort_by_key(|model| model.name != self.settings.model);
        models
    }

    /// The model of a name, or the one that answers where none is given. Ollama's clients may add a tag to the name.
    fn model(&self, name: Option<&str>) -> Result<Model, ApiError> {
        let name = name.unwrap_or(&self.settings.model);
        let found = self.models.find(Some(name));
        found.or_else(|| self.models.find(Some(name.strip_suffix(":latest")?))).ok_or_else(|| {
            let known: Vec<String> = self.models.list().into_iter().map(|model| model.name).collect();
            ApiError::no_model(name, &known.join(", "))
        })
    }
}

/// A server that has not started yet.
pub struct Server {
    listener: TcpListener,
    app: Arc<App>,
}

impl Server {
    /// A server on a listener of [`bind`].
    pub fn new(
        listener: TcpListener,
        engine: Engine,
        language: Arc<dyn Language>,
        models: Arc<Models>,
        settings: Settings,
    ) -> Self {
        let key = settings.api_key.as_ref().map(|key| blake3::hash(key.as_bytes()));
        let app = App { engine, language, models, settings, key, health: tokio::sync::Mutex::new(None) };
        Self { listener, app: Arc::new(app) }
    }

    /// Serves on threads of its own until SIGINT or SIGTERM, then until answers under way are done. `ready` is called
    /// when requests are taken.
    pub fn run(self, ready: impl FnOnce()) -> Result<()> {
        let failed = |error: std::io::Error| Error::failure(format!("the server's threads: {error}"));
        // Two threads: HTTP is never the work, and the model needs the cores.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(4)
            .thread_name("ftkit-http")
            .enable_all()
            .build()
            .map_err(failed)?;
        let outcome = runtime.block_on(async {
            let (stop, stopped) = watch::channel(0);
            signals(stop).map_err(failed)?;
            let serving = tokio::spawn(listen::serve(self.listener, router(self.app), stopped));
            ready();
            serving.await.map_err(|error| Error::failure(format!("the server: {error}")))?
        });
        runtime.shutdown_timeout(Duration::from_secs(1));
        outcome
    }
}

/// Counts SIGINT and SIGTERM.
fn signals(stop: watch::Sender<u32>) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::spawn(async move {
        loop {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            stop.send_modify(|count| *count += 1);
        }
    });
    Ok(())
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", generates(openai::chat))
        .route("/v1/completions", generates(openai::completion))
        .route("/v1/responses", generates(responses::parse))
        .route("/v1/messages", generates(anthropic::parse))
        .route("/v1/messages/count_tokens", post(count))
        .route("/v1/embeddings", post(embeddings))
        .route("/api/chat", generates(ollama::chat))
        .route("/api/generate", generates(ollama::generate))
        .route("/api/tags", get(|State(app): State<Arc<App>>| async move { ollama::tags(&app) }))
        .route("/api/show", post(show))
        .route("/api/version", get(|| async { Json(json!({"version": env!("CARGO_PKG_VERSION")})) }))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/markdown", post(markdown))
        .route("/", get(page::page))
        .route("/chat.js", get(page::script))
        .route("/chat.css", get(page::style))
        .fallback(|request: Request| async move { ApiError::no_route(request.uri().path()) })
        .method_not_allowed_fallback(|| async { ApiError::method() })
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&app), guard::guard))
        .with_state(app)
}

/// A route that generates: its API reads the body, and words the answer.
fn generates(parse: complete::Parse) -> axum::routing::MethodRouter<Arc<App>> {
    post(move |State(app): State<Arc<App>>, body: Body| async move {
        let body = read(body, app.settings.body_bytes).await?;
        complete::complete(app, body, parse).await
    })
}

async fn count(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    let body = read(body, app.settings.body_bytes).await?;
    complete::count(app, body).await
}

async fn embeddings(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    let body = read(body, app.settings.body_bytes).await?;
    embeddings::embeddings(app, body).await
}

async fn show(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    let body = read(body, app.settings.body_bytes).await?;
    ollama::show(&app, &body)
}

/// A whole body, within the limits of size and time.
async fn read(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let collect = async {
        let mut all = Vec::new();
        let mut frames = body.into_data_stream();
        while let Some(frame) = frames.next().await {
            let frame = frame.map_err(|error| ApiError::request(format!("body: expected all of it, got {error}")))?;
            if all.len() + frame.len() > limit {
                return Err(ApiError::too_large(limit));
            }
            all.extend_from_slice(&frame);
        }
        Ok(all.into())
    };
    tokio::time::timeout(BODY, collect).await.unwrap_or_else(|_| Err(ApiError::slow(BODY.as_secs())))
}

fn shown(model: &Model) -> Value {
    json!({"id": model.name, "object": "model", "created": model.created, "owned_by": "ftkit"})
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": app.sorted().iter().map(shown).collect::<Vec<_>>()}))
}

async fn model(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::no_model("?", "the names of /v1/models"))?;
    match app.models.find(Some(&name)) {
        Some(model) => Ok(Json(shown(&model))),
        None => Err(ApiError::no_model(&name, "the names of /v1/models")),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let mut response = app.engine.metrics().prometheus().into_response();
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// The page's markdown, rendered and cleaned.
async fn markdown(body: Body) -> Result<Response, ApiError> {
    let body = read(body, page::MARKDOWN_BYTES).await?;
    let text = String::from_utf8(body.into()).map_err(|_| ApiError::request("body: expected UTF-8"))?;
    let html = tokio::task::spawn_blocking(move || page::markdown(&text)).await;
    let html = html.map_err(|_| ApiError::server("the markdown could not be rendered"))?;
    Ok(axum::response::Html(html).into_response())
}

/// Decodes a token, past the queue. Checks that come together share one.
async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let mut last = app.health.lock().await;
    let healthy = match *last {
        Some((at, healthy)) if at.elapsed() < HEALTH_AGE => healthy,
        _ => {
            let healthy = tokio::time::timeout(HEALTH, decodes(&app.engine, &app.language)).await.unwrap_or(false);
            *last = Some((Instant::now(), healthy));
            healthy
        }
    };
    if healthy { Ok(Json(json!({"status": "ok"}))) } else { Err(ApiError::unavailable("the engine decodes no token")) }
}

async fn decodes(engine: &Engine, language: &Arc<dyn Language>) -> bool {
    struct Probe(Option<tokio::sync::oneshot::Sender<bool>>);
    impl Sink for Probe {
        fn send(&mut self, event: Event) -> bool {
            match event {
                Event::Delta(_) => true,
                Event::Finished { .. } => self.0.take().is_some_and(|sender| sender.send(true).is_ok()),
                Event::Failed(_) => self.0.take().is_some_and(|sender| sender.send(false).is_ok()),
            }
        }
        fn closed(&self) -> bool {
            self.0.as_ref().is_none_or(tokio::sync::oneshot::Sender::is_closed)
        }
    }
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let sampling = Sampling { max_tokens: Some(1), temperature: 0.0, ignore_end: true, ..Sampling::default() };
    let request = super::Request {
        prompt: vec![0],
        sampling,
        constraint: None,
        adapter: super::models::NO_ADAPTER,
        root: None,
        decoder: language.decoder(false),
        sink: Box::new(Probe(Some(sender))),
        client: 0,
        priority: 0,
        deadline: None,
        urgent: true,
    };
    engine.submit(vec![request]).is_ok() && receiver.await.unwrap_or(false)
}
