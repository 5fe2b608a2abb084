//! A port.

use std::net::TcpListener;
use std::sync::Mutex;

use pyo3::prelude::*;

use crate::serve::http;

/// A port that is taken already, for a server that starts later.
#[pyclass(module = "ftkit._core", frozen)]
pub(super) struct Listener {
    pub(super) socket: Mutex<Option<TcpListener>>,
    #[pyo3(get)]
    url: String,
    pub(super) host: String,
    #[pyo3(get)]
    pub(super) loopback: bool,
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
