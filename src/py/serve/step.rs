//! The model's step.

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::decoder::attention::Rows;
use crate::decoder::step::Tokens;
use crate::error::{Error, Result};
use crate::py::decoder::DecoderStep;
use crate::py::tensor::Memory;
use crate::serve::models::NO_ADAPTER;
use crate::serve::{Batch, Step};

/// The model's step: one call into the core where the model can be computed so, and otherwise a Python function over
/// tensors that Python made.
pub(super) struct PythonStep {
    pub(super) step: Py<PyAny>,
    /// i32 tensors: tokens, positions, cu_seqlens, adapter, block table, rows.
    pub(super) workspace: [Py<PyAny>; 6],
    /// Whether a smaller model makes drafts.
    pub(super) drafts: bool,
}

impl Step for PythonStep {
    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<()> {
        if batch.embeds {
            return Python::attach(|py| self.call(py, "hidden", batch, logits)).map_err(|error| failed(&error));
        }
        self.compute(("whole", "__call__"), batch, logits)?;
        if !self.drafts {
            return Ok(());
        }
        let same = Batch { adapter: vec![NO_ADAPTER; batch.sequences()], rows: Vec::new(), ..batch.clone() };
        self.draft(&same, &mut Vec::new())
    }

    fn draft(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<()> {
        self.compute(("whole_draft", "draft"), batch, logits)
    }

    fn install(&mut self, adapter: i32, pages: &[u32]) -> Result<()> {
        let install = |py: Python<'_>| self.step.call_method1(py, "install", (adapter, pages.to_vec())).map(drop);
        Python::attach(install).map_err(|error| failed(&error))
    }

    fn evict(&mut self, adapter: i32) {
        // It does nothing that could fail; if it did, the pages would still not be read under the adapter again.
        let _ = Python::attach(|py| self.step.call_method1(py, "evict", (adapter,)).map(drop));
    }
}

fn failed(error: &PyErr) -> Error {
    Python::attach(|py| match error.value(py).str() {
        Ok(text) => {
            let kind = error.get_type(py).name().map_or_else(|_| String::new(), |name| name.to_string());
            Error::failure(format!("the model's step failed: {kind}: {text}"))
        }
        Err(_) => Error::failure("the model's step failed"),
    })
}

impl PythonStep {
    /// By the core where the step is one of its own and knows the adapters, else by a method.
    fn compute(&self, (whole, method): (&str, &str), batch: &Batch, logits: &mut Vec<f32>) -> Result<()> {
        let found =
            |py: Python<'_>| -> PyResult<Option<Py<DecoderStep>>> { Ok(self.step.bind(py).getattr(whole)?.extract()?) };
        match Python::attach(found).map_err(|error| failed(&error))? {
            Some(whole) if whole.get().all_known(&batch.adapter) => {
                let step = whole.get();
                logits.resize(batch.rows.len() * step.vocabulary(), 0.0);
                let rows = Rows {
                    positions: &batch.positions,
                    cu_seqlens: &batch.cu_seqlens,
                    block_table: &batch.block_table,
                };
                let tokens = Tokens { tokens: &batch.tokens, rows, adapters: &batch.adapter, wanted: &batch.rows };
                step.compute(tokens, logits)
            }
            _ => Python::attach(|py| self.call(py, method, batch, logits)).map_err(|error| failed(&error)),
        }
    }

    fn call(&self, py: Python<'_>, method: &str, batch: &Batch, logits: &mut Vec<f32>) -> PyResult<()> {
        let parts = [
            ("tokens", &batch.tokens),
            ("positions", &batch.positions),
            ("cu_seqlens", &batch.cu_seqlens),
            ("adapter", &batch.adapter),
            ("block_table", &batch.block_table),
            ("rows", &batch.rows),
        ];
        for ((name, values), tensor) in parts.into_iter().zip(&self.workspace) {
            let memory = Memory::<i32>::of(name, tensor.bind(py))?;
            if values.len() > memory.len {
                let message = format!("{name}: expected room for {} numbers, got {}", values.len(), memory.len);
                return Err(Error::failure(message).into());
            }
            // SAFETY: this object keeps the tensor alive, and the step that reads it has not been called yet.
            unsafe { memory.slice_mut()[..values.len()].copy_from_slice(values) };
        }
        let lengths = PyTuple::new(py, batch.cu_seqlens.windows(2).map(|ends| ends[1] - ends[0]))?;
        let adapters = PyTuple::new(py, &batch.adapter)?;
        let sizes = (batch.tokens.len(), batch.blocks, batch.rows.len(), lengths, adapters);
        let result = self.step.call_method1(py, method, sizes)?;
        let memory = Memory::<f32>::of("result", result.bind(py))?;
        // SAFETY: `result` keeps the tensor alive, and nobody else has it.
        let values = unsafe { memory.slice() };
        py.detach(|| logits.extend_from_slice(values));
        Ok(())
    }
}
