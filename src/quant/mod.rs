//! Block formats of weights: one file a format, with the bytes of a block, `dequantize` and `quantize`.
//!
//! A format cuts a row into blocks of [`Kind::block_size`] values, each stored in [`Kind::block_bytes`] bytes. Values are
//! those of llama.cpp's reference to the bit: the same products, rounded in the same order.

mod bf16;
mod f16;
mod f32;
mod iq4_nl;
mod iq4_xs;
mod kind;
mod nested;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod scales;
mod search;

pub use kind::Kind;

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Values that one task of the thread pool converts: enough to pay for the task, little enough for the inner cache.
pub const TASK_VALUES: usize = 8192;

/// Writes the values of `blocks` to `out`, in parallel; the result doesn't depend on the number of threads.
///
/// # Errors
/// The two lengths are not those of the same whole number of blocks.
pub fn dequantize(kind: Kind, blocks: &[u8], out: &mut [f32]) -> Result<()> {
    check_lengths(kind, blocks.len(), out.len())?;
    blocks
        .par_chunks(TASK_VALUES / kind.block_size() * kind.block_bytes())
        .zip(out.par_chunks_mut(TASK_VALUES))
        .for_each(|(blocks, out)| kind.dequantize(blocks, out));
    Ok(())
}

/// Writes `values` as blocks, in parallel; the result doesn't depend on the number of threads.
///
/// # Errors
/// The two lengths are not those of the same whole number of blocks, or a value is not finite or too large for the
/// format.
pub fn quantize(kind: Kind, values: &[f32], blocks: &mut [u8]) -> Result<()> {
    check_lengths(kind, blocks.len(), values.len())?;
    values
        .par_chunks(TASK_VALUES)
        .zip(blocks.par_chunks_mut(TASK_VALUES / kind.block_size() * kind.block_bytes()))
        .enumerate()
        .try_for_each(|(task, (values, blocks))| {
            check_finite(values, task * TASK_VALUES)?;
            check_range(kind, values, task * TASK_VALUES)?;
            kind.quantize(values, blocks);
            Ok(())
        })
}

/// An error that names the first value that is NaN or infinite; `start` is the index of the slice in the whole.
pub fn check_finite(values: &[f32], start: usize) -> Result<()> {
    // a sum of differences is NaN exactly when some value isn't finite, and vectorizes
    if values.iter().map(|value| value - value).sum::<f32>() == 0.0 {
        return Ok(());
    }
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => {
            Err(Error::input(format!("expected finite values, got {} at index {}", values[index], start + index)))
        }
        None => Ok(()),
    }
}

/// An error that names the first value that the format would turn into infinity; half precision ends at 65,504.
fn check_range(kind: Kind, values: &[f32], start: usize) -> Result<()> {
    let limit = match kind {
        Kind::F32 => return Ok(()),
        Kind::Bf16 => half::bf16::MAX.to_f32(),
        _ => half::f16::MAX.to_f32(),
    };
    match values.iter().position(|value| value.abs() > limit) {
        Some(index) => Err(Error::input(format!(
            "expected values of at most {limit} for {}, got {} at index {}",
            kind.name(),
            values[index],
            start + index
        ))
        .hint("export as f32 or bf16")),
        None => Ok(()),
    }
}

fn check_lengths(kind: Kind, bytes: usize, values: usize) -> Result<()> {
    if bytes.is_multiple_of(kind.block_bytes())
        && values.is_multiple_of(kind.block_size())
        && bytes / kind.block_bytes() == values / kind.block_size()
    {
        return Ok(());
    }
    Err(Error::input(format!(
        "{}: expected whole blocks of {} values in {} bytes, got {values} values and {bytes} bytes",
        kind.name(),
        kind.block_size(),
        kind.block_bytes()
    )))
}
