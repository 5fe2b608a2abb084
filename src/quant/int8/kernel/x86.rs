//! The same on processors of x86-64.
#![allow(clippy::needless_range_loop)] // a row's number picks from several arrays at once

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;

use super::super::{IntegerForm, PLANE, ROWS, STEP, TILE};
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

/// Calls a kernel with a format's bits, groups, whether its scales are nested, and whether it has a table.
macro_rules! by_form {
    ($integers:expr, $kernel:ident, [$($size:literal),*], $arguments:tt) => {
        match ($integers.bits, $integers.groups(), $integers.nested, $integers.table.is_some()) {
            (2, ..) => by_form!(@ $kernel $arguments $($size,)* 2, 2, true, false),
            (3, ..) => by_form!(@ $kernel $arguments $($size,)* 3, 2, true, false),
            (4, _, false, false) => by_form!(@ $kernel $arguments $($size,)* 4, 1, false, false),
            (4, _, false, true) => by_form!(@ $kernel $arguments $($size,)* 4, 1, false, true),
            (4, _, true, false) => by_form!(@ $kernel $arguments $($size,)* 4, 1, true, false),
            (4, _, true, true) => by_form!(@ $kernel $arguments $($size,)* 4, 1, true, true),
            (5, _, false, _) => by_form!(@ $kernel $arguments $($size,)* 5, 1, false, false),
            (5, _, true, _) => by_form!(@ $kernel $arguments $($size,)* 5, 1, true, false),
            (6, ..) => by_form!(@ $kernel $arguments $($size,)* 6, 2, true, false),
            _ => by_form!(@ $kernel $arguments $($size,)* 8, 1, false, false),
        }
    };
    (@ $kernel:ident ($($argument:expr),*) $($constant:literal),+) => { $kernel::<$($constant),+>($($argument),*) };
}
pub(super) use by_form;

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
    let two = tiles.len() > integers.tile_bytes(steps);
    /// The kernel for some rows (and tiles).
    macro_rules! call {
        ($kernel:ident, $($size:literal),+) => { by_form!(integers, $kernel, [$($size),+], (&work, out)) };
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

/// What stands for each code, where codes are not the numbers themselves.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
pub(super) fn wide_table(integers: &IntegerForm) -> __m512i {
    let table = integers.table.unwrap_or(&[0; 16]);
    // SAFETY: 16 bytes are there.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) })
}

/// What the scales (0) or offsets (1) of the blocks that begin at `block` are to be taken times.
///
/// # Safety
/// `[kinds, 16]` numbers of half precision are there.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
pub(super) unsafe fn nested_top(block: *const u8, kind: usize) -> __m512 {
    // SAFETY: the caller's promise.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(block.add(2 * TILE * kind).cast()) })
}

/// Sixteen scales or offsets of a step that begins at `step`; `top` is what nested ones are taken times.
///
/// # Safety
/// The step's head has so many.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
pub(super) unsafe fn sixteen_numbers<const NESTED: bool>(step: *const u8, index: usize, top: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        if NESTED {
            let whole = _mm512_cvtepi8_epi32(_mm_loadu_si128(step.add(TILE * index).cast()));
            _mm512_mul_ps(top, _mm512_cvtepi32_ps(whole))
        } else {
            _mm512_cvtph_ps(_mm256_loadu_si256(step.add(2 * TILE * index).cast()))
        }
    }
}

/// Four codes of each of 16 rows, from the 64 bytes where their lowest bits are; `body` is where the step's codes begin.
///
/// # Safety
/// The step's codes have `BITS` planes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn four_codes<const BITS: usize, const TABLE: bool>(
    loaded: __m512i,
    body: *const u8,
    part: usize,
    four: usize,
    table: __m512i,
) -> __m512i {
    let base = const { IntegerForm::base(BITS) };
    let mut codes = loaded;
    if BITS < 8 {
        let mask = _mm512_set1_epi8(0xff_u8.wrapping_shr(8 - base as u32).cast_signed());
        codes = _mm512_and_si512(_mm512_srl_epi16(codes, _mm_cvtsi64_si128((part * base) as i64)), mask);
    }
    for bit in base..BITS {
        // the codes that have the bit
        // SAFETY: the caller's promise.
        let plane = unsafe { body.add(bit * PLANE).cast::<u64>().add(four).read_unaligned() };
        codes = _mm512_mask_add_epi8(codes, plane, codes, _mm512_set1_epi8(1 << bit));
    }
    if TABLE { _mm512_shuffle_epi8(table, codes) } else { codes }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn vnni<
    const T: usize,
    const N: usize,
    const BITS: usize,
    const GROUPS: usize,
    const NESTED: bool,
    const TABLE: bool,
>(
    work: &Work<'_>,
    out: &mut Found,
) {
    let integers = work.integers;
    let (bytes, head, top_bytes) = (integers.step_bytes(), integers.head_bytes(), integers.top_bytes());
    let (nest, offsets) = (integers.nest(), integers.offsets);
    let base = IntegerForm::base(BITS);
    let table = wide_table(integers);
    let tile_bytes = integers.tile_bytes(work.steps);
    let mut sums = [[_mm512_setzero_ps(); T]; N];
    let mut at = 0;
    for block in 0..work.steps / nest {
        // what this block's scales, and its offsets, are to be taken times
        let mut tops = [[_mm512_setzero_ps(); N]; 2];
        if NESTED {
            for (kind, tops) in tops.iter_mut().enumerate().take(integers.kinds()) {
                // SAFETY: a block of the tile begins with as many.
                *tops = std::array::from_fn(|n| unsafe { nested_top(work.tiles.add(n * tile_bytes + at), kind) });
            }
        }
        at += top_bytes;
        for step in block * nest..(block + 1) * nest {
            // SAFETY: each tile has `steps` steps of these bytes, and the inputs as many for each row; prefetching beyond
            // the end changes nothing.
            unsafe {
                let start: [_; N] = std::array::from_fn(|n| work.tiles.add(n * tile_bytes + at));
                at += bytes;
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
                for load in 0..base {
                    let loaded = start.map(|start| _mm512_loadu_si512(start.add(head + 64 * load).cast()));
                    for part in 0..8 / base {
                        let four = part * base + load;
                        let codes: [_; N] = std::array::from_fn(|n| {
                            four_codes::<BITS, TABLE>(loaded[n], start[n].add(head), part, four, table)
                        });
                        let group = four / 4 * (GROUPS - 1);
                        for t in 0..T {
                            let a = _mm512_set1_epi32(work.four(step, four, t));
                            for n in 0..N {
                                whole[group][n][t] = _mm512_dpbusd_epi32(whole[group][n][t], codes[n], a);
                            }
                        }
                    }
                }
                let number = |kind: usize, group: usize, n: usize| {
                    sixteen_numbers::<NESTED>(start[n], kind * GROUPS + group, tops[kind][n])
                };
                for (group, whole) in whole.iter().enumerate() {
                    for n in 0..N {
                        let scale = number(0, group, n);
                        for t in 0..T {
                            let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*work.scales.add(step * ROWS + t)));
                            sums[n][t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(whole[n][t]), sums[n][t]);
                        }
                    }
                    if offsets {
                        for n in 0..N {
                            let offset = number(1, group, n);
                            for t in 0..T {
                                let sum = _mm512_set1_ps(*work.sums.add((step * GROUPS + group) * ROWS + t));
                                sums[n][t] = _mm512_fmadd_ps(offset, sum, sums[n][t]);
                            }
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
unsafe fn avx2<const T: usize, const BITS: usize, const GROUPS: usize, const NESTED: bool, const TABLE: bool>(
    work: &Work<'_>,
    out: &mut Found,
) {
    let integers = work.integers;
    let (bytes, head, top_bytes) = (integers.step_bytes(), integers.head_bytes(), integers.top_bytes());
    let (nest, offsets) = (integers.nest(), integers.offsets);
    let base = IntegerForm::base(BITS);
    // the products of two codes up to 127 fit into 16 bits; larger ones are taken with their sign
    let signed = integers.zero == 128;
    let mask = _mm256_set1_epi8(0xff_u8.wrapping_shr(8 - base as u32).cast_signed());
    let (ones, sign) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128));
    let table = integers.table.unwrap_or(&[0; 16]);
    // SAFETY: 16 bytes are there.
    let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    for side in 0..2 {
        let mut sums = [_mm256_setzero_ps(); T];
        let mut at = 0;
        for block in 0..work.steps / nest {
            let mut tops = [_mm256_setzero_ps(); 2];
            if NESTED {
                for (kind, top) in tops.iter_mut().enumerate().take(integers.kinds()) {
                    // SAFETY: a block of the tile begins with as many.
                    *top = unsafe {
                        _mm256_cvtph_ps(_mm_loadu_si128(work.tiles.add(at + 2 * TILE * kind + 16 * side).cast()))
                    };
                }
            }
            at += top_bytes;
            for step in block * nest..(block + 1) * nest {
                // SAFETY: as in `vnni`; each load takes one side of 16 rows.
                unsafe {
                    let start = work.tiles.add(at);
                    at += bytes;
                    for line in (0..bytes).step_by(64) {
                        _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(AHEAD + line).cast());
                    }
                    let mut whole = [[_mm256_setzero_si256(); T]; GROUPS];
                    for (group, whole) in whole.iter_mut().enumerate() {
                        for (t, whole) in whole.iter_mut().enumerate() {
                            let start = if signed { 0 } else { *work.starts.add((step * GROUPS + group) * ROWS + t) };
                            *whole = _mm256_set1_epi32(start);
                        }
                    }
                    for load in 0..base {
                        let loaded = _mm256_loadu_si256(start.add(head + 64 * load + 32 * side).cast());
                        for part in 0..8 / base {
                            let four = part * base + load;
                            let mut codes = loaded;
                            if BITS < 8 {
                                let shift = _mm_cvtsi64_si128((part * base) as i64);
                                codes = _mm256_and_si256(_mm256_srl_epi16(codes, shift), mask);
                            }
                            for bit in base..BITS {
                                let plane = start.add(head + bit * PLANE + 8 * four + 4 * side).cast::<u32>();
                                let value = _mm256_set1_epi8(1 << bit);
                                let spread = spread_bits(plane.read_unaligned());
                                codes = _mm256_or_si256(codes, _mm256_and_si256(spread, value));
                            }
                            if TABLE {
                                codes = _mm256_shuffle_epi8(table, codes);
                            }
                            let whole = &mut whole[four / 4 * (GROUPS - 1)];
                            for (t, whole) in whole.iter_mut().enumerate() {
                                let a = _mm256_set1_epi32(work.four(step, four, t));
                                let pairs = if signed {
                                    let codes = _mm256_xor_si256(codes, sign);
                                    _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(a, codes))
                                } else {
                                    _mm256_maddubs_epi16(codes, a)
                                };
                                *whole = _mm256_add_epi32(*whole, _mm256_madd_epi16(pairs, ones));
                            }
                        }
                    }
                    let number = |kind: usize, group: usize| {
                        let index = kind * GROUPS + group;
                        if NESTED {
                            let whole = _mm_loadl_epi64(start.add(TILE * index + 8 * side).cast());
                            _mm256_mul_ps(tops[kind], _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(whole)))
                        } else {
                            _mm256_cvtph_ps(_mm_loadu_si128(start.add(2 * TILE * index + 16 * side).cast()))
                        }
                    };
                    for (group, whole) in whole.iter().enumerate() {
                        let scale = number(0, group);
                        for t in 0..T {
                            let scale = _mm256_mul_ps(scale, _mm256_set1_ps(*work.scales.add(step * ROWS + t)));
                            sums[t] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(whole[t]), sums[t]);
                        }
                        if offsets {
                            let offset = number(1, group);
                            for t in 0..T {
                                let sum = _mm256_set1_ps(*work.sums.add((step * GROUPS + group) * ROWS + t));
                                sums[t] = _mm256_fmadd_ps(offset, sum, sums[t]);
                            }
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
