//! What a server keeps and does besides answering: adapters, files, training jobs, feedback.

use serde_json::Value;

/// Somebody who can be asked; see `python/ftkit/serve/desk.py`.
pub trait Desk: Send + Sync {
    /// Does `what`, such as `files.create`, with `arguments`. Called on threads that may wait.
    fn call(&self, what: &str, arguments: &Value) -> Result<Value, Refusal>;
}

/// Why something was not done, in the words of an HTTP answer.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The status: 400, 404, 409, 413, 500 …
    pub status: u16,
    /// What is wrong, expected and got.
    pub message: String,
    /// The field that is wrong, if it is one.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<String>,
}
