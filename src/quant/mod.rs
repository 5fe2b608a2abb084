//! Block formats of weights: one file a format, with the bytes of a block, `dequantize` and `quantize`.
//!
//! A format cuts a row into blocks of [`Kind::block_size`] values, each stored in [`Kind::block_bytes`] bytes. Values are
//! those of llama.cpp's reference to the bit: the same products, rounded in the same order.

#[cfg(target_arch = "x86_64")]
mod amx;
mod bf16;
pub mod coded;
mod f16;
mod f32;
pub mod int8;
mod iq4_nl;
mod iq4_xs;
mod kind;
pub mod matmul;
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
mod weights;

pub use kind::Kind;
pub use weights::Importance;

use rayon::prelude::*;
use weights::Even;

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
        .for_each(|(blocks, out)| matmul::Path::best().dequantize(kind, blocks, out));
    Ok(())
}

/// Writes `values` as blocks, in parallel; the result doesn't depend on the number of threads.
///
/// With `importance`, `values` are rows of as many columns, and the search for scales minimises Σ importance (x − x̂)².
///
/// # Errors
/// The two lengths are not those of the same whole number of blocks, columns don't divide into blocks or values into
/// rows, or a value is not finite or too large for the format.
pub fn quantize(kind: Kind, values: &[f32], importance: Option<&Importance>, blocks: &mut [u8]) -> Result<()> {
    check_lengths(kind, blocks.len(), values.len())?;
    if let Some(columns) = importance.map(Importance::columns)
        && !(columns.is_multiple_of(kind.block_size()) && values.len().is_multiple_of(columns))
    {
        return Err(Error::input(format!(
            "{}: expected the importance of rows of whole blocks of {} values, got that of {columns} columns for {} values",
            kind.name(),
            kind.block_size(),
            values.len()
        )));
    }
    values
        .par_chunks(TASK_VALUES)
        .zip(blocks.par_chunks_mut(TASK_VALUES / kind.block_size() * kind.block_bytes()))
        .enumerate()
        .try_for_each(|(task, (values, blocks))| {
            check_finite(values, task * TASK_VALUES)?;
            check_range(kind, values, task * TASK_VALUES)?;
            match importance {
                None => kind.quantize(values, |_, _| Even, blocks),
                Some(each) => {
                    kind.quantize(values, |start, size| each.of_values(task * TASK_VALUES + start, size), blocks)
                }
            }
            Ok(())
        })
}

/// An error that names the first value that is NaN or infinite; `start` is the index of the slice in the whole.
pub fn check_finite(values: &[f32], start: usize) -> Result<()> {
    // a sum of zeros is NaN exactly when some value isn't finite, and vectorizes
    if values.iter().map(|value| value * 0.0).sum::<f32>() == 0.0 {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds() -> impl Strategy<Value = Kind> {
        prop::sample::select(Kind::ALL)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes_are_blocks(kind in kinds(), bytes in prop::collection::vec(any::<u8>(), 420..421)) {
            let count = bytes.len() / kind.block_bytes();
            let mut out = vec![0.0; count * kind.block_size()];
            dequantize(kind, &bytes[..count * kind.block_bytes()], &mut out).unwrap();
        }

        #[test]
        fn any_finite_values_come_back_finite_and_near(
            kind in kinds(),
            values in prop::collection::vec(prop_oneof![-1.0f32..1.0, -65504.0f32..65504.0, Just(0.0), -1e-38f32..1e-38], 512..513),
        ) {
            let mut blocks = vec![0; 512 / kind.block_size() * kind.block_bytes()];
            quantize(kind, &values, None, &mut blocks).unwrap();
            let mut restored = vec![f32::NAN; 512];
            dequantize(kind, &blocks, &mut restored).unwrap();
            for (values, restored) in values.chunks(kind.block_size()).zip(restored.chunks(kind.block_size())) {
                let size = values.iter().map(|value| value.abs()).fold(0.0, f32::max);
                for (value, restored) in values.iter().zip(restored) {
                    prop_assert!((value - restored).abs() <= size * 0.5 + 1e-6, "{value} came back as {restored}");
                }
            }
        }

        #[test]
        fn lengths_that_do_not_fit_are_errors(kind in kinds(), bytes in 0usize..600, values in 0usize..600) {
            let fits = bytes % kind.block_bytes() == 0
                && values % kind.block_size() == 0
                && bytes / kind.block_bytes() == values / kind.block_size();
            prop_assert_eq!(dequantize(kind, &vec![0; bytes], &mut vec![0.0; values]).is_ok(), fits);
            prop_assert_eq!(quantize(kind, &vec![0.0; values], None, &mut vec![0; bytes]).is_ok(), fits);
        }
    }

    #[test]
    fn the_result_does_not_depend_on_the_threads() {
        let values: Vec<f32> = (0..40_960).map(|i| ((i * 37 % 1009) as f32 - 504.0) / 97.0).collect();
        for &kind in Kind::ALL {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut blocks = vec![0; values.len() / kind.block_size() * kind.block_bytes()];
                pool.install(|| quantize(kind, &values, None, &mut blocks)).unwrap();
                blocks
            };
            assert_eq!(run(1), run(3), "{}", kind.name());
        }
    }

    #[test]
    fn names_and_numbers_are_each_ones_own() {
        for &kind in Kind::ALL {
            assert_eq!(Kind::from_name(kind.name()), Some(kind));
            assert_eq!(Kind::from_id(kind.id()), Some(kind));
            assert_eq!(Kind::unread_name(kind.id()), None);
        }
    }
}
