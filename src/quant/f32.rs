//! F32: values as they are.

use super::int8::IntegerForm;

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
pub(super) fn quantize(values: &[f32], blocks: &mut [u8]) {
    for (value, block) in values.iter().zip(blocks.as_chunks_mut::<BYTES>().0) {
        *block = value.to_le_bytes();
    }
}
