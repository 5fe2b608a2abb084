//! Adapters on disk.

use pyo3::prelude::*;

use crate::error::{Error, Result};
use crate::serve::prefix::root;
use crate::serve::{Fetched, Shelf};

/// The adapters on disk, which Python reads.
pub(super) struct PythonShelf {
    pub(super) step: Py<PyAny>,
    /// The content of the base model.
    pub(super) base: String,
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
