//! The access log: a line of JSON for every answer, without a word of what was asked or answered.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use serde_json::json;

use crate::serve::models::now;
use crate::{Error, Result};

/// Where lines go.
pub(super) type Log = Arc<Mutex<Box<dyn Write + Send>>>;

/// Opens a log; `-` is standard error.
pub(super) fn open(path: &Path) -> Result<Log> {
    let to: Box<dyn Write + Send> = if path.as_os_str() == "-" {
        Box::new(std::io::stderr())
    } else {
        let options = OpenOptions::new().append(true).create(true).open(path);
        Box::new(options.map_err(|error| Error::io(path, &error))?)
    };
    Ok(Arc::new(Mutex::new(to)))
}

/// One answer; its line is written when the last who works on it is done, a stream included.
pub(super) struct Record {
    log: Option<Log>,
    start: Instant,
    /// The answer's id, also in its header `x-request-id`.
    pub id: String,
    method: String,
    path: String,
    status: AtomicU16,
    key: OnceLock<String>,
    model: OnceLock<String>,
    prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
}

impl Record {
    /// A record of a request that came now. `path` is without the query.
    pub fn new(log: Option<&Log>, id: String, method: &str, path: &str) -> Self {
        Self {
            log: log.cloned(),
            start: Instant::now(),
            id,
            method: method.to_owned(),
            // A long path is no route of ours.
            path: path.chars().take(200).collect(),
            status: AtomicU16::new(0),
            key: OnceLock::new(),
            model: OnceLock::new(),
            prompt_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
        }
    }

    /// Notes the answer's status.
    pub fn status(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }

    /// Notes who asked.
    pub fn key(&self, name: &str) {
        let _ = self.key.set(name.to_owned());
    }

    /// Notes who answers.
    pub fn model(&self, name: &str) {
        let _ = self.model.set(name.to_owned());
    }

    /// Adds what a choice cost.
    pub fn tokens(&self, prompt: u64, generated: u64) {
        self.prompt_tokens.fetch_add(prompt, Ordering::Relaxed);
        self.generated_tokens.fetch_add(generated, Ordering::Relaxed);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let Some(log) = &self.log else { return };
        let line = json!({
            "time": now(), "id": self.id, "method": self.method, "path": self.path,
            "status": self.status.load(Ordering::Relaxed), "milliseconds": self.start.elapsed().as_millis() as u64,
            "key": self.key.get(), "model": self.model.get(),
            "prompt_tokens": self.prompt_tokens.load(Ordering::Relaxed),
            "generated_tokens": self.generated_tokens.load(Ordering::Relaxed),
        });
        // A log that cannot be written is no reason to refuse an answer.
        let _ = writeln!(log.lock().unwrap_or_else(PoisonError::into_inner), "{line}");
    }
}
