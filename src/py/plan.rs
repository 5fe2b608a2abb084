//! Bindings of the `plan` room.

use pyo3::prelude::*;

use crate::plan::caching::{Device, reserved};
use crate::plan::{Event, peak};

type Told = Vec<(u64, i64, usize)>;

/// The peak of a trace: `(bytes, by_category, event, left)`.
///
/// `events` has one `(id, bytes, category)` a line; a birth has `bytes >= 0`, a death has `bytes < 0`.
#[pyfunction]
fn replay(py: Python<'_>, events: Told, categories: usize) -> PyResult<(u64, Vec<u64>, usize, u64)> {
    let found = py.detach(|| peak(&read(events), categories))?;
    Ok((found.bytes, found.by_category, found.event, found.left))
}

/// The most bytes that torch's caching allocator reserves on a GPU of `capacity` bytes; none where it has no room.
#[pyfunction]
fn replay_on_gpu(py: Python<'_>, events: Told, capacity: u64, expandable: bool) -> PyResult<Option<u64>> {
    let found = py.detach(|| reserved(&read(events), Device { capacity, expandable }))?;
    Ok(found.out_of_memory.is_none().then_some(found.bytes))
}

fn read(events: Told) -> Vec<Event> {
    let event = |(id, bytes, category)| match u64::try_from(bytes) {
        Ok(bytes) => Event::Allocate { id, bytes, category },
        Err(_) => Event::Free { id },
    };
    events.into_iter().map(event).collect()
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(replay, module)?)?;
    module.add_function(wrap_pyfunction!(replay_on_gpu, module)?)
}
