//! Q2_K: w = (d s) q − (d' m), q of 2 bits; 4-bit scale s and offset m for 16 values; d, d' in half precision for 256.
//!
//! Bytes: s (low half) and m (high half) [16], codes [64], d [2], d' [2]. Each 32 bytes of codes hold 128 values: bits
//! 2j, 2j + 1 of byte i hold value 32 j + i.

use super::int8::{IntegerForm, Parts};
use super::nested;
use super::scales::half_at;
#[cfg(target_arch = "x86_64")]
use super::scales::x86;
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 256;
/// Bytes of a block.
pub(super) const BYTES: usize = 84;

/// As whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> =
    Some(IntegerForm { group: 16, zero: 0, offsets: true, bits: 2, nested: true, table: None, split });

fn split(block: &[u8], parts: &mut Parts) {
    let Some(block) = block.first_chunk::<BYTES>() else { return };
    let Parts { codes, scales, offsets, d, d_offset, .. } = parts;
    (*d, *d_offset) = (half_at(block, 80), half_at(block, 82));
    for group in 0..16 {
        let (half, shift, side) = (group / 8, group % 8 / 2 * 2, group % 2);
        scales[group] = f32::from(block[group] & 0x0f);
        offsets[group] = -f32::from(block[group] >> 4);
        for (code, byte) in codes[group * 16..].iter_mut().zip(&block[16 + half * 32 + side * 16..][..16]) {
            *code = (byte >> shift) & 3;
        }
    }
}

/// w = (d s) q − (d' m).
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    each(blocks, out, |codes, shift, scale, offset, out| {
        for (out, code) in out.iter_mut().zip(codes) {
            *out = scale * f32::from((code >> shift) & 3) - offset;
        }
    });
}

/// The same by AVX-512.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
pub(super) fn dequantize_512(blocks: &[u8], out: &mut [f32]) {
    each(blocks, out, |codes, shift, scale, offset, out| x86::two_bits_512(codes, shift, scale, offset, out));
}

/// The same by AVX2.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn dequantize_256(blocks: &[u8], out: &mut [f32]) {
    each(blocks, out, |codes, shift, scale, offset, out| x86::two_bits_256(codes, shift, scale, offset, out));
}

#[inline(always)]
fn each(blocks: &[u8], out: &mut [f32], put: impl Fn(&[u8; 16], u32, f32, f32, &mut [f32; 16])) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let (d, d_offset) = (half_at(block, 80), half_at(block, 82));
        let codes = block[16..80].as_chunks::<16>().0;
        for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let packed = block[group];
            let (scale, offset) = (d * f32::from(packed & 0x0f), d_offset * f32::from(packed >> 4));
            put(&codes[group / 8 * 2 + group % 2], group as u32 % 8 / 2 * 2, scale, offset, out);
        }
    }
}

/// The best of several scales on both levels, by squared error.
pub(super) fn quantize(values: &[f32; BLOCK], weights: impl Weights, block: &mut [u8; BYTES]) {
    let found = nested::affine::<16, 16>(values, weights, 15.0, 3.0);
    block.fill(0);
    for (byte, (scale, offset)) in block.iter_mut().zip(found.scales.iter().zip(&found.offsets)) {
        *byte = scale | offset << 4;
    }
    for (i, code) in found.codes.iter().enumerate() {
        block[16 + i / 128 * 32 + i % 32] |= code << (i % 128 / 32 * 2);
    }
    block[80..82].copy_from_slice(&found.d.to_le_bytes());
    block[82..84].copy_from_slice(&found.d_offset.to_le_bytes());
}
