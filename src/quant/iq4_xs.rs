//! IQ4_XS: w = (d s) t[q], q of 4 bits into IQ4_NL's table; 6-bit scale s − 32 for 32 values; d in half precision for 256.
//!
//! Bytes: d [2], high 2 bits of the scales [2], low 4 bits of the scales [4], codes [128]: 16 bytes for 32 values, the
//! first 16 in the low halves.

use super::int8::{IntegerForm, Parts};
use super::iq4_nl::{CODES, TABLE, Table, code_of, plain};
use super::nested;
use super::scales::half_at;
#[cfg(target_arch = "x86_64")]
use super::scales::x86;
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 256;
/// Bytes of a block.
pub(super) const BYTES: usize = 136;

/// As whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> =
    Some(IntegerForm { group: 32, zero: 128, offsets: false, bits: 4, nested: true, table: Some(&CODES), split });

fn split(block: &[u8], parts: &mut Parts) {
    let Some(block) = block.first_chunk::<BYTES>() else { return };
    let Parts { codes, scales, d, .. } = parts;
    *d = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for group in 0..8 {
        let low = (block[4 + group / 2] >> (group % 2 * 4)) & 0x0f;
        scales[group] = f32::from((low | (((high >> (group * 2)) & 3) as u8) << 4) as i8 - 32);
        for i in 0..16 {
            let byte = block[8 + group * 16 + i];
            codes[group * 32 + i] = byte & 0x0f;
            codes[group * 32 + 16 + i] = byte >> 4;
        }
    }
}

/// w = (d s) t[q].
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    each(blocks, out, plain);
}

/// The same by AVX-512.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
pub(super) fn dequantize_512(blocks: &[u8], out: &mut [f32]) {
    each(blocks, out, |codes, d, out| x86::table_512(codes, &TABLE, d, out));
}

/// The same by AVX2.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn dequantize_256(blocks: &[u8], out: &mut [f32]) {
    each(blocks, out, |codes, d, out| x86::table_256(codes, &TABLE, d, out));
}

#[inline(always)]
fn each(blocks: &[u8], out: &mut [f32], put: impl Fn(&[u8; 16], f32, &mut [f32; 32])) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = half_at(block, 0);
        let high = u16::from_le_bytes([block[2], block[3]]);
        let groups = block[8..].as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<32>().0);
        for (group, (codes, out)) in groups.enumerate() {
            let low = (block[4 + group / 2] >> (group % 2 * 4)) & 0x0f;
            let scale = (low | (((high >> (group * 2)) & 3) as u8) << 4) as i8 - 32;
            put(codes, d * f32::from(scale), out);
        }
    }
}

/// The best of several scales on both levels, by squared error.
pub(super) fn quantize(values: &[f32; BLOCK], weights: impl Weights, block: &mut [u8; BYTES]) {
    let found = nested::symmetric::<Table, 8, 32>(values, weights, -32.0, (-127.0, 113.0));
    block.fill(0);
    block[..2].copy_from_slice(&found.d.to_le_bytes());
    let mut high = 0u16;
    for (group, scale) in found.scales.iter().enumerate() {
        let scale = (scale + 32) as u8;
        block[4 + group / 2] |= (scale & 0x0f) << (group % 2 * 4);
        high |= u16::from(scale >> 4) << (group * 2);
    }
    block[2..4].copy_from_slice(&high.to_le_bytes());
    for (i, value) in found.codes.iter().enumerate() {
        block[8 + i / 32 * 16 + i % 16] |= code_of(*value) << (i / 16 % 2 * 4);
    }
}
