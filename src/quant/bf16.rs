//! BF16: the upper half of an f32, 8 bits of exponent and 7 of fraction.

use super::int8::IntegerForm;
use super::weights::Weights;
use half::bf16;

/// Values in a block.
pub(super) const BLOCK: usize = 1;
/// Bytes of a block.
pub(super) const BYTES: usize = 2;
/// None: these are no whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> = None;

/// w = bf16.
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*block)) << 16);
    }
}

/// To the nearest, ties to even.
pub(super) fn quantize(values: &[f32; BLOCK], _: impl Weights, block: &mut [u8; BYTES]) {
    *block = bf16::from_f32(values[0]).to_le_bytes();
}
