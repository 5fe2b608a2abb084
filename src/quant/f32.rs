//! F32: values as they are.

use super::int8::IntegerForm;
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 1;
/// Bytes of a block.
pub(super) const BYTES: usize = 4;
/// None: these are no whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> = None;

/// w = f32, little endian.
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out) {
        *out = f32::from_le_bytes(*block);
    }
}

/// Exact.
pub(super) fn quantize(values: &[f32; BLOCK], _: impl Weights, block: &mut [u8; BYTES]) {
    *block = values[0].to_le_bytes();
}
