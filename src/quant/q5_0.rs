//! Q5_0: w = d (q − 16), q of 5 bits, d in half precision for 32 values.
//!
//! Bytes: d [2], fifth bits [4] (bit i of the u32 for value i), low 4 bits [16] laid out as in Q4_0.

use super::int8::{IntegerForm, Parts};
use super::scales::{half_at, half_bytes};
use super::search;
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 32;
/// Bytes of a block.
pub(super) const BYTES: usize = 22;

/// What codes stand for.
type Grid = search::Integers<-16, 15>;

/// As whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> =
    Some(IntegerForm { group: 32, zero: 16, offsets: false, bits: 5, nested: false, table: None, split });

fn split(block: &[u8], parts: &mut Parts) {
    let Some(block) = block.first_chunk::<BYTES>() else { return };
    let Parts { codes, scales, .. } = parts;
    scales[0] = half_at(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for i in 0..16 {
        codes[i] = block[6 + i] & 0x0f | ((high >> i & 1) as u8) << 4;
        codes[i + 16] = block[6 + i] >> 4 | ((high >> (i + 16) & 1) as u8) << 4;
    }
}

/// w = d (q − 16).
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = half_at(block, 0);
        let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
        for i in 0..16 {
            let codes = block[6 + i];
            let low = (codes & 0x0f) | (((high >> i) & 1) as u8) << 4;
            let upper = (codes >> 4) | (((high >> (i + 16)) & 1) as u8) << 4;
            out[i] = d * f32::from(low as i8 - 16);
            out[i + 16] = d * f32::from(upper as i8 - 16);
        }
    }
}

/// The best of several scales; never worse than llama.cpp's reference.
pub(super) fn quantize(values: &[f32; BLOCK], weights: impl Weights, block: &mut [u8; BYTES]) {
    let extreme = search::signed_extreme(values);
    let starts = [-16.0, -17.5, -16.75, -15.5, -15.0].map(|lowest| extreme / lowest);
    let d = search::symmetric::<Grid, _, _>(values, weights, starts, search::half);
    let codes = search::codes::<Grid, BLOCK>(values, d);
    block[..2].copy_from_slice(&half_bytes(d));
    pack_five_bits(&codes.map(|code| (code + 16) as u8), &mut block[2..]);
}

/// 5-bit codes as the upper bits [4] and the low 4 bits [16].
pub(super) fn pack_five_bits(codes: &[u8; BLOCK], packed: &mut [u8]) {
    let high = codes.iter().enumerate().fold(0u32, |high, (i, code)| high | u32::from(code >> 4) << i);
    packed[..4].copy_from_slice(&high.to_le_bytes());
    for i in 0..16 {
        packed[4 + i] = (codes[i] & 0x0f) | codes[i + 16] << 4;
    }
}
