//! The same on processors of x86-64.
#![allow(clippy::needless_range_loop)] // a row's number picks from several arrays at once

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;
use std::array::from_fn;
use std::ops::Range;

use super::super::super::Kind;
use super::rest;

#[target_feature(enable = "avx2,fma")]
pub(super) fn avx2_dequantize(kind: Kind, blocks: &[u8], out: &mut [f32]) {
    kind.dequantize_256(blocks, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) fn avx512_dequantize(kind: Kind, blocks: &[u8], out: &mut [f32]) {
    kind.dequantize_512(blocks, out);
}

/// The rows of `w` are as long as `x`.
#[target_feature(enable = "avx2,fma")]
pub(super) fn avx2_1x4(x: &[f32], w: [&[f32]; 4]) -> [f32; 4] {
    let whole = x.len() / 16 * 16;
    let mut sums = [[_mm256_setzero_ps(); 2]; 4];
    for at in (0..whole).step_by(16) {
        // SAFETY: at + 16 ≤ whole ≤ the length of every row.
        unsafe {
            let (a, b) = (_mm256_loadu_ps(x.as_ptr().add(at)), _mm256_loadu_ps(x.as_ptr().add(at + 8)));
            for (sums, w) in sums.iter_mut().zip(&w) {
                sums[0] = _mm256_fmadd_ps(a, _mm256_loadu_ps(w.as_ptr().add(at)), sums[0]);
                sums[1] = _mm256_fmadd_ps(b, _mm256_loadu_ps(w.as_ptr().add(at + 8)), sums[1]);
            }
        }
    }
    let eights = sums.map(|[low, high]| _mm256_add_ps(low, high));
    let fours = eights.map(|sum| _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum)));
    let found = finish(fours);
    std::array::from_fn(|r| found[r] + rest(&x[whole..], &w[r][whole..]))
}

/// Adds the lanes of four vectors: l and l + 2, then l and l + 1.
#[inline]
#[target_feature(enable = "avx")]
fn finish([a, b, c, d]: [__m128; 4]) -> [f32; 4] {
    let ab = _mm_add_ps(_mm_shuffle_ps::<0x44>(a, b), _mm_shuffle_ps::<0xee>(a, b));
    let cd = _mm_add_ps(_mm_shuffle_ps::<0x44>(c, d), _mm_shuffle_ps::<0xee>(c, d));
    let sums = _mm_add_ps(_mm_shuffle_ps::<0x88>(ab, cd), _mm_shuffle_ps::<0xdd>(ab, cd));
    let mut found = [0.0; 4];
    // SAFETY: room for four floats.
    unsafe { _mm_storeu_ps(found.as_mut_ptr(), sums) };
    found
}

/// The sums of four vectors of 16 lanes, as four lanes each in one 128-bit part of the result.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn to_fours([a, b, c, d]: [__m512; 4]) -> __m512 {
    let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
    let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
    _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd))
}

/// Adds the lanes of four vectors of [`to_fours`] as [`finish`] does: four sums of each, one vector's after another's.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn finish_fours([a, b, c, d]: [__m512; 4]) -> __m512 {
    let ab = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b));
    let cd = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(c, d), _mm512_shuffle_ps::<0xee>(c, d));
    let sums = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(ab, cd), _mm512_shuffle_ps::<0xdd>(ab, cd));
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_ps(order, sums)
}

/// The products of ROWS rows of `columns` numbers with four that begin `stride` apart; four from `next` on are asked for
/// meanwhile.
///
/// Where they are not taken as a WHOLE, those of `part` are added to what `kept` `[ROWS, 4, 16]` has of those before; only
/// the last part gives products, the others leave their sums in `kept`.
///
/// # Safety
/// All rows of x and of w are there, and `kept` where there are several parts; parts begin at multiples of 16.
#[target_feature(enable = "avx512f,avx512vl")]
pub(super) unsafe fn avx512<const ROWS: usize, const WHOLE: bool>(
    x: *const f32,
    w: *const f32,
    stride: usize,
    next: *const f32,
    columns: usize,
    part: &Range<usize>,
    kept: *mut f32,
) -> [[f32; 4]; ROWS] {
    let whole = columns / 16 * 16;
    let mut sums = [[_mm512_setzero_ps(); 4]; ROWS];
    let place = |t: usize, r: usize| kept.wrapping_add((t * 4 + r) * 16);
    if !WHOLE && part.start > 0 {
        // SAFETY: the caller's promise.
        sums = from_fn(|t| from_fn(|r| unsafe { _mm512_load_ps(place(t, r)) }));
    }
    // without avx512vl, and with more pointers, compilers hold some of the sums in memory
    let (start, end) = if WHOLE { (0, whole) } else { (part.start, whole.min(part.end)) };
    for at in (start..end).step_by(16) {
        // SAFETY: at + 16 ≤ whole ≤ the length of every row; prefetching changes nothing.
        unsafe {
            let b: [_; 4] = from_fn(|r| _mm512_loadu_ps(w.add(r * stride + at)));
            if ROWS > 1 {
                for r in 0..4 {
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(r * columns + at).cast());
                }
            }
            for t in 0..ROWS {
                let a = _mm512_loadu_ps(x.add(t * columns + at));
                for r in 0..4 {
                    sums[t][r] = _mm512_fmadd_ps(a, b[r], sums[t][r]);
                }
            }
        }
    }
    if !WHOLE && part.end < columns {
        for t in 0..ROWS {
            // SAFETY: the caller's promise.
            (0..4).for_each(|r| unsafe { _mm512_store_ps(place(t, r), sums[t][r]) });
        }
        return [[0.0; 4]; ROWS];
    }
    let mut fours = [_mm512_setzero_ps(); ROWS];
    for t in 0..ROWS {
        fours[t] = to_fours(sums[t]);
    }
    let mut out = [[0.0; 4]; ROWS];
    for (index, out) in out.chunks_mut(4).enumerate() {
        let found = finish_fours(std::array::from_fn(|t| fours[(4 * index + t).min(ROWS - 1)]));
        let mut four_rows = [[0.0; 4]; 4];
        // SAFETY: room for sixteen floats.
        unsafe { _mm512_storeu_ps(four_rows.as_mut_ptr().cast(), found) };
        out.copy_from_slice(&four_rows[..out.len()]);
    }
    if whole < columns {
        // SAFETY: all rows are there.
        let row = |start: *const f32, row: usize| unsafe {
            std::slice::from_raw_parts(start.add(row + whole), columns - whole)
        };
        for (t, out) in out.iter_mut().enumerate() {
            for (r, out) in out.iter_mut().enumerate() {
                *out += rest(row(x, t * columns), row(w, r * stride));
            }
        }
    }
    out
}

/// Rows that are asked for before they are used: the parts of rows that a head has are so short that the processor by
/// itself sees too short a way ahead to hide the memory's latency.
const AHEAD: usize = 16;

/// sums[t] += Σ_s shares[t · stride + s] · values[s] for ROWS rows of sums, all of them and all values `width` wide; values
/// behind the first `count` are asked for meanwhile.
///
/// # Safety
/// There are `count` values, every t · stride + s is inside `shares`, every value has `width` numbers, and sums ROWS × `width`.
#[target_feature(enable = "avx512f,avx512vl")]
pub(super) unsafe fn avx512_weighted<const ROWS: usize>(
    shares: &[f32],
    stride: usize,
    values: &[&[f32]],
    count: usize,
    width: usize,
    sums: &mut [f32],
) {
    let sums = sums.as_mut_ptr();
    // SAFETY: the caller's promise; the steps end before `width`.
    unsafe {
        let mut at = 0;
        while at + 64 <= width {
            avx512_columns::<ROWS, 4>(shares, stride, values, count, width, sums.add(at), at);
            at += 64;
        }
        while at + 16 <= width {
            avx512_columns::<ROWS, 1>(shares, stride, values, count, width, sums.add(at), at);
            at += 16;
        }
        last_columns::<ROWS>(shares, stride, &values[..count], width, sums, at);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn avx512_columns<const ROWS: usize, const VECTORS: usize>(
    shares: &[f32],
    stride: usize,
    values: &[&[f32]],
    count: usize,
    width: usize,
    sums: *mut f32,
    at: usize,
) {
    // SAFETY: the promise of the caller's caller, and 16 · VECTORS columns from `at` on exist.
    unsafe {
        let mut found = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        for (t, found) in found.iter_mut().enumerate() {
            for (v, found) in found.iter_mut().enumerate() {
                *found = _mm512_loadu_ps(sums.add(t * width + 16 * v));
            }
        }
        for (s, value) in values[..count].iter().enumerate() {
            if let Some(next) = values.get(s + AHEAD) {
                let next = next.as_ptr().wrapping_add(at);
                (0..VECTORS).for_each(|v| _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(16 * v).cast()));
            }
            let value = value.as_ptr().add(at);
            let value: [_; VECTORS] = std::array::from_fn(|v| _mm512_loadu_ps(value.add(16 * v)));
            for (t, found) in found.iter_mut().enumerate() {
                let share = _mm512_set1_ps(*shares.as_ptr().add(t * stride + s));
                for (found, value) in found.iter_mut().zip(value) {
                    *found = _mm512_fmadd_ps(share, value, *found);
                }
            }
        }
        for (t, found) in found.iter().enumerate() {
            for (v, found) in found.iter().enumerate() {
                _mm512_storeu_ps(sums.add(t * width + 16 * v), *found);
            }
        }
    }
}

/// The same on AVX2.
///
/// # Safety
/// As for [`avx512_weighted`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2_weighted<const ROWS: usize>(
    shares: &[f32],
    stride: usize,
    values: &[&[f32]],
    width: usize,
    sums: &mut [f32],
) {
    let sums = sums.as_mut_ptr();
    let whole = width / 16 * 16;
    // SAFETY: the caller's promise; the steps end before `width`.
    unsafe {
        for at in (0..whole).step_by(16) {
            let mut found = [[_mm256_setzero_ps(); 2]; ROWS];
            for (t, found) in found.iter_mut().enumerate() {
                *found = [0, 8].map(|v| _mm256_loadu_ps(sums.add(t * width + at + v)));
            }
            for (s, value) in values.iter().enumerate() {
                let value = [0, 8].map(|v| _mm256_loadu_ps(value.as_ptr().add(at + v)));
                for (t, found) in found.iter_mut().enumerate() {
                    let share = _mm256_set1_ps(*shares.as_ptr().add(t * stride + s));
                    found[0] = _mm256_fmadd_ps(share, value[0], found[0]);
                    found[1] = _mm256_fmadd_ps(share, value[1], found[1]);
                }
            }
            for (t, found) in found.iter().enumerate() {
                _mm256_storeu_ps(sums.add(t * width + at), found[0]);
                _mm256_storeu_ps(sums.add(t * width + at + 8), found[1]);
            }
        }
        last_columns::<ROWS>(shares, stride, values, width, sums, whole);
    }
}

#[inline]
#[target_feature(enable = "fma")]
unsafe fn last_columns<const ROWS: usize>(
    shares: &[f32],
    stride: usize,
    values: &[&[f32]],
    width: usize,
    sums: *mut f32,
    from: usize,
) {
    for at in from..width {
        for t in 0..ROWS {
            // SAFETY: the promise of the caller's caller; at < width.
            unsafe {
                let sum = &mut *sums.add(t * width + at);
                for (s, value) in values.iter().enumerate() {
                    *sum = shares.get_unchecked(t * stride + s).mul_add(*value.get_unchecked(at), *sum);
                }
            }
        }
    }
}

/// out[t · stride + s] = Σ_d queries[t · width + d] · keys[s][d] for ROWS queries, all of them and all keys `width` wide;
/// keys behind the first `count` are asked for meanwhile.
///
/// Sixteen keys are turned into columns in registers, eight numbers at a time.
///
/// # Safety
/// There are `count` keys, every one of them has `width` numbers, queries ROWS × `width`, and every t · stride + s is inside
/// `out`.
#[target_feature(enable = "avx512f,avx512vl,avx512dq")]
pub(super) unsafe fn avx512_scores<const ROWS: usize>(
    queries: &[f32],
    keys: &[&[f32]],
    count: usize,
    width: usize,
    out: &mut [f32],
    stride: usize,
) {
    let whole = width / 8 * 8;
    for first in (0..count).step_by(16) {
        // the last key stands for those that are not there
        let rows: [_; 16] = std::array::from_fn(|s| keys[(first + s).min(count - 1)].as_ptr());
        let next: [_; 16] = std::array::from_fn(|s| keys[(first + AHEAD + s).min(keys.len() - 1)].as_ptr());
        let there = (0xffff_u32 >> (16 - (count - first).min(16))) as __mmask16;
        let mut sums = [_mm512_setzero_ps(); ROWS];
        // SAFETY: the caller's promise; at + 8 ≤ whole ≤ width, only keys that are there get a score, and prefetching
        // changes nothing.
        unsafe {
            for at in (0..whole).step_by(8) {
                // of a line of sixteen numbers, half of the rows each time
                for next in &next[at % 16..][..8] {
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(at).cast());
                }
                for (d, column) in columns_16x8(rows.map(|row| row.add(at))).into_iter().enumerate() {
                    for t in 0..ROWS {
                        let query = _mm512_set1_ps(*queries.as_ptr().add(t * width + at + d));
                        sums[t] = _mm512_fmadd_ps(query, column, sums[t]);
                    }
                }
            }
            for t in 0..ROWS {
                _mm512_mask_storeu_ps(out.as_mut_ptr().add(t * stride + first), there, sums[t]);
            }
        }
    }
    last_scores(queries, &keys[..count], width, out, stride, whole);
}

/// The same on AVX2, eight keys at a time.
///
/// # Safety
/// As for [`avx512_scores`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2_scores<const ROWS: usize>(
    queries: &[f32],
    keys: &[&[f32]],
    width: usize,
    out: &mut [f32],
    stride: usize,
) {
    let whole = width / 8 * 8;
    for (tile, keys) in keys.chunks(8).enumerate() {
        let rows: [_; 8] = std::array::from_fn(|s| keys[s.min(keys.len() - 1)].as_ptr());
        let mut sums = [_mm256_setzero_ps(); ROWS];
        // SAFETY: the caller's promise; at + 8 ≤ whole ≤ width.
        unsafe {
            for at in (0..whole).step_by(8) {
                for (d, column) in columns_8x8(rows.map(|row| row.add(at))).into_iter().enumerate() {
                    for t in 0..ROWS {
                        let query = _mm256_set1_ps(*queries.as_ptr().add(t * width + at + d));
                        sums[t] = _mm256_fmadd_ps(query, column, sums[t]);
                    }
                }
            }
        }
        for (t, sums) in sums.into_iter().enumerate() {
            let mut found = [0.0; 8];
            // SAFETY: room for eight floats.
            unsafe { _mm256_storeu_ps(found.as_mut_ptr(), sums) };
            out[t * stride + 8 * tile..][..keys.len()].copy_from_slice(&found[..keys.len()]);
        }
    }
    last_scores(queries, keys, width, out, stride, whole);
}

/// Adds the products of what is left over from `from` on.
#[inline]
#[target_feature(enable = "fma")]
fn last_scores(queries: &[f32], keys: &[&[f32]], width: usize, out: &mut [f32], stride: usize, from: usize) {
    if from == width {
        return;
    }
    for (t, query) in queries.chunks_exact(width).enumerate() {
        for (out, key) in out[t * stride..].iter_mut().zip(keys) {
            *out = query[from..].iter().zip(&key[from..width]).fold(*out, |sum, (a, b)| a.mul_add(*b, sum));
        }
    }
}

/// Eight numbers of sixteen rows, by columns: two rows of 256 bits are loaded as one, so that two lanes of 128 are already
/// where they belong, and what is left are three steps.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512dq")]
unsafe fn columns_16x8(from: [*const f32; 16]) -> [__m512; 8] {
    let rows: [__m512; 8] = std::array::from_fn(|i| {
        let low = i / 4 * 8 + i % 4;
        // SAFETY: the caller's promise.
        let (a, b) = unsafe { (_mm256_loadu_ps(from[low]), _mm256_loadu_ps(from[low + 4])) };
        _mm512_insertf32x8::<1>(_mm512_castps256_ps512(a), b)
    });
    let pairs: [__m512; 8] = std::array::from_fn(|i| {
        let (a, b) = (rows[i / 2 * 2], rows[i / 2 * 2 + 1]);
        if i % 2 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) }
    });
    // of four rows, and of those four further down, number d and number d + 4
    let fours: [__m512; 8] = std::array::from_fn(|i| {
        let (a, b) = (pairs[i / 4 * 4 + i % 4 / 2], pairs[i / 4 * 4 + i % 4 / 2 + 2]);
        if i % 2 == 0 { _mm512_shuffle_ps::<0x44>(a, b) } else { _mm512_shuffle_ps::<0xee>(a, b) }
    });
    std::array::from_fn(|d| {
        let (a, b) = (fours[d % 4], fours[d % 4 + 4]);
        if d < 4 { _mm512_shuffle_f32x4::<0x88>(a, b) } else { _mm512_shuffle_f32x4::<0xdd>(a, b) }
    })
}

/// Eight numbers of sixteen rows, to eight rows `stride` apart.
///
/// # Safety
/// They can be read, and the others written.
#[target_feature(enable = "avx512f,avx512vl,avx512dq")]
pub(super) unsafe fn transpose_16x8(from: [*const f32; 16], to: *mut f32, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        for (d, column) in columns_16x8(from).into_iter().enumerate() {
            _mm512_storeu_ps(to.add(d * stride), column);
        }
    }
}

/// Eight numbers of eight rows, to eight rows `stride` apart.
///
/// # Safety
/// They can be read, and the others written.
#[target_feature(enable = "avx")]
pub(super) unsafe fn transpose_8x8(from: [*const f32; 8], to: *mut f32, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        for (d, column) in columns_8x8(from).into_iter().enumerate() {
            _mm256_storeu_ps(to.add(d * stride), column);
        }
    }
}

/// Eight numbers of eight rows, by columns.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn columns_8x8(from: [*const f32; 8]) -> [__m256; 8] {
    // SAFETY: the caller's promise.
    let rows = from.map(|row| unsafe { _mm256_loadu_ps(row) });
    let pairs: [__m256; 8] = std::array::from_fn(|i| {
        let (a, b) = (rows[i / 2 * 2], rows[i / 2 * 2 + 1]);
        if i % 2 == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) }
    });
    let fours: [__m256; 8] = std::array::from_fn(|i| {
        let (a, b) = (pairs[i / 4 * 4 + i % 4 / 2], pairs[i / 4 * 4 + i % 4 / 2 + 2]);
        if i % 2 == 0 { _mm256_shuffle_ps::<0x44>(a, b) } else { _mm256_shuffle_ps::<0xee>(a, b) }
    });
    std::array::from_fn(|d| {
        let (a, b) = (fours[d % 4], fours[d % 4 + 4]);
        if d < 4 { _mm256_permute2f128_ps::<0x20>(a, b) } else { _mm256_permute2f128_ps::<0x31>(a, b) }
    })
}
