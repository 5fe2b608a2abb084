//! Q4_0: w = d (q − 8), q of 4 bits, d in half precision for 32 values.
//!
//! Bytes: d [2], codes [16]: byte i holds value i in its low and value i + 16 in its high half.

use super::int8::{IntegerForm, Parts};
#[cfg(target_arch = "x86_64")]
use super::scales::x86;
use super::scales::{half_at, half_bytes};
use super::search;
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 32;
/// Bytes of a block.
pub(super) const BYTES: usize = 18;

/// What codes stand for.
type Grid = search::Integers<-8, 7>;

/// As whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> =
    Some(IntegerForm { group: 32, zero: 8, offsets: false, bits: 4, nested: false, table: None, split });

fn split(block: &[u8], parts: &mut Parts) {
    let Some(block) = block.first_chunk::<BYTES>() else { return };
    let Parts { codes, scales, .. } = parts;
    scales[0] = half_at(block, 0);
    for i in 0..16 {
        codes[i] = block[2 + i] & 0x0f;
        codes[i + 16] = block[2 + i] >> 4;
    }
}

/// w = d (q − 8).
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = half_at(block, 0);
        for i in 0..16 {
            let codes = block[2 + i];
            out[i] = d * f32::from((codes & 0x0f) as i8 - 8);
            out[i + 16] = d * f32::from((codes >> 4) as i8 - 8);
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
        x86::affine_512(codes, 8, half_at(block, 0), None, out);
    }
}

/// The same by AVX2.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn dequantize_256(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let codes = block.last_chunk().unwrap_or(&[0; 16]); // there always is one: the block is longer
        x86::affine_256(codes, 8, half_at(block, 0), None, out);
    }
}

/// The best of several scales; never worse than llama.cpp's reference.
pub(super) fn quantize(values: &[f32; BLOCK], weights: impl Weights, block: &mut [u8; BYTES]) {
    let extreme = search::signed_extreme(values);
    let starts = [-8.0, -9.5, -9.0, -8.5, -7.5, -7.0].map(|lowest| extreme / lowest);
    let d = search::symmetric::<Grid, _, _>(values, weights, starts, search::half);
    let codes = search::codes::<Grid, BLOCK>(values, d);
    block[..2].copy_from_slice(&half_bytes(d));
    for i in 0..16 {
        block[2 + i] = (codes[i] + 8) as u8 | ((codes[i + 16] + 8) as u8) << 4;
    }
}
