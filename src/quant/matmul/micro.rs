//! Dot products in 16 lanes, on each kind of processor, equal to the bit.
//!
//! ```text
//! lane_l = Σ_i a[16 i + l] · b[16 i + l]  (fused)      dot = ((lane_0 + lane_8) + (lane_4 + lane_12)) + …  + rest
//! ```
//! Lanes are added up in halves: l and l + 8, then l and l + 4, l + 2, l + 1. What is left over behind the last 16 is
//! summed in order and added last.

use super::super::Kind;

/// Which instructions are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// What every processor has; the reference.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Path {
    /// All that this machine has, the best last.
    pub fn all() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(Self::Avx2);
                let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
                if wide && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512vl") {
                    found.push(Self::Avx512);
                }
            }
        }
        found
    }

    /// The best that this machine has.
    pub fn best() -> Self {
        static BEST: std::sync::OnceLock<Path> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Self::all().pop().unwrap_or(Self::Portable))
    }

    /// The products of up to [`ROWS`] rows with four, all of `columns` numbers; panics where they have other lengths.
    #[inline]
    pub fn dots(self, x: &[f32], w: [&[f32]; 4], columns: usize, out: &mut [[f32; 4]; ROWS]) {
        let w = w.map(|w| &w[..columns]);
        let row = |t: usize| &x[t * columns..][..columns];
        match self {
            Self::Portable => each(row, x.len() / columns, out, |x| w.map(|w| portable(x, w))),
            // SAFETY: the machine has the features (`all`), and the rows are as long as x.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => each(row, x.len() / columns, out, |x| unsafe { x86::avx2_1x4(x, w) }),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => match x.len() / columns {
                // SAFETY: the machine has the features (`all`), and all rows are as long as the first.
                6 => *out = unsafe { x86::avx512::<6>(std::array::from_fn(row), w) },
                // SAFETY: as above.
                count => each(row, count, out, |x| unsafe { x86::avx512::<1>([x], w) }[0]),
            },
        }
    }

    /// Asks for the first bytes of what comes next: converting blocks takes so many instructions for so few bytes that
    /// the processor by itself sees too short a way ahead to hide the memory's latency.
    #[inline]
    pub(super) fn prefetch(self, next: &[u8], most: usize) {
        #[cfg(target_arch = "x86_64")]
        for line in next[..most.min(next.len())].chunks(64) {
            // SAFETY: the address is inside the slice, and prefetching changes nothing.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (next, most);
    }

    /// The values of blocks.
    #[inline]
    pub(super) fn dequantize(self, kind: Kind, blocks: &[u8], out: &mut [f32]) {
        match self {
            Self::Portable => kind.dequantize(blocks, out),
            // SAFETY: the machine has the features (`all`).
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { x86::avx2_dequantize(kind, blocks, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { x86::avx512_dequantize(kind, blocks, out) },
        }
    }
}

/// Rows whose products with four rows fit into the widest processor's registers.
pub const ROWS: usize = 6;

#[inline(always)]
fn each<'a>(
    row: impl Fn(usize) -> &'a [f32],
    count: usize,
    out: &mut [[f32; 4]; ROWS],
    dot: impl Fn(&[f32]) -> [f32; 4],
) {
    out.iter_mut().take(count).enumerate().for_each(|(t, out)| *out = dot(row(t)));
}

fn portable(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..16 {
            lanes[lane] = a[lane].mul_add(b[lane], lanes[lane]);
        }
    }
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0] + rest(a_rest, b_rest)
}

#[inline(always)]
fn rest(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (a, b)| a.mul_add(*b, sum))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports)]
    use std::arch::x86_64::*;

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
    #[target_feature(enable = "avx512f")]
    fn to_fours([a, b, c, d]: [__m512; 4]) -> __m512 {
        let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
        let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
        _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd))
    }

    /// All rows are as long as the first.
    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512<const ROWS: usize>(x: [&[f32]; ROWS], w: [&[f32]; 4]) -> [[f32; 4]; ROWS] {
        let whole = x[0].len() / 16 * 16;
        let mut sums = [[_mm512_setzero_ps(); 4]; ROWS];
        for at in (0..whole).step_by(16) {
            // SAFETY: at + 16 ≤ whole ≤ the length of every row.
            unsafe {
                let b = w.map(|w| _mm512_loadu_ps(w.as_ptr().add(at)));
                for (sums, x) in sums.iter_mut().zip(&x) {
                    let a = _mm512_loadu_ps(x.as_ptr().add(at));
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = _mm512_fmadd_ps(a, b, *sum);
                    }
                }
            }
        }
        std::array::from_fn(|t| {
            let fours = to_fours(sums[t]);
            let found = finish([
                _mm512_castps512_ps128(fours),
                _mm512_extractf32x4_ps::<1>(fours),
                _mm512_extractf32x4_ps::<2>(fours),
                _mm512_extractf32x4_ps::<3>(fours),
            ]);
            std::array::from_fn(|r| found[r] + rest(&x[t][whole..], &w[r][whole..]))
        })
    }
}
