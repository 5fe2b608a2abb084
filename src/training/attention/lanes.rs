//! What happens to squares of scores between products on AMX: a query is a lane, two vectors are a row.
//!
//! Exponentials are powers of two, to 3·10⁻⁶ of themselves: they are rounded to bfloat16, a thousand times coarser.

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;
use std::array::from_fn;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

use super::Shape;
use crate::quant::matmul::Line;
use crate::quant::matmul::tiles::x86::{interleaved, rounded};

/// Queries of a row.
pub(super) const LANES: usize = 32;
/// What no score is below: a query's largest before there is one.
const LEAST: f32 = -3e38;

/// Which of a tile's queries see a key, by where the key's row is.
#[derive(Clone, Copy)]
pub(super) struct Sight {
    /// The first key's position less the first query's.
    first: i64,
    /// Tokens that a token sees.
    window: i64,
    /// Queries that there are.
    count: i64,
}

impl Sight {
    /// Of keys from the position `key` on.
    pub(super) fn new(shape: &Shape<'_>, positions: &Range<usize>, key: usize) -> Self {
        let window = shape.window.and_then(|window| i64::try_from(window).ok()).unwrap_or(i64::MAX / 2);
        Self { first: key as i64 - positions.start as i64, window, count: positions.len() as i64 }
    }

    /// A bit for each query that sees the key of a row.
    fn of(&self, row: usize) -> [__mmask16; 2] {
        let first = self.first + row as i64;
        let below = |end: i64| ((1u64 << end.clamp(0, LANES as i64)) - 1) as u32;
        let seen = below(self.count.min(first.saturating_add(self.window))) & !below(first);
        [seen as u16, (seen >> 16) as u16]
    }
}

/// What each query has summed up so far.
pub(super) struct Stats {
    /// Its largest score, a power of two's exponent.
    largest: [__m512; 2],
    /// Its sum of exponentials, as a share of the largest.
    totals: [__m512; 2],
}

impl Stats {
    /// # Safety
    /// The machine has AVX-512.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn new() -> Self {
        Self { largest: [_mm512_set1_ps(LEAST); 2], totals: [_mm512_setzero_ps(); 2] }
    }

    /// What y is to be divided by, and m.
    pub(super) fn done(&self) -> [[f32; LANES]; 2] {
        // SAFETY: two vectors are as many numbers.
        let [largest, totals] =
            unsafe { std::mem::transmute::<[[__m512; 2]; 2], [[f32; LANES]; 2]>([self.largest, self.totals]) };
        [totals, from_fn(|lane| largest[lane] * LN_2 + totals[lane].ln())]
    }

    /// Scores `[keys, 32]` to exponentials, in lines of two keys' `[2, stride, 16]`; what a query has summed up so far is
    /// scaled to its largest score, and so are its `sums` `[.., 32]`.
    ///
    /// # Safety
    /// The machine has AVX-512 with BF16; the slices begin at lines of the cache.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn shares(
        &mut self,
        scores: &[f32],
        sight: Sight,
        scale: f32,
        sums: &mut [f32],
        out: &mut [Line],
        stride: usize,
    ) {
        let factor = _mm512_set1_ps(scale * LOG2_E);
        let mut most = self.largest;
        for (row, scores) in scores.chunks_exact(LANES).enumerate() {
            for (half, seen) in sight.of(row).into_iter().enumerate() {
                // SAFETY: a row is two vectors.
                let score = _mm512_mul_ps(factor, unsafe { _mm512_load_ps(scores.as_ptr().add(16 * half)) });
                most[half] = _mm512_mask_max_ps(most[half], seen, most[half], score);
            }
        }
        let grown: [__mmask16; 2] = from_fn(|half| _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(most[half], self.largest[half]));
        if grown != [0; 2] {
            let factors: [__m512; 2] = from_fn(|half| power(_mm512_sub_ps(self.largest[half], most[half])));
            self.totals = from_fn(|half| _mm512_mul_ps(self.totals[half], factors[half]));
            for (place, sums) in sums.chunks_exact_mut(16).enumerate() {
                // SAFETY: a row is two vectors.
                unsafe {
                    let scaled = _mm512_mul_ps(_mm512_load_ps(sums.as_ptr()), factors[place % 2]);
                    _mm512_store_ps(sums.as_mut_ptr(), scaled);
                }
            }
            self.largest = most;
        }
        for (pair, scores) in scores.chunks_exact(2 * LANES).enumerate() {
            let sights = [sight.of(2 * pair), sight.of(2 * pair + 1)];
            for half in 0..2 {
                let shares: [__m512; 2] = from_fn(|row| {
                    // SAFETY: a row is two vectors.
                    let score = unsafe { _mm512_load_ps(scores.as_ptr().add(LANES * row + 16 * half)) };
                    seen_power(sights[row][half], _mm512_fmsub_ps(factor, score, most[half]))
                });
                self.totals[half] = _mm512_add_ps(self.totals[half], _mm512_add_ps(shares[0], shares[1]));
                // SAFETY: a line is a vector.
                unsafe {
                    _mm512_store_si512((&raw mut out[half * stride + pair]).cast(), interleaved(rounded(shares)))
                };
            }
        }
    }
}

/// What P and E become, in bfloat16.
pub(super) struct Slopes<'a> {
    /// P, a line for each key.
    pub p: &'a mut [Line],
    /// E, a line for each key.
    pub e: &'a mut [Line],
    /// E in lines of two keys' `[2, stride, 16]`.
    pub pairs: &'a mut [Line],
    /// As in [`Slopes::pairs`].
    pub stride: usize,
}

impl Slopes<'_> {
    /// From scores and products `[keys, 32]`, and m and δ of each query.
    ///
    /// # Safety
    /// As of [`Stats::shares`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn fill(
        &mut self,
        [scores, products]: [&[f32]; 2],
        sight: Sight,
        scale: f32,
        own: &[[f32; LANES]; 2],
    ) {
        let (factor, scale) = (_mm512_set1_ps(scale * LOG2_E), _mm512_set1_ps(scale));
        // SAFETY: as many numbers are two vectors.
        let [m, delta]: [[__m512; 2]; 2] = unsafe { std::mem::transmute::<[[f32; LANES]; 2], _>(*own) };
        let m = m.map(|m| _mm512_mul_ps(m, _mm512_set1_ps(LOG2_E)));
        for (pair, (scores, products)) in
            scores.chunks_exact(2 * LANES).zip(products.chunks_exact(2 * LANES)).enumerate()
        {
            let both: [[[__m512; 2]; 2]; 2] = from_fn(|row| {
                let sight = sight.of(2 * pair + row);
                from_fn(|half| {
                    // SAFETY: a row is two vectors.
                    let [score, product] = [scores, products]
                        .map(|numbers| unsafe { _mm512_load_ps(numbers.as_ptr().add(LANES * row + 16 * half)) });
                    let share = seen_power(sight[half], _mm512_fmsub_ps(factor, score, m[half]));
                    let product = _mm512_mul_ps(scale, _mm512_sub_ps(product, delta[half]));
                    [share, _mm512_maskz_mul_ps(sight[half], share, product)]
                })
            });
            for (row, found) in both.iter().enumerate() {
                let [p, e] = from_fn(|which| rounded(found.map(|found| found[which])));
                // SAFETY: a line is a vector.
                unsafe {
                    _mm512_store_si512((&raw mut self.p[2 * pair + row]).cast(), p);
                    _mm512_store_si512((&raw mut self.e[2 * pair + row]).cast(), e);
                }
            }
            for half in 0..2 {
                let line = interleaved(rounded(both.map(|row| row[half][1])));
                // SAFETY: as above.
                unsafe { _mm512_store_si512((&raw mut self.pairs[half * self.stride + pair]).cast(), line) };
            }
        }
    }
}

/// 2^x.
#[inline]
#[target_feature(enable = "avx512f")]
fn power(x: __m512) -> __m512 {
    seen_power(!0, x)
}

/// 2^x where it is seen, and 0.
#[inline]
#[target_feature(enable = "avx512f")]
fn seen_power(seen: __mmask16, x: __m512) -> __m512 {
    let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let rest = _mm512_sub_ps(x, whole);
    let mut sum = _mm512_set1_ps(1.333_355_8e-3); // ln 2 to the k over k!, from the fifth on
    for factor in [9.618_129e-3, 5.550_411e-2, 0.240_226_5, LN_2, 1.0] {
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
    }
    _mm512_maskz_scalef_ps(seen, sum, whole)
}
