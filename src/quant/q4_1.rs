//! Q4_1: w = d q + m, q of 4 bits, scale d and offset m in half precision for 32 values.
//!
//! Bytes: d [2], m [2], codes [16]: byte i holds value i in its low and value i + 16 in its high half.

use super::int8::{IntegerForm, Parts};
#[cfg(target_arch = "x86_64")]
use super::scales::x86;
use super::scales::{half_at, half_bytes};
use super::search;
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 32;
/// Bytes of a block.
pub(super) const BYTES: usize = 20;

/// As whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> =
    Some(IntegerForm { group: 32, zero: 0, offsets: true, bits: 4, nested: false, table: None, split });

fn split(block: &[u8], parts: &mut Parts) {
    let Some(block) = block.first_chunk::<BYTES>() else { return };
    let Parts { codes, scales, offsets, .. } = parts;
    (scales[0], offsets[0]) = (half_at(block, 0), half_at(block, 2));
    for i in 0..16 {
        codes[i] = block[4 + i] & 0x0f;
        codes[i + 16] = block[4 + i] >> 4;
    }
}

/// w = d q + m, the product rounded first.
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        for i in 0..16 {
            let codes = block[4 + i];
            out[i] = d * f32::from(codes & 0x0f) + m;
            out[i + 16] = d * f32::from(codes >> 4) + m;
        }
    }
}

/// The same by AVX-512.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
pub(super) fn dequantize_512(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let codes = block.last_chunk().unwrap_or(&[0; 16]); // there always is one: the block is longer
        x86::affine_512(codes, 0, half_at(block, 0), Some(half_at(block, 2)), out);
    }
}

/// The same by AVX2.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn dequantize_256(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let codes = block.last_chunk().unwrap_or(&[0; 16]); // there always is one: the block is longer
        x86::affine_256(codes, 0, half_at(block, 0), Some(half_at(block, 2)), out);
    }
}

/// The best of several scales and offsets; never worse than llama.cpp's reference.
pub(super) fn quantize(values: &[f32; BLOCK], weights: impl Weights, block: &mut [u8; BYTES]) {
    let (d, m) = search::affine(values, weights, 15.0, false, search::half);
    let codes = search::affine_codes(values, d, m, 15.0);
    block[..2].copy_from_slice(&half_bytes(d));
    block[2..4].copy_from_slice(&half_bytes(m));
    for i in 0..16 {
        block[4 + i] = codes[i] | codes[i + 16] << 4;
    }
}
