//! Who manages what a server keeps, as a Python function.

use pyo3::prelude::*;
use serde_json::Value;

use crate::error::Result;
use crate::serve::{Desk, Refusal};

/// A desk that is a Python function: `(what, arguments as JSON) -> answer as JSON`.
pub(super) struct PythonDesk(pub(super) Py<PyAny>);

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
