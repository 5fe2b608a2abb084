//! Q8_0: w = d q, q of 8 bits with sign, d in half precision for 32 values.
//!
//! Bytes: d [2], codes [32].

use super::int8::{IntegerForm, Parts};
use super::scales::{half_at, half_bytes};
use super::search;
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 32;
/// Bytes of a block.
pub(super) const BYTES: usize = 34;

/// What codes stand for.
type Grid = search::Integers<-127, 127>;

/// As whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> =
    Some(IntegerForm { group: 32, zero: 128, offsets: false, bits: 8, nested: false, table: None, split });

fn split(block: &[u8], parts: &mut Parts) {
    let Some(block) = block.first_chunk::<BYTES>() else { return };
    let Parts { codes, scales, .. } = parts;
    scales[0] = half_at(block, 0);
    for (code, byte) in codes.iter_mut().zip(&block[2..]) {
        *code = byte ^ 0x80;
    }
}

/// w = d q.
#[inline(always)]
pub(super) fn dequantize(blocks: &[u8], out: &mut [f32]) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = half_at(block, 0);
        for i in 0..32 {
            out[i] = d * f32::from(block[2 + i] as i8);
        }
    }
}

/// The better of the scale that reaches the greatest value and its least-squares refinements; codes from −127 to 127.
pub(super) fn quantize(values: &[f32; BLOCK], weights: impl Weights, block: &mut [u8; BYTES]) {
    let extreme = search::signed_extreme(values).abs();
    let d = search::symmetric::<Grid, _, _>(values, weights, [extreme / 127.0], search::half);
    let codes = search::codes::<Grid, BLOCK>(values, d);
    block[..2].copy_from_slice(&half_bytes(d));
    for i in 0..32 {
        block[2 + i] = codes[i] as u8;
    }
}
