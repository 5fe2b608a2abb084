//! Bindings of the `optim` room.

use pyo3::prelude::*;

use super::tensor::Memory;
use crate::optim::{self, Factors, Map, State};
use crate::team::Team;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(blockwise_adamw, module)?)
}

/// A state's tensors: codes, the greatest of each block, the map and its edges.
type Given<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);

/// Moves the weight and both states in place.
#[pyfunction]
fn blockwise_adamw(
    py: Python<'_>,
    weight: &Bound<'_, PyAny>,
    gradient: &Bound<'_, PyAny>,
    mean: Given<'_>,
    square: Given<'_>,
    factors: (f64, f64, f32, f32, f32, f32),
) -> PyResult<()> {
    let (weight, gradient) = (Memory::<f32>::of("weight", weight)?, Memory::<f32>::of("gradient", gradient)?);
    let (mean, square) = (Tensors::of(&mean)?, Tensors::of(&square)?);
    let (beta1, beta2, epsilon, rate, correction, kept) = factors;
    let factors = Factors { beta1, beta2, epsilon, rate, correction, kept };
    // SAFETY: the caller's tensors live during the call; weight and states, which share no memory, are given to be
    // written, the gradient to be read.
    let (weight, gradient) = unsafe { (weight.slice_mut(), gradient.slice()) };
    // SAFETY: as above.
    let (mean, square) = unsafe { (mean.state()?, square.state()?) };
    Ok(py.detach(|| Team::run(|team| optim::blockwise_adamw(team, weight, gradient, mean, square, factors)))?)
}

struct Tensors {
    codes: Memory<u8>,
    greatest: Memory<f32>,
    map: Memory<f32>,
    edges: Memory<f32>,
}

impl Tensors {
    fn of((codes, greatest, map, edges): &Given<'_>) -> PyResult<Self> {
        Ok(Self {
            codes: Memory::of("codes", codes)?,
            greatest: Memory::of("greatest", greatest)?,
            map: Memory::of("map", map)?,
            edges: Memory::of("edges", edges)?,
        })
    }

    /// # Safety
    /// The tensors live, and nobody else touches codes and greatest, while the state is in use.
    unsafe fn state(&self) -> PyResult<State<'_>> {
        // SAFETY: the caller's promise.
        let (codes, greatest, map, edges) =
            unsafe { (self.codes.slice_mut(), self.greatest.slice_mut(), self.map.slice(), self.edges.slice()) };
        Ok(State { codes, greatest, map: Map::new(map, edges)? })
    }
}
