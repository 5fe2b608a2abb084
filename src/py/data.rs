//! Bindings of the `data` room.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::tensor::Memory;
use super::text::{ChatTemplate, Tokenizer};
use crate::data::{Arrays, Cache, Encoder, Part, Settings, prepare};
use crate::error::Error;

/// A prepared dataset: sequences of tokens in a memory-mapped cache.
#[pyclass(frozen, module = "ftkit._core")]
struct PreparedData {
    cache: Arc<Cache>,
    #[pyo3(get)]
    problems: Vec<String>,
}

#[pymethods]
impl PreparedData {
    fn __len__(&self) -> usize {
        self.cache.sequences().len()
    }

    #[getter]
    fn fingerprint(&self) -> &str {
        &self.cache.key
    }

    #[getter]
    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counts = &self.cache.statistics;
        let table = PyDict::new(py);
        for (name, count) in [
            ("rows", counts.rows),
            ("bad_rows", counts.bad_rows),
            ("truncated_rows", counts.truncated_rows),
            ("split_rows", counts.split_rows),
            ("masked_rows", counts.masked_rows),
            ("duplicate_rows", counts.duplicate_rows),
            ("pairs", counts.pairs),
            ("labelled", counts.labelled),
            ("wanted", counts.wanted),
            ("explained", counts.explained),
            ("chosen_tokens", counts.chosen_tokens),
            ("rejected_tokens", counts.rejected_tokens),
            ("sequences", counts.sequences),
            ("tokens", counts.tokens),
            ("trained_tokens", counts.trained_tokens),
            ("longest_row", counts.longest_row),
        ] {
            table.set_item(name, count)?;
        }
        Ok(table)
    }

    #[getter]
    fn tasks(&self) -> Vec<String> {
        self.cache.tasks.clone()
    }

    fn lengths(&self) -> Vec<u32> {
        self.cache.sequences().iter().map(|sequence| sequence.length).collect()
    }

    fn sequence(&self, index: usize) -> PyResult<(Vec<u32>, Vec<bool>)> {
        let count = self.cache.sequences().len();
        let sequence = self
            .cache
            .sequences()
            .get(index)
            .ok_or_else(|| Error::failure(format!("expected a sequence below {count}, got {index}")))?;
        Ok(self.cache.tokens(sequence).unzip())
    }

    #[pyo3(signature = (room, seed, held_out, together=1, share=false))]
    fn split(
        &self,
        py: Python<'_>,
        room: u32,
        seed: u64,
        held_out: f64,
        together: usize,
        share: bool,
    ) -> (PackedRows, Option<PackedRows>) {
        let (train, evaluation) = py.detach(|| Part::split(&self.cache, room, seed, held_out, together, share));
        (PackedRows { part: train }, evaluation.map(|part| PackedRows { part }))
    }
}

/// Packed rows of a dataset, or of its held-out part.
#[pyclass(frozen, module = "ftkit._core")]
struct PackedRows {
    part: Part,
}

#[pymethods]
impl PackedRows {
    fn __len__(&self) -> usize {
        self.part.len()
    }

    #[getter]
    fn units(&self) -> usize {
        self.part.units()
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.part.tokens()
    }

    #[getter]
    fn fill(&self) -> f64 {
        self.part.fill()
    }

    fn order(&self, py: Python<'_>, seed: u64, number: u64) -> Vec<usize> {
        py.detach(|| self.part.order(seed, number))
    }

    #[expect(clippy::needless_pass_by_value, reason = "a list from Python has no other form")]
    fn lengths(&self, rows: Vec<usize>) -> PyResult<Vec<u32>> {
        Ok(self.part.lengths(&rows)?)
    }

    #[expect(clippy::needless_pass_by_value, reason = "a list from Python has no other form")]
    fn shared(&self, rows: Vec<usize>) -> PyResult<Vec<u32>> {
        Ok(self.part.shared(&rows)?)
    }

    fn trained(&self, py: Python<'_>, rows: Vec<usize>) -> PyResult<usize> {
        Ok(py.detach(|| self.part.trained(&rows))?)
    }

    #[expect(clippy::needless_pass_by_value, reason = "a list from Python has no other form")]
    fn sizes(&self, rows: Vec<usize>) -> PyResult<(usize, usize)> {
        Ok(self.part.sizes(&rows)?)
    }

    #[expect(clippy::too_many_arguments, reason = "one for each array of the batch")]
    #[expect(clippy::needless_pass_by_value, reason = "a list from Python has no other form")]
    fn write(
        &self,
        py: Python<'_>,
        rows: Vec<usize>,
        tokens: &Bound<'_, PyAny>,
        targets: &Bound<'_, PyAny>,
        positions: &Bound<'_, PyAny>,
        cu_seqlens: &Bound<'_, PyAny>,
        group: &Bound<'_, PyAny>,
        task: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let tokens = Memory::<i32>::of("tokens", tokens)?;
        let targets = Memory::<i32>::of("targets", targets)?;
        let positions = Memory::<i32>::of("positions", positions)?;
        let cu_seqlens = Memory::<i32>::of("cu_seqlens", cu_seqlens)?;
        let group = Memory::<i32>::of("group", group)?;
        let task = Memory::<i32>::of("task", task)?;
        py.detach(|| {
            // SAFETY: the caller made the six tensors for this call alone and holds them until it returns.
            let mut arrays = unsafe {
                Arrays {
                    tokens: tokens.slice_mut(),
                    targets: targets.slice_mut(),
                    positions: positions.slice_mut(),
                    cu_seqlens: cu_seqlens.slice_mut(),
                    group: group.slice_mut(),
                    task: task.slice_mut(),
                }
            };
            self.part.write(&rows, &mut arrays)
        })?;
        Ok(())
    }
}

/// Prepares a dataset, or opens what an equal call has prepared.
#[pyfunction]
#[pyo3(signature = (paths, tokenizer, template, *, max_tokens, schema=None, mapping=None, train_on="assistant",
                    long_rows="truncate", tasks=false, skip_bad_rows=0, cache, progress=None))]
#[expect(clippy::too_many_arguments, reason = "keywords of a Python function")]
fn prepare_data(
    py: Python<'_>,
    paths: Vec<PathBuf>,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    max_tokens: usize,
    schema: Option<&str>,
    mapping: Option<BTreeMap<String, String>>,
    train_on: &str,
    long_rows: &str,
    tasks: bool,
    skip_bad_rows: u64,
    cache: PathBuf,
    progress: Option<Py<PyAny>>,
) -> PyResult<PreparedData> {
    let settings = Settings {
        paths,
        schema: schema.map(str::parse).transpose()?,
        mapping: mapping.unwrap_or_default(),
        tasks,
        skip_bad_rows,
        cache,
    };
    let encoder = Encoder {
        tokenizer: tokenizer.0.clone(),
        template: template.map(|template| template.0.clone()),
        train_on: train_on.parse()?,
        max_tokens,
        long_rows: long_rows.parse()?,
    };
    let mut raised: Option<PyErr> = None;
    let prepared = py.detach(|| {
        prepare(&settings, &encoder, &mut |rows| {
            let called = Python::attach(|py| {
                py.check_signals()?;
                progress.as_ref().map_or(Ok(()), |progress| progress.call1(py, (rows,)).map(drop))
            });
            called.map_err(|error| {
                raised = Some(error);
                Error::failure("stopped")
            })
        })
    });
    match (raised, prepared) {
        (Some(error), _) => Err(error),
        (None, Ok(prepared)) => Ok(PreparedData { cache: prepared.cache, problems: prepared.problems }),
        (None, Err(error)) => Err(error.into()),
    }
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PreparedData>()?;
    module.add_class::<PackedRows>()?;
    module.add_function(wrap_pyfunction!(prepare_data, module)?)
}
