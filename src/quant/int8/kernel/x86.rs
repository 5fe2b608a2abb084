//! The same on processors of x86-64.
#![allow(clippy::needless_range_loop)] // a row's number picks from several arrays at once

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;

use super::super::{IntegerForm, PLANE, ROWS, STEP};
use super::{Found, Inputs};

/// 32 values in 8 bits, as the portable function does it.
#[target_feature(enable = "avx2")]
pub(super) fn round(x: &[f32; STEP]) -> ([i8; STEP], f32, [i32; 2]) {
    // SAFETY: 32 floats are there.
    let values: [__m256; 4] = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * i)) });
    let sign = _mm256_set1_ps(-0.0);
    let mut largest = _mm256_setzero_ps();
    let mut nan = _mm256_setzero_ps();
    for value in values {
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, value));
        nan = _mm256_or_ps(nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
    }
    let four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps::<1>(largest));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    let largest = _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    let (inverse, scale) = super::scales(largest, _mm256_movemask_ps(nan) != 0);
    let mut codes = [0; STEP];
    if inverse == 0.0 {
        return (codes, scale, [0; 2]);
    }
    let inverse = _mm256_set1_ps(inverse);
    let mut whole = [_mm256_setzero_si256(); 4];
    for (whole, value) in whole.iter_mut().zip(values) {
        *whole = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse)); // ties to even
    }
    let sum = |a: __m256i, b: __m256i| {
        let eight = _mm256_add_epi32(a, b);
        let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0x4e>(four));
        _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0xb1>(two)))
    };
    let sums = [sum(whole[0], whole[1]), sum(whole[2], whole[3])];
    let (low, high) = (_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
    // packing works in halves of 128 bits: the fours of values come out of order
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    // SAFETY: room for 32 bytes.
    unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), packed) };
    (codes, scale, sums)
}

/// Bytes ahead of what is used that are asked for: the processor by itself looks too short a way ahead.
const AHEAD: usize = 8192;

/// What a kernel needs to know: tiles that stand one after another, and a panel of x.
struct Work<'a> {
    integers: &'a IntegerForm,
    tiles: *const u8,
    steps: usize,
    /// a `[steps, 8, ROWS]`, four together.
    codes: *const i32,
    /// s `[steps, ROWS]`.
    scales: *const f32,
    /// −z Σ a `[steps, groups, ROWS]`.
    starts: *const i32,
    /// s Σ a `[steps, groups, ROWS]`, where there are offsets.
    sums: *const f32,
}

impl Work<'_> {
    /// Four codes of row t.
    ///
    /// # Safety
    /// `step` < steps, `four` < 8, t < ROWS.
    #[inline(always)]
    unsafe fn four(&self, step: usize, four: usize, t: usize) -> i32 {
        // SAFETY: the caller's promise; four bytes need not be aligned as a number is.
        unsafe { self.codes.add((step * 8 + four) * ROWS + t).read_unaligned() }
    }
}

/// The products of a panel's first `rows` rows with one tile, or, with VNNI, up to two, to `[tile][row]`.
///
/// # Safety
/// The machine has the path's features, the tiles are whole, and the inputs have the lengths that `Path::product` checks
/// and this panel.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn panel(
    use_vnni: bool,
    integers: &IntegerForm,
    tiles: &[u8],
    inputs: &Inputs<'_>,
    steps: usize,
    panel: usize,
    rows: usize,
    out: &mut Found,
) {
    let (rounded, place, groups) = (inputs.rounded, panel * steps * ROWS, integers.groups());
    let work = Work {
        integers,
        tiles: tiles.as_ptr(),
        steps,
        codes: rounded.codes.as_ptr().wrapping_add(place * 8).cast(),
        scales: rounded.scales.as_ptr().wrapping_add(place),
        starts: inputs.starts.as_ptr().wrapping_add(place * groups),
        sums: inputs.sums.as_ptr().wrapping_add(place * groups),
    };
    let two = tiles.len() > steps * integers.step_bytes();
    /// The kernel for some rows (and tiles).
    macro_rules! call {
        ($kernel:ident, $($size:literal),+) => {
            match (integers.bits, groups) {
                (4, 1) => $kernel::<$($size),+, 4, 1>(&work, out),
                (4, _) => $kernel::<$($size),+, 4, 2>(&work, out),
                (5, _) => $kernel::<$($size),+, 5, 1>(&work, out),
                (6, _) => $kernel::<$($size),+, 6, 2>(&work, out),
                _ => $kernel::<$($size),+, 8, 1>(&work, out),
            }
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match (use_vnni, rows) {
            (true, 1) if two => call!(vnni, 1, 2),
            (true, 1) => call!(vnni, 1, 1),
            (true, _) if two => call!(vnni, 4, 2),
            (true, _) => call!(vnni, 4, 1),
            (false, 1) => call!(avx2, 1),
            (false, _) => call!(avx2, 4),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn vnni<const T: usize, const N: usize, const BITS: usize, const GROUPS: usize>(
    work: &Work<'_>,
    out: &mut Found,
) {
    let (bytes, head) = (work.integers.step_bytes(), work.integers.head_bytes());
    let (half, offsets) = (work.integers.half, work.integers.offsets);
    let mask = _mm512_set1_epi8(0x0f);
    let mut sums = [[_mm512_setzero_ps(); T]; N];
    for step in 0..work.steps {
        // SAFETY: each tile has `steps` steps of these bytes, and the inputs as many for each row; prefetching beyond the
        // end changes nothing.
        unsafe {
            let start: [_; N] = std::array::from_fn(|n| work.tiles.add((n * work.steps + step) * bytes));
            for start in start {
                for line in (0..bytes).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(AHEAD + line).cast());
                }
            }
            let mut whole = [[[_mm512_setzero_si512(); T]; N]; GROUPS];
            for (group, whole) in whole.iter_mut().enumerate() {
                for t in 0..T {
                    let start = _mm512_set1_epi32(*work.starts.add((step * GROUPS + group) * ROWS + t));
                    whole.iter_mut().for_each(|whole| whole[t] = start);
                }
            }
            for j in 0..if BITS == 8 { 8 } else { 4 } {
                let bytes = start.map(|start| _mm512_loadu_si512(start.add(head + 64 * j).cast()));
                if BITS == 8 {
                    let group = j / 4 * (GROUPS - 1);
                    for t in 0..T {
                        let a = _mm512_set1_epi32(work.four(step, j, t));
                        for n in 0..N {
                            whole[group][n][t] = _mm512_dpbusd_epi32(whole[group][n][t], bytes[n], a);
                        }
                    }
                    continue;
                }
                let mut low = bytes.map(|bytes| _mm512_and_si512(bytes, mask));
                let mut high = bytes.map(|bytes| _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask));
                for bit in 4..BITS {
                    let value = _mm512_set1_epi8(1 << bit);
                    for n in 0..N {
                        // the codes that have the bit
                        let plane = start[n].add(head + PLANE + (bit - 4) * PLANE / 4).cast::<u64>();
                        low[n] = _mm512_mask_add_epi8(low[n], plane.add(j).read_unaligned(), low[n], value);
                        high[n] = _mm512_mask_add_epi8(high[n], plane.add(4 + j).read_unaligned(), high[n], value);
                    }
                }
                for t in 0..T {
                    let a = _mm512_set1_epi32(work.four(step, j, t));
                    let b = _mm512_set1_epi32(work.four(step, 4 + j, t));
                    for n in 0..N {
                        whole[0][n][t] = _mm512_dpbusd_epi32(whole[0][n][t], low[n], a);
                        let whole = &mut whole[GROUPS - 1][n][t];
                        *whole = _mm512_dpbusd_epi32(*whole, high[n], b);
                    }
                }
            }
            let number = |n: usize, index: usize| {
                if half {
                    _mm512_cvtph_ps(_mm256_loadu_si256(start[n].add(32 * index).cast()))
                } else {
                    _mm512_loadu_ps(start[n].add(64 * index).cast())
                }
            };
            for (group, whole) in whole.iter().enumerate() {
                for n in 0..N {
                    let scale = number(n, group);
                    for t in 0..T {
                        let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*work.scales.add(step * ROWS + t)));
                        sums[n][t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(whole[n][t]), sums[n][t]);
                    }
                }
                if offsets {
                    for n in 0..N {
                        let offset = number(n, GROUPS + group);
                        for t in 0..T {
                            let sum = _mm512_set1_ps(*work.sums.add((step * GROUPS + group) * ROWS + t));
                            sums[n][t] = _mm512_fmadd_ps(offset, sum, sums[n][t]);
                        }
                    }
                }
            }
        }
    }
    for (out, sums) in out.chunks_exact_mut(ROWS).zip(sums) {
        for (out, sum) in out.iter_mut().zip(sums) {
            // SAFETY: room for sixteen floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }
}

/// Bytes of ones where the bits are set, the lowest first.
#[inline]
#[target_feature(enable = "avx2")]
fn spread_bits(bits: u32) -> __m256i {
    let byte = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let each = _mm256_shuffle_epi8(_mm256_set1_epi32(bits.cast_signed()), byte);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
    _mm256_cmpeq_epi8(_mm256_and_si256(each, bit), bit)
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<const T: usize, const BITS: usize, const GROUPS: usize>(work: &Work<'_>, out: &mut Found) {
    let (bytes, head) = (work.integers.step_bytes(), work.integers.head_bytes());
    let (half, offsets) = (work.integers.half, work.integers.offsets);
    // the products of two codes up to 127 fit into 16 bits; larger ones are taken with their sign
    let signed = work.integers.zero == 128;
    let (mask, ones) = (_mm256_set1_epi8(0x0f), _mm256_set1_epi16(1));
    for side in 0..2 {
        let mut sums = [_mm256_setzero_ps(); T];
        for step in 0..work.steps {
            // SAFETY: as in `vnni`; each load takes one side of 16 rows.
            unsafe {
                let start = work.tiles.add(step * bytes);
                for line in (0..bytes).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(AHEAD + line).cast());
                }
                let body = start.add(head + 32 * side);
                let mut whole = [[_mm256_setzero_si256(); T]; GROUPS];
                for (group, whole) in whole.iter_mut().enumerate() {
                    for (t, whole) in whole.iter_mut().enumerate() {
                        let start = if signed { 0 } else { *work.starts.add((step * GROUPS + group) * ROWS + t) };
                        *whole = _mm256_set1_epi32(start);
                    }
                }
                if BITS < 8 {
                    for j in 0..4 {
                        let both = _mm256_loadu_si256(body.add(64 * j).cast());
                        let mut low = _mm256_and_si256(both, mask);
                        let mut high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask);
                        for bit in 4..BITS {
                            let value = _mm256_set1_epi8(1 << bit);
                            let plane = start.add(head + PLANE + (bit - 4) * PLANE / 4 + 4 * side).cast::<u32>();
                            let spread = |four: usize| spread_bits(plane.add(2 * four).read_unaligned());
                            low = _mm256_or_si256(low, _mm256_and_si256(spread(j), value));
                            high = _mm256_or_si256(high, _mm256_and_si256(spread(4 + j), value));
                        }
                        for t in 0..T {
                            for (group, nibbles, four) in [(0, low, j), (GROUPS - 1, high, 4 + j)] {
                                let a = _mm256_set1_epi32(work.four(step, four, t));
                                let products = _mm256_madd_epi16(_mm256_maddubs_epi16(nibbles, a), ones);
                                whole[group][t] = _mm256_add_epi32(whole[group][t], products);
                            }
                        }
                    }
                } else {
                    for j in 0..8 {
                        let bytes = _mm256_loadu_si256(body.add(64 * j).cast());
                        let true_codes = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
                        let group = j / 4 * (GROUPS - 1);
                        for t in 0..T {
                            let a = _mm256_set1_epi32(work.four(step, j, t));
                            let pairs = if signed {
                                _mm256_maddubs_epi16(_mm256_abs_epi8(true_codes), _mm256_sign_epi8(a, true_codes))
                            } else {
                                _mm256_maddubs_epi16(bytes, a)
                            };
                            whole[group][t] = _mm256_add_epi32(whole[group][t], _mm256_madd_epi16(pairs, ones));
                        }
                    }
                }
                let number = |index: usize| {
                    if half {
                        _mm256_cvtph_ps(_mm_loadu_si128(start.add(32 * index + 16 * side).cast()))
                    } else {
                        _mm256_loadu_ps(start.add(64 * index + 32 * side).cast())
                    }
                };
                for (group, whole) in whole.iter().enumerate() {
                    let scale = number(group);
                    for t in 0..T {
                        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(*work.scales.add(step * ROWS + t)));
                        sums[t] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(whole[t]), sums[t]);
                    }
                    if offsets {
                        let offset = number(GROUPS + group);
                        for t in 0..T {
                            let sum = _mm256_set1_ps(*work.sums.add((step * GROUPS + group) * ROWS + t));
                            sums[t] = _mm256_fmadd_ps(offset, sum, sums[t]);
                        }
                    }
                }
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            // SAFETY: room for eight floats on each side.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * side), sum) };
        }
    }
}
