//! Terms, and numbers of 16 bits, by AVX-512; their products by AMX.

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;
use std::array::from_fn;
use std::sync::OnceLock;

use half::bf16;

use super::super::{Line, Path};
use super::{DEPTH, PAIR, SET, SIDE, Square, TERMS};
use crate::quant::amx;
pub(crate) use crate::quant::amx::release;

/// Whether the machine has tiles that multiply bfloat16, and AVX-512 beside them.
pub(in super::super) fn usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| Path::best() == Path::Avx512 && amx::usable(amx::HALVES))
}

/// All tiles have 16 rows of 64 bytes.
///
/// # Safety
/// The machine is [`usable`].
pub(crate) unsafe fn configure() {
    // SAFETY: the caller's promise.
    unsafe { amx::configure([(64, 16); 8]) };
}

/// The terms of two vectors, the first one's in the low halves.
#[inline]
#[target_feature(enable = "avx512f")]
fn split(mut pair: [__m512; 2]) -> [__m512i; TERMS] {
    let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    from_fn(|_| {
        // of the last term, too: numbers near the least that there are leave more bits behind, which are lost
        let [low, top] = pair.map(|numbers| _mm512_and_si512(_mm512_castps_si512(numbers), high));
        pair = [_mm512_sub_ps(pair[0], _mm512_castsi512_ps(low)), _mm512_sub_ps(pair[1], _mm512_castsi512_ps(top))];
        _mm512_or_si512(_mm512_srli_epi32::<16>(low), top)
    })
}

/// The first `count` numbers, of 16, from an address on; zeros behind them.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(at: *const f32, count: usize) -> __m512 {
    let mask = if count < SIDE { (1 << count) - 1 } else { !0 };
    // SAFETY: the caller's promise.
    unsafe { _mm512_maskz_loadu_ps(mask, at) }
}

/// Both halves of 32 columns of a row.
///
/// # Safety
/// The row has `left` numbers from there on, or more than 32.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn halves(at: *const f32, left: usize) -> [__m512; 2] {
    // SAFETY: the caller's promise.
    unsafe { [load(at, left), load(at.wrapping_add(SIDE), left.saturating_sub(SIDE))] }
}

/// Terms of up to 16 rows of the first `columns` numbers, `stride` apart: a row of a tile is a row's.
///
/// # Safety
/// The machine is [`usable`]; `out` has room for the sets of all columns.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn rows(x: &[f32], stride: usize, columns: usize, out: &mut [Line]) {
    for (r, row) in x.chunks(stride).enumerate() {
        for (set, start) in out.chunks_exact_mut(SET).zip((0..columns).step_by(DEPTH)) {
            // SAFETY: the row has `columns` numbers, the set a line for it in each term.
            unsafe {
                for (term, pairs) in split(halves(row.as_ptr().add(start), columns - start)).into_iter().enumerate() {
                    _mm512_store_si512((&raw mut set[term * SIDE + r]).cast(), pairs);
                }
            }
        }
    }
}

/// Terms of up to 16 rows, turned: a column of a tile is a row's. Returns how many terms there are that aren't zero.
///
/// # Safety
/// The machine is [`usable`]; `out` has room for the sets of all columns.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn turned(w: &[f32], columns: usize, out: &mut [Line]) -> usize {
    let rows = w.len() / columns;
    let mut seen = [_mm512_setzero_si512(); TERMS];
    for (set, start) in out.chunks_exact_mut(SET).zip((0..columns).step_by(DEPTH)) {
        let mut all = [[_mm512_setzero_ps(); SIDE]; 2];
        for (r, row) in w.chunks_exact(columns).enumerate().take(rows) {
            // SAFETY: the row has `columns` numbers.
            unsafe { [all[0][r], all[1][r]] = halves(row.as_ptr().add(start), columns - start) };
        }
        let [low, top] = all.map(|half| transpose(half));
        for line in 0..SIDE {
            // SAFETY: the set has this line in each term.
            unsafe { store([low[line], top[line]], &mut seen, set, line) };
        }
    }
    count(&seen)
}

/// Terms of the columns `at..at + 16` of up to 32 rows: a row of a tile is two rows', 16 apart. Returns as [`turned`].
///
/// # Safety
/// The machine is [`usable`].
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn paired(w: &[f32], columns: usize, at: usize, out: &mut [Line; SET]) -> usize {
    let (rows, left) = (w.len() / columns, columns - at);
    let mut seen = [_mm512_setzero_si512(); TERMS];
    for line in 0..SIDE {
        let row = |r: usize| match r < rows {
            // SAFETY: there is such a row, and it has `columns` numbers.
            true => unsafe { load(w.as_ptr().add(r * columns + at), left) },
            false => _mm512_setzero_ps(),
        };
        // SAFETY: the set has this line in each term.
        unsafe { store([row(line), row(line + SIDE)], &mut seen, out, line) };
    }
    count(&seen)
}

/// Stores the terms of two vectors in a line of each term's tile, and adds their bits to those seen.
///
/// # Safety
/// The set has this line in each term.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(pair: [__m512; 2], seen: &mut [__m512i; TERMS], set: &mut [Line], line: usize) {
    for (term, pairs) in split(pair).into_iter().enumerate() {
        seen[term] = _mm512_or_si512(seen[term], pairs);
        // SAFETY: the caller's promise.
        unsafe { _mm512_store_si512(set.as_mut_ptr().add(term * SIDE + line).cast(), pairs) };
    }
}

/// The terms up to the last one with a bit.
#[target_feature(enable = "avx512f")]
fn count(seen: &[__m512i; TERMS]) -> usize {
    1 + (1..TERMS).rfind(|&term| _mm512_test_epi32_mask(seen[term], seen[term]) != 0).unwrap_or(0)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512; SIDE]) -> [__m512; SIDE] {
    // twos of two rows, fours of four rows, then the quarters of all
    let twos: [__m512d; SIDE] = from_fn(|i| {
        let (a, b) = (rows[i & !1], rows[i | 1]);
        _mm512_castps_pd(if i & 1 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) })
    });
    let fours: [__m512; SIDE] = from_fn(|i| {
        let first = i & !3 | (i & 2) >> 1;
        let (a, b) = (twos[first], twos[first + 2]);
        _mm512_castpd_ps(if i & 1 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) })
    });
    let eights: [__m512; SIDE] = from_fn(|i| {
        // 0–3: even quarters of rows 0–7, 4–7: odd ones; 8–15: of rows 8–15
        let (a, b) = (fours[i & 8 | i & 3], fours[i & 8 | 4 | i & 3]);
        if i & 4 == 0 { _mm512_shuffle_f32x4::<0x88>(a, b) } else { _mm512_shuffle_f32x4::<0xdd>(a, b) }
    });
    from_fn(|i| {
        let (a, b) = (eights[i & 7], eights[8 | i & 7]);
        if i & 8 == 0 { _mm512_shuffle_f32x4::<0x88>(a, b) } else { _mm512_shuffle_f32x4::<0xdd>(a, b) }
    })
}

/// Loads a term of both blocks of x and multiplies it with those of W that are loaded.
macro_rules! x_term {
    ($offset:literal) => {
        concat!(
            "tileloadd tmm4, [{x0} + {line} + ",
            $offset,
            "]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "tileloadd tmm5, [{x1} + {line} + ",
            $offset,
            "]\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            "tdpbf16ps tmm3, tmm5, tmm7"
        )
    };
}

/// Loads a term of both blocks of W and multiplies it with those of x that are loaded.
macro_rules! w_term {
    ($offset:literal) => {
        concat!(
            "tileloadd tmm6, [{w0} + {line} + ",
            $offset,
            "]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            "tileloadd tmm7, [{w1} + {line} + ",
            $offset,
            "]\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "tdpbf16ps tmm3, tmm5, tmm7"
        )
    };
}

/// Two blocks of 16 rows of x, and two of W: `chunks` sets each, the blocks of x `x_size` lines apart, those of W
/// `w_size`. Numbers of `terms` terms, 1 or 3; of W's the first `needed`.
pub(crate) struct Both<'a> {
    pub x: &'a [Line],
    pub x_size: usize,
    pub w: &'a [Line],
    pub w_size: usize,
    pub chunks: usize,
    pub terms: usize,
    pub needed: usize,
}

impl Both<'_> {
    /// Writes, or adds, their products to 32 rows of 32 sums, `stride` apart.
    ///
    /// # Safety
    /// The machine is [`usable`] and configured; the sums are there.
    pub(crate) unsafe fn multiply(&self, sums: *mut f32, stride: usize, add: bool) {
        let &Self { x, x_size, w, w_size, chunks, terms, needed } = self;
        let size = chunks * terms * SIDE;
        assert!(chunks > 0 && x.len() >= (PAIR - 1) * x_size + size && w.len() >= (PAIR - 1) * w_size + size);
        /// The products of a chunk of 32 columns after another.
        macro_rules! chunks {
            ($set:literal: $($term:expr),*) => {
                std::arch::asm!(
                    "test {add}, {add}",
                    "jz 2f",
                    "tileloadd tmm0, [{top} + {stride}]",
                    "tileloadd tmm1, [{top} + {stride} + 64]",
                    "tileloadd tmm2, [{bottom} + {stride}]",
                    "tileloadd tmm3, [{bottom} + {stride} + 64]",
                    "jmp 3f",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "3:",
                    "tileloadd tmm6, [{w0} + {line}]",
                    "tileloadd tmm7, [{w1} + {line}]",
                    $($term),*,
                    concat!("add {x0}, ", $set),
                    concat!("add {x1}, ", $set),
                    concat!("add {w0}, ", $set),
                    concat!("add {w1}, ", $set),
                    "dec {chunks}",
                    "jnz 3b",
                    "tilestored [{top} + {stride}], tmm0",
                    "tilestored [{top} + {stride} + 64], tmm1",
                    "tilestored [{bottom} + {stride}], tmm2",
                    "tilestored [{bottom} + {stride} + 64], tmm3",
                    x0 = inout(reg) x.as_ptr() => _,
                    x1 = inout(reg) x.as_ptr().add(x_size) => _,
                    w0 = inout(reg) w.as_ptr() => _,
                    w1 = inout(reg) w.as_ptr().add(w_size) => _,
                    chunks = inout(reg) chunks => _,
                    line = in(reg) 64usize,
                    top = in(reg) sums,
                    bottom = in(reg) sums.wrapping_add(SIDE * stride),
                    stride = in(reg) 4 * stride,
                    add = in(reg) usize::from(add),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            };
        }
        // SAFETY: the caller's promise, and the lengths above; a chunk is a set of 1,024 bytes a term.
        unsafe {
            match (terms, needed) {
                (1, _) => chunks!("1024": x_term!(0)),
                (_, 1) => chunks!("3072": x_term!(2048), x_term!(1024), x_term!(0)),
                (_, 2) => chunks!("3072": x_term!(2048), x_term!(1024), w_term!(1024), x_term!(0), w_term!(0)),
                _ => chunks!(
                    "3072": x_term!(2048), x_term!(1024), w_term!(1024), x_term!(0), w_term!(2048), w_term!(0)
                ),
            }
        }
    }
}

/// Numbers that become the nearest bfloat16.
pub(crate) trait Nearest: Copy {
    /// The first `left` numbers from an address on, or 32; zeros behind them.
    ///
    /// # Safety
    /// The machine is [`super::halves::usable`], and they are there.
    unsafe fn both(at: *const Self, left: usize) -> __m512i;
    /// The first numbers from two addresses on, `left` of each or 16, one's behind the other's; zeros behind each.
    ///
    /// # Safety
    /// As of [`Nearest::both`].
    unsafe fn pair(at: [*const Self; 2], left: [usize; 2]) -> __m512i;
}

impl Nearest for f32 {
    #[inline(always)]
    unsafe fn both(at: *const Self, left: usize) -> __m512i {
        // SAFETY: the caller's promise; a vector is a vector.
        unsafe { rounded(halves(at, left)) }
    }
    #[inline(always)]
    unsafe fn pair(at: [*const Self; 2], left: [usize; 2]) -> __m512i {
        // SAFETY: as above.
        unsafe { rounded([0, 1].map(|row| load(at[row], left[row]))) }
    }
}

impl Nearest for bf16 {
    #[inline(always)]
    unsafe fn both(at: *const Self, left: usize) -> __m512i {
        let mask = if left < DEPTH { (1 << left) - 1 } else { !0 };
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_epi16(mask, at.cast()) }
    }
    #[inline(always)]
    unsafe fn pair(at: [*const Self; 2], left: [usize; 2]) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            let [low, top] = [0, 1].map(|row| {
                let mask = if left[row] < SIDE { (1 << left[row]) - 1 } else { !0 };
                _mm256_maskz_loadu_epi16(mask, at[row].cast())
            });
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), top)
        }
    }
}

/// Both vectors to the nearest bfloat16, one behind the other.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) fn rounded([low, top]: [__m512; 2]) -> __m512i {
    // SAFETY: a vector is a vector.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(top, low)) }
}

/// 16 numbers and 16 more as pairs, one of each.
#[inline]
#[target_feature(enable = "avx512bw")]
pub(crate) fn interleaved(numbers: __m512i) -> __m512i {
    const ORDER: [u16; 2 * SIDE] = {
        let mut order = [0; 2 * SIDE];
        let mut place = 0;
        while place < order.len() {
            order[place] = (place / 2 + place % 2 * SIDE) as u16;
            place += 1;
        }
        order
    };
    // SAFETY: as many numbers are a vector.
    let order = unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) };
    _mm512_permutexvar_epi16(order, numbers)
}

/// Up to 16 rows of the first `columns` numbers, `stride` apart: a row of a tile is a row's, 32 columns.
///
/// # Safety
/// The machine is [`super::halves::usable`]; `out` has room for the sets of all columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn copied(x: &[bf16], stride: usize, columns: usize, out: &mut [Line]) {
    for (r, row) in x.chunks(stride).enumerate() {
        for (set, start) in out.chunks_exact_mut(SIDE).zip((0..columns).step_by(DEPTH)) {
            // SAFETY: the row has `columns` numbers, the set a line for it.
            unsafe {
                let numbers = bf16::both(row.as_ptr().add(start), columns - start);
                _mm512_store_si512((&raw mut set[r]).cast(), numbers);
            }
        }
    }
}

/// The same to the nearest bfloat16, turned: a column of a tile is a row's, a line two of its numbers.
///
/// # Safety
/// The machine is [`super::halves::usable`]; `out` has room for the sets of all columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) unsafe fn turned_halves<T: Nearest>(w: &[T], stride: usize, columns: usize, out: &mut [Line]) {
    for (set, start) in out.chunks_exact_mut(SIDE).zip((0..columns).step_by(DEPTH)) {
        let mut rows = [_mm512_setzero_ps(); SIDE];
        for (pairs, row) in rows.iter_mut().zip(w.chunks(stride)) {
            // SAFETY: the row has `columns` numbers.
            *pairs = _mm512_castsi512_ps(unsafe { T::both(row.as_ptr().add(start), columns - start) });
        }
        for (line, pairs) in set.iter_mut().zip(transpose(rows)) {
            // SAFETY: a line is a vector.
            unsafe { _mm512_store_ps((&raw mut *line).cast(), pairs) };
        }
    }
}

/// The columns `at..at + 16` of up to 32 rows, `stride` apart, to the nearest bfloat16: a row of a tile is two rows', one
/// below the other.
///
/// # Safety
/// The machine is [`super::halves::usable`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) unsafe fn paired_halves<T: Nearest>(w: &[T], stride: usize, columns: usize, at: usize, out: &mut [Line]) {
    let (rows, left) = (w.len().div_ceil(stride), columns - at);
    for (line, out) in out.iter_mut().enumerate() {
        let both = [2 * line, 2 * line + 1];
        // SAFETY: there are such rows, or nothing of them is read; a row has `columns` numbers, a line is a vector.
        unsafe {
            let places = both.map(|r| w.as_ptr().wrapping_add(r * stride + at));
            let numbers = T::pair(places, both.map(|r| if r < rows { left } else { 0 }));
            _mm512_store_si512((&raw mut *out).cast(), interleaved(numbers));
        }
    }
}

/// The columns `at..at + 16` of 32 rows of 32 as rows of a tile.
///
/// # Safety
/// The machine is [`super::halves::usable`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) unsafe fn transposed_halves(square: &[bf16], at: usize, out: &mut [Line]) {
    // SAFETY: the caller's promise.
    unsafe { paired_halves(square, DEPTH, DEPTH, at, out) };
    // SAFETY: a line is a vector.
    let pairs = from_fn(|line| unsafe { _mm512_load_ps((&raw const out[line]).cast()) });
    for (line, pairs) in out.iter_mut().zip(transpose(pairs)) {
        // SAFETY: as above.
        unsafe { _mm512_store_ps((&raw mut *line).cast(), pairs) };
    }
}

/// The first `width` of 32 numbers of the first `count` rows to the nearest bfloat16, rows `stride` apart.
///
/// # Safety
/// The machine is [`super::halves::usable`], and they have room.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn narrow(found: &Square, count: usize, width: usize, out: *mut bf16, stride: usize) {
    let mask = if width < DEPTH { (1 << width) - 1 } else { !0 };
    for (r, row) in found.0.iter().enumerate().take(count) {
        // SAFETY: a row is two vectors; there is room.
        unsafe {
            let numbers = rounded([0, SIDE].map(|at| _mm512_load_ps(row.as_ptr().add(at))));
            _mm512_mask_storeu_epi16(out.add(r * stride).cast(), mask, numbers);
        }
    }
}
