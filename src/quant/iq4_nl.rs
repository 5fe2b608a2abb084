//! IQ4_NL: w = d t[q], q of 4 bits into a table of unequal steps, d in half precision for 32 values.
//!
//! Bytes: d [2], codes [16] laid out as in Q4_0.

use super::scales::half_at;

/// Values in a block.
pub(super) const BLOCK: usize = 32;
/// Bytes of a block.
pub(super) const BYTES: usize = 18;

/// The values of the codes: closer together near zero, where most weights are.
pub(super) const TABLE: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// w = d t[q].
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = half_at(block, 0);
        for i in 0..16 {
            let codes = block[2 + i];
            out[i] = d * f32::from(TABLE[usize::from(codes & 0x0f)]);
            out[i + 16] = d * f32::from(TABLE[usize::from(codes >> 4)]);
        }
    }
}
