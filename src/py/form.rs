//! Bindings of adapters in pages.

use pyo3::prelude::*;

use super::tensor::Memory;
use crate::decoder::pages::{Form, Numbers, Pair, Place};
use crate::error::Error;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<LoraForm>()
}

/// (layer, (rows of B, columns of A), rank, factor, A's and B's numbers in the file: their sort and first byte).
type GivenPair = (usize, (usize, usize), usize, f32, (String, usize), (String, usize));
/// (layer, (rows of B, columns of A), rank, factor, A's and Bᵀ's place in pages).
type ShownPair = (usize, (usize, usize), usize, f32, (usize, usize), (usize, usize));

/// What adapters of one shape have in common: where their files have the matrices, and where pages do.
#[pyclass(module = "ftkit._core", frozen)]
pub(super) struct LoraForm(pub(super) Form);

#[pymethods]
impl LoraForm {
    /// None where pages cannot hold them.
    #[staticmethod]
    fn of(pairs: Vec<GivenPair>, page_bytes: usize) -> PyResult<Option<Self>> {
        let pair = |(linear, (outputs, inputs), rank, scale, a, b): GivenPair| -> PyResult<Pair> {
            Ok(Pair { linear, outputs, inputs, rank, scale, a: source(a)?, b: source(b)? })
        };
        let pairs = pairs.into_iter().map(pair).collect::<PyResult<_>>()?;
        Ok(Form::new(pairs, page_bytes).map(Self))
    }

    /// Pages that an adapter takes.
    #[getter]
    fn pages(&self) -> usize {
        self.0.pages()
    }

    /// Each LoRA and its places.
    #[getter]
    fn pairs(&self) -> Vec<ShownPair> {
        let place = |place: Place| (place.page, place.at);
        let pairs = self.0.pairs().iter();
        let shown = pairs.map(|&(pair, [a, b])| {
            (pair.linear, (pair.outputs, pair.inputs), pair.rank, pair.scale, place(a), place(b))
        });
        shown.collect()
    }

    /// Writes an adapter from its file's bytes to `pages` uint8 [pages, bytes of a page]; whether it is all there and
    /// finite.
    fn write(&self, py: Python<'_>, file: &[u8], pages: &Bound<'_, PyAny>) -> PyResult<bool> {
        let pages = Memory::<u8>::of("pages", pages)?;
        // SAFETY: the caller's tensor lives during the call and is given to be written.
        let pages = unsafe { pages.slice_mut() };
        Ok(py.detach(|| self.0.write(file, pages))?)
    }
}

fn source((sort, at): (String, usize)) -> PyResult<(Numbers, usize)> {
    let numbers = match sort.as_str() {
        "F32" => Numbers::F32,
        "F16" => Numbers::F16,
        "BF16" => Numbers::BF16,
        other => return Err(Error::failure(format!("numbers: expected F32, F16 or BF16, got {other}")).into()),
    };
    Ok((numbers, at))
}
