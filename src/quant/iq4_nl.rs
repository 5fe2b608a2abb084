//! IQ4_NL: w = d t[q], q of 4 bits into a table of unequal steps, d in half precision for 32 values.
//!
//! Bytes: d [2], codes [16] laid out as in Q4_0.

use super::int8::{IntegerForm, Parts};
#[cfg(target_arch = "x86_64")]
use super::scales::x86;
use super::scales::{half_at, half_bytes};
use super::search::{self, Codes};
use super::weights::Weights;

/// Values in a block.
pub(super) const BLOCK: usize = 32;
/// Bytes of a block.
pub(super) const BYTES: usize = 18;

/// The values of the codes: closer together near zero, where most weights are.
pub(super) const TABLE: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The same above 128 more.
pub(super) const CODES: [u8; 16] = {
    let (mut codes, mut i) = ([0; 16], 0);
    while i < 16 {
        (codes[i], i) = (TABLE[i] as u8 ^ 0x80, i + 1);
    }
    codes
};

/// As whole numbers.
pub(super) const INTEGERS: Option<IntegerForm> =
    Some(IntegerForm { group: 32, zero: 128, offsets: false, bits: 4, nested: false, table: Some(&CODES), split });

fn split(block: &[u8], parts: &mut Parts) {
    let Some(block) = block.first_chunk::<BYTES>() else { return };
    let Parts { codes, scales, .. } = parts;
    scales[0] = half_at(block, 0);
    for i in 0..16 {
        codes[i] = block[2 + i] & 0x0f;
        codes[i + 16] = block[2 + i] >> 4;
    }
}

/// w = d t[q].
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
fn each(blocks: &[u8], out: &mut [f32], put: impl Fn(&[u8; 16], f32, &mut [f32; BLOCK])) {
    for (block, out) in blocks.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        put(block.last_chunk().unwrap_or(&[0; 16]), half_at(block, 0), out); // there always is one: the block is longer
    }
}

/// 32 values of one scale.
#[inline(always)]
pub(super) fn plain(codes: &[u8; 16], d: f32, out: &mut [f32; 32]) {
    for (i, codes) in codes.iter().enumerate() {
        out[i] = d * f32::from(TABLE[usize::from(codes & 0x0f)]);
        out[i + 16] = d * f32::from(TABLE[usize::from(codes >> 4)]);
    }
}

/// The best of several scales, by squared error.
pub(super) fn quantize(values: &[f32; BLOCK], weights: impl Weights, block: &mut [u8; BYTES]) {
    let extreme = search::signed_extreme(values);
    let starts = [-127.0, -137.0, -117.0, 113.0, 121.0].map(|end| extreme / end);
    let d = search::symmetric::<Table, _, _>(values, weights, starts, search::half);
    let codes = search::codes::<Table, BLOCK>(values, d).map(code_of);
    block[..2].copy_from_slice(&half_bytes(d));
    for i in 0..16 {
        block[2 + i] = codes[i] | codes[i + 16] << 4;
    }
}

/// The values of [`TABLE`].
pub(super) struct Table;

impl Codes for Table {
    fn nearest(scaled: f32) -> f32 {
        // a sum of steps at the middles between neighbours, without a branch
        let mut value = f32::from(TABLE[0]);
        for pair in TABLE.windows(2) {
            let (low, high) = (f32::from(pair[0]), f32::from(pair[1]));
            value += if scaled > (low + high) / 2.0 { high - low } else { 0.0 };
        }
        value
    }
}

/// The code of a value of the table; of another, that of the next lower one.
pub(super) fn code_of(value: i8) -> u8 {
    TABLE.iter().skip(1).filter(|&&entry| entry <= value).count() as u8
}
