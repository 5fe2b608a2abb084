//! Q6_K: w = (d s) q, q of 6 bits with sign; 8-bit scale s for 16 values; d in half precision for 256.
//!
//! Bytes: low 4 bits [128], high 2 bits [64], scales [16], d [2]. For each 128 values, 64 bytes of low bits hold values
//! 0 to 63 in their low halves and 64 to 127 in their high ones; bits 2j, 2j + 1 of byte i of 32 hold the high bits of
//! value 32 j + i.

use super::scales::half_at;

/// Values in a block.
pub(super) const BLOCK: usize = 256;
/// Bytes of a block.
pub(super) const BYTES: usize = 210;

/// w = (d s) q.
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = half_at(block, 208);
        for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let scale = d * f32::from(block[192 + group] as i8);
            // quarter: which 32 of the 128 values; side: which 16 of these
            let (half, quarter, side) = (group / 8, group % 8 / 2, group % 2);
            let low = &block[half * 64 + quarter % 2 * 32 + side * 16..][..16];
            let high = &block[128 + half * 32 + side * 16..][..16];
            for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
                let code = ((low >> (quarter / 2 * 4)) & 0x0f) | ((high >> (quarter * 2)) & 3) << 4;
                *out = scale * f32::from(code as i8 - 32);
            }
        }
    }
}
