//! `POST /v1/files`: a form with a file, to disk as it comes, checked row by row before it counts.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::{Extension, Json};
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use super::App;
use super::errors::ApiError;
use super::manage::call;
use super::meter::Caller;
use super::multipart;
use crate::data;

/// A whole upload, and the time between two pieces of it.
const WHOLE: Duration = Duration::from_secs(30 * 60);
const BETWEEN: Duration = Duration::from_secs(20);
/// Bytes of a form beside its file.
const FORM: u64 = 64 * 1024;

/// A temporary file that goes when it is not kept.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Takes a file.
pub(super) async fn file(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let Some(boundary) = multipart::boundary(kind) else {
        return Err(ApiError::request("content-type: expected multipart/form-data with a boundary, got another"));
    };
    let Ok(_place) = Arc::clone(&app.uploads).try_acquire_owned() else {
        return Err(ApiError::busy(5, "expected fewer uploads at the same time, got one more"));
    };
    let begun = call(&app, "files.begin", json!({})).await?;
    let (folder, limit) = (PathBuf::from(begun["folder"].as_str().unwrap_or_default()), app.settings.upload_bytes);
    let name = format!(".tmp-upload-{:032x}", rand::random::<u128>());
    let form = Temporary(folder.join(&name));
    let received = tokio::time::timeout(WHOLE, receive(&form.0, body, limit)).await;
    received.map_err(|_| ApiError::slow(WHOLE.as_secs()))??;
    let content = Temporary(folder.join(format!("{name}-content.jsonl")));
    let paths = (form.0.clone(), content.0.clone());
    let taken = tokio::task::spawn_blocking(move || take(&paths.0, &paths.1, &boundary, limit)).await;
    let mut file = taken.map_err(|_| ApiError::server("the file could not be read"))??;
    file["path"] = content.0.to_string_lossy().into();
    file["caller"] = caller.key.name.as_str().into();
    // The desk gives it its place; what is left here then is nothing.
    call(&app, "files.create", file).await.map(Json)
}

fn failed(error: &std::io::Error) -> ApiError {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            ApiError::of_status(507, "expected room for this file, got a full disk")
        }
        _ => ApiError::server(format!("the file could not be written: {error}")),
    }
}

/// Writes the body to disk as it comes.
async fn receive(path: &Path, body: Body, limit: u64) -> Result<(), ApiError> {
    let mut file = File::create_new(path).map_err(|error| failed(&error))?;
    let (mut frames, mut count) = (body.into_data_stream(), 0);
    loop {
        let next = tokio::time::timeout(BETWEEN, frames.next()).await;
        let Some(frame) = next.map_err(|_| ApiError::slow(BETWEEN.as_secs()))? else { return Ok(()) };
        let frame = frame.map_err(|error| ApiError::request(format!("body: expected all of it, got {error}")))?;
        count += frame.len() as u64;
        if count > limit + FORM {
            return Err(ApiError::too_large(limit as usize));
        }
        tokio::task::block_in_place(|| file.write_all(&frame)).map_err(|error| failed(&error))?;
    }
}

/// Reads the form, and writes the file in it to a place of its own.
fn take(form: &Path, content: &Path, boundary: &str, limit: u64) -> Result<Value, ApiError> {
    let file = File::open(form).map_err(|error| failed(&error))?;
    if file.metadata().map_err(|error| failed(&error))?.len() == 0 {
        return Err(ApiError::request("body: expected a form with a file, got nothing"));
    }
    // SAFETY: the file is this request's own, in a folder that is the server's alone; nobody changes it.
    let body = unsafe { memmap2::Mmap::map(&file) }.map_err(|error| failed(&error))?;
    let parts = multipart::parts(&body, boundary)
        .map_err(|expected| ApiError::request(format!("body: expected {expected}, got another form")))?;
    let (mut found, mut purpose) = (None, None);
    for part in parts {
        match part.name.as_str() {
            "file" if found.is_none() => found = Some((part.filename.unwrap_or_default(), part.content)),
            "purpose" if purpose.is_none() && part.content.len() < 100 => {
                purpose = Some(String::from_utf8_lossy(part.content).into_owned());
            }
            "file" | "purpose" => return Err(ApiError::request(format!("{}: expected it once", part.name))),
            // The time after which a file may go, which here stays until it is deleted.
            "expires_after" | "expires_after[anchor]" | "expires_after[seconds]" => {}
            other => return Err(ApiError::unknown(other)),
        }
    }
    let Some((filename, bytes)) = found else {
        return Err(ApiError::field("file", "a file", "nothing"));
    };
    if bytes.len() as u64 > limit {
        return Err(ApiError::too_large(limit as usize));
    }
    match purpose.as_deref() {
        Some("fine-tune") => {}
        Some(_) => return Err(ApiError::field("purpose", "\"fine-tune\"", "another")),
        None => return Err(ApiError::field("purpose", "\"fine-tune\"", "nothing")),
    }
    let mut to = File::create_new(content).map_err(|error| failed(&error))?;
    to.write_all(bytes).and_then(|()| to.sync_all()).map_err(|error| failed(&error))?;
    let checked = data::check(content)?;
    if !checked.problems.is_empty() {
        let shown = checked.problems.join("; ");
        let message = format!("file: expected JSONL to train on, got {} bad rows: {shown}", checked.bad_rows);
        return Err(ApiError::invalid_file(message));
    }
    let name: String = filename.rsplit(['/', '\\']).next().unwrap_or_default().chars().take(200).collect();
    Ok(json!({
        "filename": name, "bytes": bytes.len(), "rows": checked.rows, "kind": checked.kind,
        "hash": blake3::hash(bytes).to_hex().to_string(),
    }))
}
