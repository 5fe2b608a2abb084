//! Dot products in 16 lanes, on each kind of processor, equal to the bit.
//!
//! ```text
//! lane_l = Σ_i a[16 i + l] · b[16 i + l]  (fused)      dot = ((lane_0 + lane_8) + (lane_4 + lane_12)) + …  + rest
//! ```
//! Lanes are added up in halves: l and l + 8, then l and l + 4, l + 2, l + 1. What is left over behind the last 16 is
//! summed in order and added last.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::cell::RefCell;
use std::ops::Range;

use bytemuck::Zeroable;

use super::super::Kind;
use super::super::coded::Coded;
use super::Line;

/// Numbers of a row that are multiplied before those of the next rows: of so many, six rows of x and two times four of W
/// are in the first cache.
#[cfg(target_arch = "x86_64")]
const PART: usize = 640;

thread_local! {
    /// What parts of rows add up to.
    static KEPT: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

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

/// The function for the number of rows.
#[cfg(target_arch = "x86_64")]
macro_rules! by_count {
    ($count:expr, $name:ident $given:tt) => {
        match $count {
            1 => x86::$name::<1> $given,
            2 => x86::$name::<2> $given,
            3 => x86::$name::<3> $given,
            4 => x86::$name::<4> $given,
            5 => x86::$name::<5> $given,
            _ => x86::$name::<6> $given,
        }
    };
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

    /// Calls `write` with the products of up to [`ROWS`] rows with rows of W, four after another, all of `columns` numbers;
    /// panics where they have other lengths.
    #[inline]
    pub fn products(self, x: &[f32], w: &[f32], columns: usize, mut write: impl FnMut(usize, &[[f32; 4]; ROWS])) {
        let rows = w.len() / columns;
        // rows so long that the first cache can't hold ten of them are gone through in parts
        let part = match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 if x.len() > columns => columns.div_ceil(columns.div_ceil(PART)).next_multiple_of(16),
            _ => columns,
        };
        KEPT.with_borrow_mut(|kept| {
            if part < columns {
                kept.resize(kept.len().max(rows.div_ceil(4) * 4 * ROWS), Line::zeroed());
            }
            let mut found = [[0.0; 4]; ROWS];
            for start in (0..columns).step_by(part) {
                let part = start..columns.min(start + part);
                for r in (0..rows).step_by(4) {
                    let four_rows = |r: usize| &w[r * columns..rows.min(r + 4) * columns];
                    let next = if r + 4 < rows { r + 4 } else { 0 };
                    let kept = kept.get_mut(r * ROWS..).unwrap_or_default();
                    self.dots_of(x, four_rows(r), four_rows(next), columns, &part, kept, &mut found);
                    if part.end == columns {
                        write(r, &found);
                    }
                }
            }
        });
    }

    /// The products of up to [`ROWS`] rows with up to four, all of `columns` numbers; panics where they have other lengths.
    #[inline]
    pub fn dots(self, x: &[f32], w: &[f32], columns: usize, out: &mut [[f32; 4]; ROWS]) {
        self.dots_of(x, w, w, columns, &(0..columns), &mut [], out);
    }

    /// The same of a part of the columns, which only AVX-512 takes; see [`x86::avx512`]. `next` are rows of W that are likely
    /// to come after these.
    #[inline]
    #[allow(clippy::too_many_arguments)]
    fn dots_of(
        self,
        x: &[f32],
        w: &[f32],
        next: &[f32],
        columns: usize,
        part: &Range<usize>,
        kept: &mut [Line],
        out: &mut [[f32; 4]; ROWS],
    ) {
        let (count, rows) = (x.len() / columns, w.len() / columns);
        assert!(x.len() == count * columns && w.len() == rows * columns && count <= ROWS && (1..=4).contains(&rows));
        let last = part.end == columns;
        let whole = part.start == 0 && last;
        assert!(whole || part.start.is_multiple_of(16) && part.end <= columns && kept.len() >= 4 * ROWS);
        match self {
            Self::Portable => {
                for (x, out) in x.chunks_exact(columns).zip(out) {
                    w.chunks_exact(columns).zip(out).for_each(|(w, out)| *out = portable(x, w));
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                let w = std::array::from_fn(|r| &w[r.min(rows - 1) * columns..][..columns]);
                for (x, out) in x.chunks_exact(columns).zip(out) {
                    // SAFETY: the machine has the features (`all`), and the rows are as long as x.
                    *out = unsafe { x86::avx2_1x4(x, w) };
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                /// N rows at a time.
                macro_rules! at_once {
                    ($rows:literal) => {{
                        let (start, out) = (x.as_ptr(), &mut out[..$rows]);
                        let (next, kept) = (next.as_ptr(), kept.as_mut_ptr().cast());
                        // SAFETY: the machine has the features (`all`), so many rows are there, and room to keep sums.
                        unsafe {
                            if rows < 4 {
                                // four times the same row, all of it with the last part
                                for (r, w) in w.chunks_exact(columns).enumerate().take(if last { 3 } else { 0 }) {
                                    let found =
                                        x86::avx512::<$rows, true>(start, w.as_ptr(), 0, next, columns, part, kept);
                                    out.iter_mut().zip(found).for_each(|(out, found)| out[r] = found[0]);
                                }
                            } else if whole {
                                let w = w.as_ptr();
                                out.copy_from_slice(&x86::avx512::<$rows, true>(
                                    start, w, columns, next, columns, part, kept,
                                ));
                            } else {
                                let w = w.as_ptr();
                                out.copy_from_slice(&x86::avx512::<$rows, false>(
                                    start, w, columns, next, columns, part, kept,
                                ));
                            }
                        }
                    }};
                }
                match count {
                    0 => {}
                    1 => at_once!(1),
                    2 => at_once!(2),
                    3 => at_once!(3),
                    4 => at_once!(4),
                    5 => at_once!(5),
                    _ => at_once!(6),
                }
            }
        }
    }

    /// sums[t] += Σ_s shares[t · stride + s] · values[s] over s < `count`, in the order of s, fused; sums
    /// `[up to ROWS, width]`.
    ///
    /// Values behind these are likely to come next. Panics where lengths don't agree.
    #[inline]
    pub fn weighted(
        self,
        shares: &[f32],
        stride: usize,
        values: &[&[f32]],
        count: usize,
        width: usize,
        sums: &mut [f32],
    ) {
        if width == 0 || count == 0 || sums.is_empty() {
            return;
        }
        let rows = sums.len() / width;
        assert!(rows <= ROWS && sums.len() == rows * width && shares.len() >= (rows - 1) * stride + count);
        assert!(count <= values.len() && values[..count].iter().all(|value| value.len() >= width));
        match self {
            Self::Portable => {
                for (t, sums) in sums.chunks_exact_mut(width).enumerate() {
                    for (share, value) in shares[t * stride..].iter().zip(&values[..count]) {
                        sums.iter_mut().zip(*value).for_each(|(sum, value)| *sum = share.mul_add(*value, *sum));
                    }
                }
            }
            // SAFETY: the machine has the features (`all`); lengths were checked.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { by_count!(rows, avx2_weighted(shares, stride, &values[..count], width, sums)) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { by_count!(rows, avx512_weighted(shares, stride, values, count, width, sums)) },
        }
    }

    /// out[t · stride + s] = Σ_d queries[t · width + d] · keys[s][d] for s < `count`, in the order of d, fused; queries
    /// `[up to ROWS, width]`.
    ///
    /// The same numbers as [`Path::weighted`] has for the keys turned around ([`Path::transpose`]), without writing those
    /// anywhere. Keys behind these are likely to come next. Panics where lengths don't agree.
    #[inline]
    pub fn scores(self, queries: &[f32], keys: &[&[f32]], count: usize, width: usize, out: &mut [f32], stride: usize) {
        if width == 0 || count == 0 || queries.is_empty() {
            return;
        }
        let rows = queries.len() / width;
        assert!(rows <= ROWS && queries.len() == rows * width && out.len() >= (rows - 1) * stride + count);
        assert!(count <= keys.len() && keys[..count].iter().all(|key| key.len() >= width));
        match self {
            Self::Portable => {
                for (t, query) in queries.chunks_exact(width).enumerate() {
                    for (out, key) in out[t * stride..].iter_mut().zip(&keys[..count]) {
                        *out = rest(query, &key[..width]);
                    }
                }
            }
            // SAFETY: the machine has the features (`all`); lengths were checked.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { by_count!(rows, avx2_scores(queries, &keys[..count], width, out, stride)) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { by_count!(rows, avx512_scores(queries, keys, count, width, out, stride)) },
        }
    }

    /// Turns rows into columns: `out` `[width, stride]` has `rows[s][d]` at `[d, s]`; what is behind the last row stays.
    ///
    /// Panics where lengths don't agree.
    pub fn transpose(self, rows: &[&[f32]], width: usize, out: &mut [f32], stride: usize) {
        assert!(rows.len() <= stride && out.len() >= width * stride && rows.iter().all(|row| row.len() >= width));
        let mut whole = (0, 0);
        #[cfg(target_arch = "x86_64")]
        if self == Self::Avx512 {
            whole = (rows.len() / 16 * 16, width / 8 * 8);
            for s in (0..whole.0).step_by(16) {
                for d in (0..whole.1).step_by(8) {
                    // SAFETY: the machine has the features (`all`); sixteen rows from s on have eight numbers from d on,
                    // and eight rows of `out` room for sixteen.
                    unsafe {
                        let from = std::array::from_fn(|i| rows[s + i].as_ptr().add(d));
                        x86::transpose_16x8(from, out.as_mut_ptr().add(d * stride + s), stride);
                    }
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        if self != Self::Portable {
            let first = whole.0;
            whole = (rows.len() / 8 * 8, width / 8 * 8);
            for s in (first..whole.0).step_by(8) {
                for d in (0..whole.1).step_by(8) {
                    // SAFETY: the machine has AVX (`all`); eight rows from s on have eight numbers from d on, and so has
                    // `out` in eight of its rows.
                    unsafe {
                        let from = std::array::from_fn(|i| rows[s + i].as_ptr().add(d));
                        x86::transpose_8x8(from, out.as_mut_ptr().add(d * stride + s), stride);
                    }
                }
            }
        }
        for (s, row) in rows.iter().enumerate() {
            for d in if s < whole.0 { whole.1 } else { 0 }..width {
                out[d * stride + s] = row[d];
            }
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

    /// The values of coded rows from `first` on.
    #[inline]
    pub(in crate::quant) fn decode(self, coded: &Coded<'_>, first: usize, out: &mut [f32]) {
        match self {
            Self::Portable => coded.dequantize(first, out),
            // SAFETY: the machine has the features (`all`).
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { coded.dequantize_256(first, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { coded.dequantize_512(first, out) },
        }
    }

    /// The values of blocks.
    #[inline]
    pub(in crate::quant) fn dequantize(self, kind: Kind, blocks: &[u8], out: &mut [f32]) {
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
