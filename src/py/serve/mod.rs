//! Bindings of the `serve` room: the engine whose step is a Python function, and the server.

use std::path::PathBuf;

use pyo3::prelude::*;

use crate::error::Error;
use crate::serve::{Sampler, Sampling, http};

mod author;
mod desk;
mod engine;
mod listener;
mod shelf;
mod step;
mod stream;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<engine::Engine>()?;
    module.add_class::<stream::Stream>()?;
    module.add_class::<listener::Listener>()?;
    module.add_class::<author::Pen>()?;
    module.add_function(wrap_pyfunction!(sampling_probabilities, module)?)?;
    module.add_function(wrap_pyfunction!(hashed_key, module)?)?;
    module.add_function(wrap_pyfunction!(content_hash, module)?)?;
    Ok(())
}

#[pyfunction]
fn hashed_key(key: &str) -> String {
    http::keys::hashed(key)
}

/// The hash of a file's content.
#[pyfunction]
fn content_hash(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    let mut hasher = blake3::Hasher::new();
    py.detach(|| hasher.update_mmap(&path).map(|hasher| hasher.finalize().to_hex().to_string()))
        .map_err(|error| Error::io(&path, &error).into())
}

#[pyfunction]
#[pyo3(signature = (logits, sampling, prompt = Vec::new(), generated = Vec::new()))]
fn sampling_probabilities(
    logits: Vec<f32>,
    sampling: &str,
    prompt: Vec<u32>,
    generated: Vec<u32>,
) -> PyResult<Vec<(u32, f64)>> {
    let sampling = Sampling::from_json(sampling)?;
    sampling.check(logits.len())?;
    let mut sampler = Sampler::new(sampling, &prompt, None);
    for token in generated {
        sampler.accept(token)?;
    }
    Ok(sampler.probabilities(&logits)?)
}
