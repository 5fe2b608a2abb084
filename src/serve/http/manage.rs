//! Routes of what the server keeps: adapters, aliases, files, fine-tuning jobs, feedback. The desk does the work; here
//! are bodies, bounds and statuses.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Extension, Json, Router};
use serde_json::{Value, json};

use super::App;
use super::errors::ApiError;
use super::fields::Fields;
use super::meter::Caller;
use super::upload;

/// A file is sent in pieces of this many bytes.
const PIECE: usize = 256 * 1024;

type Asked = Result<Query<BTreeMap<String, String>>, QueryRejection>;
type Named = Result<Path<String>, PathRejection>;

/// All of them.
pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/adapters", lists("adapters.list").merge(takes("adapters.load")))
        .route("/v1/adapters/{name}", shows("adapters.retrieve").merge(deletes("adapters.delete")))
        .route("/v1/adapters/{name}/rollback", takes_of("adapters.rollback"))
        .route("/v1/aliases", lists("aliases.list").merge(takes("aliases.set")))
        .route("/v1/aliases/{name}", shows("aliases.retrieve").merge(deletes("aliases.delete")))
        .route("/v1/files", lists("files.list").merge(post(upload::file)))
        .route("/v1/files/{id}", shows("files.retrieve").merge(deletes("files.delete")))
        .route("/v1/files/{id}/content", get(content))
        .route("/v1/fine_tuning/jobs", lists("jobs.list").merge(takes("jobs.create")))
        .route("/v1/fine_tuning/jobs/{id}", shows("jobs.retrieve"))
        .route("/v1/fine_tuning/jobs/{id}/cancel", takes_of("jobs.cancel"))
        .route("/v1/fine_tuning/jobs/{id}/pause", takes_of("jobs.pause"))
        .route("/v1/fine_tuning/jobs/{id}/resume", takes_of("jobs.resume"))
        .route("/v1/fine_tuning/jobs/{id}/events", shows("jobs.events"))
        .route("/v1/fine_tuning/jobs/{id}/checkpoints", shows("jobs.checkpoints"))
        .route("/v1/feedback", lists("feedback.count").merge(takes("feedback.create")))
}

fn lists(what: &'static str) -> MethodRouter<Arc<App>> {
    get(move |State(app): State<Arc<App>>, caller: Extension<Caller>, query: Asked| {
        ask(app, caller, what, None, query, None)
    })
}

fn shows(what: &'static str) -> MethodRouter<Arc<App>> {
    get(move |State(app): State<Arc<App>>, caller: Extension<Caller>, name: Named, query: Asked| {
        ask(app, caller, what, Some(name), query, None)
    })
}

fn deletes(what: &'static str) -> MethodRouter<Arc<App>> {
    axum::routing::delete(move |State(app): State<Arc<App>>, caller: Extension<Caller>, name: Named| {
        ask(app, caller, what, Some(name), Ok(Query(BTreeMap::new())), None)
    })
}

fn takes(what: &'static str) -> MethodRouter<Arc<App>> {
    post(move |State(app): State<Arc<App>>, caller: Extension<Caller>, body: Body| {
        ask(app, caller, what, None, Ok(Query(BTreeMap::new())), Some(body))
    })
}

/// As `takes`, of something that has a name; the body may be missing.
fn takes_of(what: &'static str) -> MethodRouter<Arc<App>> {
    post(move |State(app): State<Arc<App>>, caller: Extension<Caller>, name: Named, body: Body| {
        ask(app, caller, what, Some(name), Ok(Query(BTreeMap::new())), Some(body))
    })
}

async fn ask(
    app: Arc<App>,
    Extension(caller): Extension<Caller>,
    what: &'static str,
    name: Option<Named>,
    query: Asked,
    body: Option<Body>,
) -> Result<Json<Value>, ApiError> {
    let mut arguments = json!({"caller": caller.key.name, "admin": caller.key.admin});
    let named = name.is_some();
    if let Some(name) = name {
        let Path(name) = name.map_err(|_| ApiError::request("path: expected a name in UTF-8"))?;
        arguments["name"] = name.into();
    }
    let Query(query) = query.map_err(|_| ApiError::request("query: expected name=value, got another"))?;
    arguments["query"] = json!(query);
    if let Some(body) = body {
        let body = super::read(body, app.settings.body_bytes).await?;
        let empty = named && body.trim_ascii().is_empty();
        arguments["body"] = if empty { json!({}) } else { Fields::parse(&body)?.rest() };
    }
    call(&app, what, arguments).await.map(Json)
}

/// Asks the desk.
pub(super) async fn call(app: &Arc<App>, what: &'static str, arguments: Value) -> Result<Value, ApiError> {
    let Some(desk) = app.settings.desk.clone() else {
        return Err(ApiError::unavailable("this server keeps nothing: it was started without a state directory"));
    };
    let done = tokio::task::spawn_blocking(move || desk.call(what, &arguments)).await;
    Ok(done.map_err(|_| ApiError::server("the request could not be done"))??)
}

/// A file's content, in pieces.
async fn content(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    name: Named,
) -> Result<Response, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::request("path: expected a name in UTF-8"))?;
    let found = call(&app, "files.content", json!({"name": name, "caller": caller.key.name})).await?;
    // The desk's own path: no part of it is the client's.
    let path = found["path"].as_str().unwrap_or_default().to_owned();
    let file = tokio::task::spawn_blocking(move || std::fs::File::open(path)).await;
    let mut file = file.ok().and_then(Result::ok).ok_or_else(|| ApiError::server("the file could not be read"))?;
    let pieces = std::iter::from_fn(move || {
        use std::io::Read;
        let mut piece = vec![0; PIECE];
        match file.read(&mut piece) {
            Ok(0) => None,
            Ok(count) => {
                piece.truncate(count);
                Some(Ok(piece))
            }
            Err(error) => Some(Err(error)),
        }
    });
    let mut response = Body::from_stream(tokio_stream::iter(pieces)).into_response();
    let kind = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}
