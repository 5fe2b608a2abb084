//! The HTTP side: routes that generate in the words of several APIs, models, what is managed (`manage`), health, metrics,
//! and a page to chat with.
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
mod health;
pub mod keys;
mod listen;
mod log;
mod manage;
mod meter;
mod multipart;
mod ollama;
mod openai;
mod openapi;
mod page;
mod parse;
mod patient;
mod responses;
mod stream;
mod tools;
mod upload;

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use rand::Rng;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio_stream::StreamExt;

pub use self::listen::{bind, url};

use self::errors::ApiError;
use self::keys::{Key, Ring};
use self::meter::Caller;
use super::models::{Model, Models};
use super::names::Names;
use super::{Author, Desk, Engine, Language, Traffic};
use crate::{Error, Result};

/// A request's body must come within this time.
const BODY: Duration = Duration::from_secs(60);
/// Uploads at the same time.
const UPLOADS: usize = 4;
/// Answers with retrieval at the same time.
const AUTHORED: usize = 64;

/// How to serve.
pub struct Settings {
    /// The name that the server was told to bind to.
    pub host: String,
    /// Whether that is this machine only.
    pub loopback: bool,
    /// The key that requests must bring.
    pub api_key: Option<String>,
    /// More keys, which may change.
    pub keys: Arc<Ring>,
    /// Most bytes of a request's body.
    pub body_bytes: usize,
    /// Time in which an answer's first token is due; a request that can't have it by then is refused.
    pub first_token: Option<Duration>,
    /// Most bytes of a file.
    pub upload_bytes: u64,
    /// The model that answers requests which name none, and that is listed first.
    pub model: String,
    /// Names for names.
    pub names: Arc<Names>,
    /// Answers and tokens by key and model.
    pub traffic: Arc<Traffic>,
    /// Who manages adapters, files and jobs.
    pub desk: Option<Arc<dyn Desk>>,
    /// Who writes answers to conversations, where somebody does.
    pub author: Option<Arc<dyn Author>>,
    /// A file that gets a line for each answer; `-` is standard error.
    pub access_log: Option<PathBuf>,
    /// The engine is stuck when a step takes longer.
    pub stuck_after: Duration,
}

/// What the routes share.
struct App {
    engine: Engine,
    language: Arc<dyn Language>,
    models: Arc<Models>,
    names: Arc<Names>,
    traffic: Arc<Traffic>,
    settings: Settings,
    keys: Arc<Ring>,
    /// Who asks where there are no keys.
    anonymous: Arc<Key>,
    log: Option<log::Log>,
    uploads: Arc<Semaphore>,
    /// Answers that are written by the author at the same time, each by a thread that waits most of the time.
    authored: Arc<Semaphore>,
    checks: health::Checks,
}

impl App {
    /// All models that a key may ask for, the one that answers where none is named first. Generations of an adapter go
    /// by the adapter's name.
    fn sorted(&self, key: &Key) -> Vec<Model> {
        let mut models = self.models.list();
        let aliases = self.names.list();
        models.retain(|model| !model.name.contains('@') && !aliases.contains(&model.name));
        for name in aliases {
            let target = self.models.find(Some(&self.names.resolve(&name, |_| 0).model));
            models.extend(target.map(|target| Model { name, ..target }));
        }
        models.retain(|model| key.may(&model.name));
        models.sort_by_key(|model| model.name != self.settings.model);
        models
    }

    /// The model of a name, or the one that answers where none is given, and what it is made of. Its name is what the
    /// answer calls it. Ollama's clients may add a tag to the name.
    fn model(&self, key: &Key, name: Option<&str>) -> Result<(Model, Option<String>), ApiError> {
        let name = name.unwrap_or(&self.settings.model);
        let find = |name: &str| {
            // An adapter may be replaced between the two look-ups: its name then leads to the next one.
            let found = (0..3).find_map(|_| {
                let resolved = self.names.resolve(name, |below| rand::rng().random_range(0..below.max(1)));
                let model = self.models.find(Some(&resolved.model))?;
                let fingerprint = self.names.fingerprint(&resolved.model);
                Some((Model { name: resolved.shown, ..model }, fingerprint))
            });
            found.filter(|_| key.may(name))
        };
        find(name).or_else(|| find(name.strip_suffix(":latest")?)).ok_or_else(|| {
            let known: Vec<String> = self.sorted(key).into_iter().map(|model| model.name).collect();
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
    ) -> Result<Self> {
        let keys = Arc::clone(&settings.keys);
        if let Some(text) = &settings.api_key {
            keys.add(Key::only(text));
        }
        let log = settings.access_log.as_deref().map(log::open).transpose()?;
        let app = App {
            engine,
            language,
            models,
            names: Arc::clone(&settings.names),
            traffic: Arc::clone(&settings.traffic),
            keys,
            anonymous: Arc::new(Key::anonymous(settings.loopback)),
            log,
            uploads: Arc::new(Semaphore::new(UPLOADS)),
            authored: Arc::new(Semaphore::new(AUTHORED)),
            checks: health::Checks::default(),
            settings,
        };
        Ok(Self { listener, app: Arc::new(app) })
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
            if let Some(desk) = self.app.settings.desk.clone() {
                let mut leaving = stopped.clone();
                tokio::spawn(async move {
                    // A job ends while answers do, and not after them.
                    if leaving.changed().await.is_ok() {
                        let _ = tokio::task::spawn_blocking(move || desk.call("server.leaving", &json!({}))).await;
                    }
                });
            }
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
        .route("/api/tags", get(tags))
        .route("/api/show", post(show))
        .route("/api/version", get(|| async { Json(json!({"version": env!("CARGO_PKG_VERSION")})) }))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .merge(manage::routes())
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/openapi.json", get(openapi::document))
        .route("/metrics", get(metrics))
        .route("/markdown", post(markdown))
        .route("/", get(page::page))
        .route("/page/{name}", get(page::part))
        .fallback(|request: Request| async move { ApiError::no_route(request.uri().path()) })
        .method_not_allowed_fallback(|| async { ApiError::method() })
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&app), guard::guard))
        .with_state(app)
}

/// A route that generates: its API reads the body, and words the answer.
fn generates(parse: complete::Parse) -> axum::routing::MethodRouter<Arc<App>> {
    post(move |State(app): State<Arc<App>>, Extension(caller): Extension<Caller>, body: Body| async move {
        let body = read(body, app.settings.body_bytes).await?;
        complete::complete(app, caller, body, parse).await
    })
}

type Asking = Extension<Caller>;

async fn count(State(app): State<Arc<App>>, caller: Asking, body: Body) -> Result<Json<Value>, ApiError> {
    let body = read(body, app.settings.body_bytes).await?;
    complete::count(app, caller.0, body).await
}

async fn embeddings(State(app): State<Arc<App>>, caller: Asking, body: Body) -> Result<Json<Value>, ApiError> {
    let body = read(body, app.settings.body_bytes).await?;
    embeddings::embeddings(app, caller.0, body).await
}

async fn show(State(app): State<Arc<App>>, caller: Asking, body: Body) -> Result<Json<Value>, ApiError> {
    let body = read(body, app.settings.body_bytes).await?;
    ollama::show(&app, &caller, &body)
}

async fn tags(State(app): State<Arc<App>>, caller: Asking) -> Json<Value> {
    ollama::tags(&app, &caller)
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

/// A model as clients list it; what has an adapter has a parent.
fn shown(app: &App, model: &Model) -> Value {
    let base = app.models.find(None).filter(|base| base.adapter != model.adapter).map(|base| base.name);
    json!({"id": model.name, "object": "model", "created": model.created, "owned_by": "ftkit", "parent": base})
}

async fn models(State(app): State<Arc<App>>, caller: Asking) -> Json<Value> {
    Json(
        json!({"object": "list", "data": app.sorted(&caller.key).iter().map(|model| shown(&app, model)).collect::<Vec<_>>()}),
    )
}

async fn model(
    State(app): State<Arc<App>>,
    caller: Asking,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::no_model("?", "the names of /v1/models"))?;
    let (found, _) = app.model(&caller.key, Some(&name))?;
    Ok(Json(shown(&app, &Model { name, ..found })))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let mut text = app.engine.metrics().prometheus();
    text.push_str(&app.traffic.prometheus());
    let mut response = text.into_response();
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
