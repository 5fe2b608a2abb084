//! The bindings: one file or folder a room, and one place where errors become exceptions.

use pyo3::prelude::*;

mod data;
mod decoder;
mod errors;
mod form;
mod gguf;
mod optim;
mod plan;
mod quant;
mod serve;
mod tensor;
mod text;
mod training;

/// The Python module `ftkit._core`.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    text::register(module)?;
    data::register(module)?;
    gguf::register(module)?;
    quant::register(module)?;
    decoder::register(module)?;
    form::register(module)?;
    optim::register(module)?;
    plan::register(module)?;
    training::register(module)?;
    serve::register(module)?;
    // pyo3 keeps an `__all__` of its own; what is public is said once, in `_core.pyi`.
    module.delattr("__all__")
}
