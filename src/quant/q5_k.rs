//! Q5_K: w = (d s) q − (d' m), q of 5 bits; 6-bit scale s and offset m for 32 values; d, d' in half precision for 256.
//!
//! Bytes: d [2], d' [2], scales and offsets [12], fifth bits [32] (bit j of byte i for value 32 j + i), low 4 bits [128]
//! laid out as in Q4_K.

use super::int8::{IntegerForm, Parts};
use super::nested;
use super::scales::{half_at, pack_scales_and_offsets, scale_and_offset};
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 256;
/// Bytes of a block.
pub(super) const BYTES: usize = 176;

/// As whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> =
    Some(IntegerForm { group: 32, zero: 0, offsets: true, bits: 5, nested: true, table: None, split });

fn split(block: &[u8], parts: &mut Parts) {
    let Some(block) = block.first_chunk::<BYTES>() else { return };
    let Parts { codes, scales, offsets, d, d_offset, .. } = parts;
    (*d, *d_offset) = (half_at(block, 0), half_at(block, 2));
    for group in 0..8 {
        let (scale, offset) = scale_and_offset(&block[4..16], group);
        (scales[group], offsets[group]) = (f32::from(scale), -f32::from(offset));
        for (i, code) in codes[group * 32..][..32].iter_mut().enumerate() {
            let low = block[48 + group / 2 * 32 + i] >> (group % 2 * 4) & 0x0f;
            *code = low | (block[16 + i] >> group & 1) << 4;
        }
    }
}

/// w = (d s) q − (d' m).
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let (d, d_offset) = (half_at(block, 0), half_at(block, 2));
        for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let (scale, offset) = scale_and_offset(&block[4..16], group);
            let (scale, offset) = (d * f32::from(scale), d_offset * f32::from(offset));
            let fifth = &block[16..48];
            let low = &block[48 + group / 2 * 32..][..32];
            for ((out, low), fifth) in out.iter_mut().zip(low).zip(fifth) {
                let code = ((low >> (group % 2 * 4)) & 0x0f) | ((fifth >> group) & 1) << 4;
                *out = scale * f32::from(code) - offset;
            }
        }
    }
}

/// The best of several scales on both levels, by squared error.
pub(super) fn quantize(values: &[f32; BLOCK], weights: impl Weights, block: &mut [u8; BYTES]) {
    let found = nested::affine::<8, 32>(values, weights, 63.0, 31.0);
    block[..2].copy_from_slice(&found.d.to_le_bytes());
    block[2..4].copy_from_slice(&found.d_offset.to_le_bytes());
    pack_scales_and_offsets(&found.scales, &found.offsets, &mut block[4..16]);
    block[16..].fill(0);
    for (i, code) in found.codes.iter().enumerate() {
        block[48 + i / 64 * 32 + i % 32] |= (code & 0x0f) << (i / 32 % 2 * 4);
        block[16 + i % 32] |= (code >> 4) << (i / 32);
    }
}
