//! F16: IEEE 754 half precision, 5 bits of exponent and 10 of fraction.

use super::int8::IntegerForm;
use super::weights::Weights;
use half::f16;

/// Values in a block.
pub(super) const BLOCK: usize = 1;
/// Bytes of a block.
pub(super) const BYTES: usize = 2;
/// None: these are no whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> = None;

/// w = f16.
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out) {
        *out = super::scales::wide(u16::from_le_bytes(*block));
    }
}

/// To the nearest, ties to even; beyond 65,504 infinite.
pub(super) fn quantize(values: &[f32; BLOCK], _: impl Weights, block: &mut [u8; BYTES]) {
    *block = f16::from_f32(values[0]).to_le_bytes();
}
