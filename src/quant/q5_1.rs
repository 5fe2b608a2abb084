//! Q5_1: w = d q + m, q of 5 bits, scale d and offset m in half precision for 32 values.
//!
//! Bytes: d [2], m [2], fifth bits [4] (bit i of the u32 for value i), low 4 bits [16] laid out as in Q4_0.

use super::int8::{IntegerForm, Parts};
use super::q5_0::pack_five_bits;
use super::scales::{half_at, half_bytes};
use super::search;
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 32;
/// Bytes of a block.
pub(super) const BYTES: usize = 24;

/// As whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> =
    Some(IntegerForm { group: 32, zero: 0, offsets: true, bits: 5, nested: false, table: None, split });

fn split(block: &[u8], parts: &mut Parts) {
    let Some(block) = block.first_chunk::<BYTES>() else { return };
    let Parts { codes, scales, offsets, .. } = parts;
    (scales[0], offsets[0]) = (half_at(block, 0), half_at(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for i in 0..16 {
        codes[i] = block[8 + i] & 0x0f | ((high >> i & 1) as u8) << 4;
        codes[i + 16] = block[8 + i] >> 4 | ((high >> (i + 16) & 1) as u8) << 4;
    }
}

/// w = d q + m, the product rounded first.
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
        for i in 0..16 {
            let codes = block[8 + i];
            let low = (codes & 0x0f) | (((high >> i) & 1) as u8) << 4;
            let upper = (codes >> 4) | (((high >> (i + 16)) & 1) as u8) << 4;
            out[i] = d * f32::from(low) + m;
            out[i + 16] = d * f32::from(upper) + m;
        }
    }
}

/// The best of several scales and offsets; never worse than llama.cpp's reference.
pub(super) fn quantize(values: &[f32; BLOCK], weights: impl Weights, block: &mut [u8; BYTES]) {
    let (d, m) = search::affine(values, weights, 31.0, false, search::half);
    let codes = search::affine_codes(values, d, m, 31.0);
    block[..2].copy_from_slice(&half_bytes(d));
    block[2..4].copy_from_slice(&half_bytes(m));
    pack_five_bits(&codes, &mut block[4..]);
}
