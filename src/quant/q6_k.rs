//! Q6_K: w = (d s) q, q of 6 bits with sign; 8-bit scale s for 16 values; d in half precision for 256.
//!
//! Bytes: low 4 bits [128], high 2 bits [64], scales [16], d [2]. For each 128 values, 64 bytes of low bits hold values
//! 0 to 63 in their low halves and 64 to 127 in their high ones; bits 2j, 2j + 1 of byte i of 32 hold the high bits of
//! value 32 j + i.

use super::int8::{IntegerForm, Parts};
use super::nested;
use super::scales::half_at;
use super::search::Integers;
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 256;
/// Bytes of a block.
pub(super) const BYTES: usize = 210;

/// As whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> =
    Some(IntegerForm { group: 16, zero: 32, offsets: false, bits: 6, nested: true, table: None, split });

fn split(block: &[u8], parts: &mut Parts) {
    let Some(block) = block.first_chunk::<BYTES>() else { return };
    let Parts { codes, scales, d, .. } = parts;
    *d = half_at(block, 208);
    for group in 0..16 {
        scales[group] = f32::from(block[192 + group] as i8);
    }
    for (i, code) in codes.iter_mut().enumerate() {
        let low = block[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 0x0f;
        *code = low | (block[128 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3) << 4;
    }
}

/// w = (d s) q.
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = half_at(block, 208);
        for (quarter, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            // half: which 128 values; quarter: which 32 of these
            let (half, quarter) = (quarter / 4, quarter % 4);
            let low = &block[half * 64 + quarter % 2 * 32..][..32];
            let high = &block[128 + half * 32..][..32];
            let mut codes = [0i8; 32];
            for ((code, low), high) in codes.iter_mut().zip(low).zip(high) {
                *code = (((low >> (quarter / 2 * 4)) & 0x0f) | ((high >> (quarter * 2)) & 3) << 4) as i8 - 32;
            }
            for (side, (out, codes)) in
                out.as_chunks_mut::<16>().0.iter_mut().zip(codes.as_chunks::<16>().0).enumerate()
            {
                let scale = d * f32::from(block[192 + half * 8 + quarter * 2 + side] as i8);
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = scale * f32::from(*code);
                }
            }
        }
    }
}

/// The best of several scales on both levels, by squared error.
pub(super) fn quantize(values: &[f32; BLOCK], weights: impl Weights, block: &mut [u8; BYTES]) {
    let found = nested::symmetric::<Integers<-32, 31>, 16, 16>(values, weights, -128.0, (-32.0, 31.0));
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
