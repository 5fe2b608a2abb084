//! Bindings of the `quant` room.

use half::{bf16, f16};
use pyo3::prelude::*;

use super::tensor::{Element, Memory};
use crate::error::{Error, Result};
use crate::quant::{self, Importance, Kind};

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(quant_formats, module)?)?;
    module.add_function(wrap_pyfunction!(quantize, module)?)?;
    module.add_function(wrap_pyfunction!(dequantize, module)?)?;
    Ok(())
}

/// The block formats: (name, values in a block, bytes of a block).
#[pyfunction]
fn quant_formats() -> Vec<(&'static str, usize, usize)> {
    Kind::ALL.iter().map(|kind| (kind.name(), kind.block_size(), kind.block_bytes())).collect()
}

/// Writes the values of `blocks` (uint8) to `out` (float32).
#[pyfunction]
fn dequantize(py: Python<'_>, kind: &str, blocks: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
    let kind = kind_called(kind)?;
    let (blocks, out) = (Memory::<u8>::of("blocks", blocks)?, Memory::<f32>::of("out", out)?);
    // SAFETY: the caller's tensors live during the call; `out` is given to be written, `blocks` to be read.
    let (blocks, out) = unsafe { (blocks.slice(), out.slice_mut()) };
    Ok(py.detach(|| quant::dequantize(kind, blocks, out))?)
}

/// Writes `values` (float32, bfloat16 or float16) as blocks to `out` (uint8); errors count by their column's
/// `importance` (float32).
#[pyfunction]
#[pyo3(signature = (kind, values, out, importance = None))]
fn quantize(
    py: Python<'_>,
    kind: &str,
    values: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    importance: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let kind = kind_called(kind)?;
    let values = Values::of("values", values)?;
    let importance = importance_of(importance, values.shape())?;
    let out = Memory::<u8>::of("out", out)?;
    // SAFETY: the caller's tensor lives during the call and is given to be written.
    let out = unsafe { out.slice_mut() };
    let length = out.len();
    let expected = values.shape().iter().product::<usize>() / kind.block_size() * kind.block_bytes();
    if length != expected {
        return Err(Error::failure(format!("out: expected {expected} bytes, got {length}")).into());
    }
    Ok(py.detach(|| {
        let mut rest = out;
        values.in_pieces(kind, importance.as_ref(), |blocks| {
            let (piece, after) = std::mem::take(&mut rest)
                .split_at_mut_checked(blocks.len())
                .ok_or_else(|| Error::failure(format!("out: expected the bytes of all blocks, got {length}")))?;
            piece.copy_from_slice(blocks);
            rest = after;
            Ok(())
        })
    })?)
}

/// The format called `name`.
pub(super) fn kind_called(name: &str) -> Result<Kind> {
    Kind::from_name(name).ok_or_else(|| {
        let known = Kind::ALL.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
        Error::input(format!("expected a block format ({known}), got {name:?}"))
    })
}

/// The importance of the columns of a matrix of this shape.
pub(super) fn importance_of(tensor: Option<&Bound<'_, PyAny>>, shape: &[usize]) -> PyResult<Option<Importance>> {
    let Some(tensor) = tensor else { return Ok(None) };
    let memory = Memory::<f32>::of("importance", tensor)?;
    if memory.shape.as_slice() != shape.last().map_or(&[][..], std::slice::from_ref) {
        return Err(Error::failure(format!(
            "importance: expected one number for each column of {shape:?}, got the shape {:?}",
            memory.shape
        ))
        .into());
    }
    // SAFETY: the caller's tensor lives during the call and nobody writes to it.
    Ok(Some(Importance::of_columns(unsafe { memory.slice() })?))
}

/// A tensor of values in one of the float types.
pub(super) enum Values {
    /// float32
    F32(Memory<f32>),
    /// bfloat16
    Bf16(Memory<bf16>),
    /// float16
    F16(Memory<f16>),
}

impl Values {
    /// Values quantized at a time: enough for all cores, little enough that memory does not show it.
    const PIECE: usize = 1 << 22;

    pub(super) fn of(name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(match tensor.getattr("dtype")?.str()?.to_string().as_str() {
            "torch.bfloat16" => Self::Bf16(Memory::of(name, tensor)?),
            "torch.float16" => Self::F16(Memory::of(name, tensor)?),
            _ => Self::F32(Memory::of(name, tensor)?),
        })
    }

    pub(super) fn shape(&self) -> &[usize] {
        match self {
            Self::F32(memory) => &memory.shape,
            Self::Bf16(memory) => &memory.shape,
            Self::F16(memory) => &memory.shape,
        }
    }

    /// Calls `write` with the blocks of one piece of the values after the other.
    pub(super) fn in_pieces(
        &self,
        kind: Kind,
        importance: Option<&Importance>,
        write: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::F32(memory) => pieces(memory, kind, importance, |value| value, write),
            Self::Bf16(memory) => pieces(memory, kind, importance, bf16::to_f32, write),
            Self::F16(memory) => pieces(memory, kind, importance, f16::to_f32, write),
        }
    }
}

fn pieces<T: Element>(
    memory: &Memory<T>,
    kind: Kind,
    importance: Option<&Importance>,
    widen: impl Fn(T) -> f32,
    mut write: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    // SAFETY: the caller's tensor lives during the call and nobody writes to it.
    let all = unsafe { memory.slice() };
    if !all.len().is_multiple_of(kind.block_size()) {
        return Err(Error::input(format!(
            "expected whole blocks of {} values for {}, got {} values",
            kind.block_size(),
            kind.name(),
            all.len()
        )));
    }
    let mut blocks = Vec::new();
    let mut values = Vec::new();
    // whole rows, where columns matter
    let piece = importance.map_or(Values::PIECE, |each| Values::PIECE.next_multiple_of(each.columns()));
    for piece in all.chunks(piece) {
        values.clear();
        values.extend(piece.iter().map(|&value| widen(value)));
        blocks.resize(piece.len() / kind.block_size() * kind.block_bytes(), 0);
        quant::quantize(kind, &values, importance, &mut blocks)?;
        write(&blocks)?;
    }
    Ok(())
}
