//! Bindings of the `plan` room.

use pyo3::prelude::*;

use crate::plan::{Event, peak};

/// The peak of a trace: `(bytes, by_category, event, left)`.
///
/// `events` has one `(id, bytes, category)` a line; a birth has `bytes >= 0`, a death has `bytes < 0`.
#[pyfunction]
fn replay(py: Python<'_>, events: Vec<(u64, i64, usize)>, categories: usize) -> PyResult<(u64, Vec<u64>, usize, u64)> {
    let found = py.detach(|| {
        let events: Vec<Event> = events
            .into_iter()
            .map(|(id, bytes, category)| match u64::try_from(bytes) {
                Ok(bytes) => Event::Allocate { id, bytes, category },
                Err(_) => Event::Free { id },
            })
            .collect();
        peak(&events, categories)
    })?;
    Ok((found.bytes, found.by_category, found.event, found.left))
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(replay, module)?)
}
