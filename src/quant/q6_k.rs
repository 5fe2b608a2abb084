//! Q6_K: w = (d s) q, q of 6 bits with sign; 8-bit scale s for 16 values; d in half precision for 256.
//!
//! Bytes: low 4 bits [128], high 2 bits [64], scales [16], d [2]. For each 128 values, 64 bytes of low bits hold values
//! 0 to 63 in their low halves and 64 to 127 in their high ones; bits 2j, 2j + 1 of byte i of 32 hold the high bits of
//! value 32 j + i.

use super::nested;
use super::scales::half_at;
use super::search::Integers;

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

/// The best of several scales on both levels, by squared error.
pub(super) fn quantize(values: &[f32], blocks: &mut [u8]) {
    for (values, block) in values.as_chunks::<BLOCK>().0.iter().zip(blocks.as_chunks_mut::<BYTES>().0) {
        let found = nested::symmetric::<Integers<-32, 31>, 16, 16>(values, -128.0, (-32.0, 31.0));
        block.fill(0);
        for (i, code) in found.codes.iter().enumerate() {
            let code = (code + 32) as u8;
            block[i / 128 * 64 + i % 64] |= (code & 0x0f) << (i / 64 % 2 * 4);
            block[128 + i / 128 * 32 + i % 32] |= (code >> 4) << (i % 128 / 32 * 2);
        }
        for (group, scale) in found.scales.iter().enumerate() {
            block[192 + group] = *scale as u8;
        }
        block[208..210].copy_from_slice(&found.d.to_le_bytes());
    }
}
