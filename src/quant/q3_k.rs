//! Q3_K: w = (d s) q, q of 3 bits with sign; 6-bit scale s − 32 for 16 values; d in half precision for 256.
//!
//! Bytes: third bits [32], low 2 bits [64], scales [12], d [2]. Bit j of byte i of the third bits belongs to value
//! 32 j + i and is clear where 4 is to be subtracted; the low bits are laid out as in Q2_K.

use super::int8::{IntegerForm, Parts};
use super::nested;
use super::scales::half_at;
use super::search::Integers;
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 256;
/// Bytes of a block.
pub(super) const BYTES: usize = 110;

/// As whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> =
    Some(IntegerForm { group: 16, zero: 4, offsets: false, bits: 3, nested: true, table: None, split });

fn split(block: &[u8], parts: &mut Parts) {
    let Some(block) = block.first_chunk::<BYTES>() else { return };
    let Parts { codes, scales, d, .. } = parts;
    *d = half_at(block, 108);
    for group in 0..16 {
        let (half, shift, side) = (group / 8, group % 8 / 2 * 2, group % 2);
        scales[group] = f32::from(scale(block, group));
        for i in 0..16 {
            let low = block[32 + half * 32 + side * 16 + i] >> shift & 3;
            codes[group * 16 + i] = low | (block[side * 16 + i] >> (group / 2) & 1) << 2;
        }
    }
}

/// w = (d s) q.
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = half_at(block, 108);
        for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let scale = d * f32::from(scale(block, group));
            let (half, shift, side) = (group / 8, group % 8 / 2 * 2, group % 2);
            let low = &block[32 + half * 32 + side * 16..][..16];
            let third = &block[side * 16..][..16];
            for ((out, low), third) in out.iter_mut().zip(low).zip(third) {
                let subtracted = if (third >> (group / 2)) & 1 == 1 { 0 } else { 4 };
                *out = scale * f32::from(((low >> shift) & 3) as i8 - subtracted);
            }
        }
    }
}

/// The scale of a group: its low 4 bits fill 8 bytes, first all low halves; its high 2 bits the 4 bytes after.
fn scale(block: &[u8; BYTES], group: usize) -> i8 {
    let low = (block[96 + group % 8] >> (group / 8 * 4)) & 0x0f;
    let high = (block[104 + group % 4] >> (group / 4 * 2)) & 3;
    (low | high << 4) as i8 - 32
}

/// The best of several scales on both levels, by squared error.
pub(super) fn quantize(values: &[f32; BLOCK], weights: impl Weights, block: &mut [u8; BYTES]) {
    let found = nested::symmetric::<Integers<-4, 3>, 16, 16>(values, weights, -32.0, (-4.0, 3.0));
    block.fill(0);
    for (i, code) in found.codes.iter().enumerate() {
        let code = (code + 4) as u8;
        block[32 + i / 128 * 32 + i % 32] |= (code & 3) << (i % 128 / 32 * 2);
        block[i % 32] |= (code >> 2) << (i / 32);
    }
    for (group, scale) in found.scales.iter().enumerate() {
        let scale = (scale + 32) as u8;
        block[96 + group % 8] |= (scale & 0x0f) << (group / 8 * 4);
        block[104 + group % 4] |= (scale >> 4) << (group / 4 * 2);
    }
    block[108..110].copy_from_slice(&found.d.to_le_bytes());
}
