//! Where the core's errors become Python exceptions.

use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::error::{Error, ErrorKind};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::attach(|py| {
            let class = match error.kind {
                ErrorKind::Input => "InputError",
                ErrorKind::Failure | ErrorKind::Busy => "FtkitError",
            };
            let made = py
                .import("ftkit.errors")
                .and_then(|module| module.getattr(class))
                .and_then(|class| Ok(class.cast_into::<PyType>()?))
                .map(|class| PyErr::from_type(class, (error.message, error.hint)));
            made.unwrap_or_else(|failure| failure)
        })
    }
}
