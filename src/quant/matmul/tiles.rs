//! The products of training on AMX, whose tiles multiply bfloat16: three of those make a float32.
//!
//! ```text
//! x = x₁ + x₂ + x₃    the first eight bits of x, the next eight, and the rest: exactly
//! x · w = Σ x₃w₁, x₂w₁, x₂w₂, x₁w₂, x₁w₃, x₁w₁    of 32 columns, then of the next 32
//! ```
//! Each of the six is exact in float32; it is added up in two chains of 16 fused sums, over the first and the second half
//! of the 32 columns, and both chains to what came before. What is left out, x₃w₂ + x₂w₃ + x₃w₃, is less than 2⁻²¹ of a
//! product and about 2⁻²⁴ of most. Where W has no third term, or no second, as weights of 16 bits don't, those are not
//! multiplied: they would add zeros.
//!
//! A number depends on its own two rows and on K alone, as those of [`super::matmul`] do, but isn't the same to the bit:
//! this is for training, where all rows are many; answers are computed in one way on every machine. Infinite numbers
//! become NaN; what is below 2⁻¹²⁶ counts as zero, and so do bits of a number below 2⁻¹³³.

pub(crate) mod halves;
pub(super) mod low_rank;
pub(crate) mod x86;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytemuck::Zeroable;

pub(super) use self::x86::usable;
use super::{Line, Matrix, Path};
use crate::team::{Shared, Team};

/// Rows and columns of a tile's sums.
const SIDE: usize = 16;
/// Tiles side by side, and one below the other, whose products are computed together.
const PAIR: usize = 2;
/// Columns that a tile's products are summed over.
const DEPTH: usize = 32;
/// Terms of a number.
const TERMS: usize = 3;
/// Lines of 16 rows' terms of 32 columns.
const SET: usize = TERMS * SIDE;
/// Sets of W's terms, 3 KiB each, that are used together: they stay in the second cache.
const W_SETS: usize = (1 << 20) / (64 * SET);
/// Sets of a row that are multiplied before others are: as many of W's stay in the second cache that making x's terms for
/// them takes little of the time.
const DEEP: usize = 18;
/// Sets of W's terms that a thread has room for: of very long rows it takes fewer at once.
const W_ROOM: usize = 8 * W_SETS;
/// Multiplications that are worth a task of their own.
const TASK: usize = 1 << 20;

/// Rows of x, and of W, whose products are computed together.
const BOTH: usize = PAIR * SIDE;

/// What 32 rows of x give with 32 of W.
#[repr(C, align(64))]
pub(super) struct Square([[f32; BOTH]; BOTH]);

thread_local! {
    /// Terms of some rows of x.
    static X: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    /// Terms of some rows of W.
    static W: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    /// Values of W.
    static VALUES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// The first so many lines of a buffer, whatever they hold.
fn lines(buffer: &mut Vec<Line>, count: usize) -> &mut [Line] {
    buffer.resize(buffer.len().max(count), Line::zeroed());
    &mut buffer[..count]
}

/// y = x Wᵀ: x `[count, columns]`, y `[count, rows]`, none of them empty. Each thread has rows of W of its own.
///
/// # Safety
/// The machine has what [`usable`] says, and lengths agree.
pub(super) unsafe fn matmul(team: &Team, matrix: &Matrix<'_>, x: &[f32], y: &mut [f32]) {
    let (rows, columns) = (matrix.rows, matrix.columns);
    let size = columns.div_ceil(DEPTH) * SET;
    let chunks = size / SET;
    let band = (W_SETS / (PAIR * DEEP.min(chunks))).min(W_ROOM / (PAIR * chunks)).max(1) * PAIR * SIDE;
    let run = rows.div_ceil(team.tasks(x.len() * rows, TASK)).next_multiple_of(BOTH);
    let y = Shared::new(y);
    team.each(rows.div_ceil(run), &|task| {
        W.with_borrow_mut(|buffer| {
            let end = rows.min((task + 1) * run);
            for start in (task * run..end).step_by(band) {
                let width = band.min(end - start);
                let terms = lines(buffer, width.div_ceil(BOTH) * PAIR * size);
                let needed: Vec<usize> = (start..start + width)
                    .step_by(BOTH)
                    .zip(terms.chunks_exact_mut(PAIR * size))
                    .map(|(first, terms)| {
                        with_values(matrix, first..end.min(first + BOTH), |values| {
                            let blocks = values.chunks(SIDE * columns).zip(terms.chunks_exact_mut(size));
                            // SAFETY: the caller's promise.
                            let needed = blocks.map(|(values, terms)| unsafe { x86::turned(values, columns, terms) });
                            needed.max().unwrap_or(TERMS)
                        })
                    })
                    .collect();
                // SAFETY: the caller's promise; these columns of y are this task's alone.
                unsafe {
                    x86::configure();
                    for (depth, first) in (0..columns).step_by(DEEP * DEPTH).enumerate() {
                        for (t, x) in x.chunks(BOTH * columns).enumerate() {
                            let x = Rows {
                                values: &x[first..],
                                stride: columns,
                                columns: (columns - first).min(DEEP * DEPTH),
                            };
                            let out = Out { start: y.at(t * BOTH * rows + start), stride: rows, width, add: depth > 0 };
                            stripe(&x, &terms[depth * DEEP * SET..], size, |pair| needed[pair], &out);
                        }
                    }
                    x86::release();
                }
            }
        });
    });
}

/// dx = dy W: dy `[count, rows]`, dx `[count, columns]`, none of them empty. Some rows of W after another are made to
/// terms by all threads together, and each has rows of dx of its own.
///
/// # Safety
/// As of [`matmul`].
pub(super) unsafe fn matmul_transposed(team: &Team, matrix: &Matrix<'_>, dy: &[f32], dx: &mut [f32]) {
    let (rows, columns) = (matrix.rows, matrix.columns);
    let panels = columns.div_ceil(BOTH) * PAIR;
    let count = dx.len() / columns;
    let tile = (W_SETS / panels).max(1) * DEPTH;
    let dx = Shared::new(dx);
    let mut buffer = W.take();
    for first in (0..rows).step_by(tile) {
        let here = tile.min(rows - first);
        let size = here.div_ceil(DEPTH) * SET;
        let terms = lines(&mut buffer, panels * size);
        let (shared, needed) = (Shared::new(terms), AtomicUsize::new(1));
        team.each(size / SET, &|chunk| {
            let start = first + chunk * DEPTH;
            with_values(matrix, start..rows.min(start + DEPTH), |values| {
                for panel in 0..columns.div_ceil(SIDE) {
                    let mut set = [Line::zeroed(); SET];
                    // SAFETY: the caller's promise; this set is this task's alone.
                    unsafe {
                        needed.fetch_max(x86::paired(values, columns, panel * SIDE, &mut set), Ordering::Relaxed);
                        shared.write(panel * size + chunk * SET, &set);
                    }
                }
            });
        });
        let (terms, needed) = (&*terms, needed.into_inner());
        let run = count.div_ceil(team.tasks(count * here * columns, TASK)).next_multiple_of(BOTH);
        team.each(count.div_ceil(run), &|task| {
            // SAFETY: the caller's promise; these rows of dx are this task's alone.
            unsafe {
                x86::configure();
                for t in (task * run..count.min((task + 1) * run)).step_by(BOTH) {
                    let dy = &dy[t * rows..count.min(t + BOTH) * rows];
                    let dy = Rows { values: &dy[first..], stride: rows, columns: here };
                    let out = Out { start: dx.at(t * columns), stride: columns, width: columns, add: first > 0 };
                    stripe(&dy, terms, size, |_| needed, &out);
                }
                x86::release();
            }
        });
    }
    W.set(buffer);
}

/// The first `columns` numbers of up to 32 rows, `stride` apart.
struct Rows<'a> {
    values: &'a [f32],
    stride: usize,
    columns: usize,
}

/// The first `width` numbers of as many rows, `stride` apart, to be written, or added to.
struct Out {
    start: *mut f32,
    stride: usize,
    width: usize,
    add: bool,
}

/// Up to 32 rows of x with W, of which every 32 columns of `out` have two blocks of terms, `size` lines apart, the first
/// `needed` of each.
///
/// # Safety
/// As of [`matmul`]; the tiles are configured, the terms are of as many columns as x has, and `out` is there and nobody
/// else's.
unsafe fn stripe(x: &Rows<'_>, w: &[Line], size: usize, needed: impl Fn(usize) -> usize, out: &Out) {
    let (count, chunks) = (x.values.len().div_ceil(x.stride), x.columns.div_ceil(DEPTH));
    X.with_borrow_mut(|buffer| {
        let terms = lines(buffer, PAIR * chunks * SET);
        let blocks = x.values.chunks(SIDE * x.stride).zip(terms.chunks_exact_mut(chunks * SET));
        // SAFETY: the caller's promise.
        blocks.for_each(|(values, terms)| unsafe { x86::rows(values, x.stride, x.columns, terms) });
        for (pair, at) in (0..out.width).step_by(BOTH).enumerate() {
            let w = &w[pair * PAIR * size..];
            let (x, x_size) = (&*terms, chunks * SET);
            let both = x86::Both { x, x_size, w, w_size: size, chunks, terms: TERMS, needed: needed(pair) };
            let width = BOTH.min(out.width - at);
            // SAFETY: the caller's promise; rows of 32 numbers are there, or else the square has them.
            unsafe {
                if count == BOTH && width == BOTH {
                    both.multiply(out.start.add(at), out.stride, out.add);
                    continue;
                }
                let place = |row: usize| out.start.add(row * out.stride + at);
                let mut found = Square([[0.0; BOTH]; BOTH]);
                for (row, found) in found.0.iter_mut().enumerate().take(if out.add { count } else { 0 }) {
                    place(row).copy_to_nonoverlapping(found.as_mut_ptr(), width);
                }
                both.multiply(found.0.as_mut_ptr().cast(), BOTH, out.add);
                for (row, found) in found.0.iter().enumerate().take(count) {
                    place(row).copy_from_nonoverlapping(found.as_ptr(), width);
                }
            }
        }
    });
}

/// Calls `work` with the values of some rows of W.
fn with_values<R>(matrix: &Matrix<'_>, rows: Range<usize>, work: impl FnOnce(&[f32]) -> R) -> R {
    if let Some(values) = matrix.floats(rows.start, rows.end) {
        return work(values);
    }
    VALUES.with_borrow_mut(|buffer| {
        let count = rows.len() * matrix.columns;
        let values = &mut bytemuck::cast_slice_mut(lines(buffer, count.div_ceil(SIDE)))[..count];
        matrix.values(Path::best(), rows.start, values);
        work(values)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::noise;
    use super::*;
    use crate::quant::{self, Kind};

    /// What the tiles compute, one number at a time.
    fn dot(x: &[f32], w: &[f32]) -> f32 {
        let terms = |value: f32| {
            let high = |value: f32| f32::from_bits(value.to_bits() & 0xffff_0000);
            let (first, second) = (high(value), high(value - high(value)));
            [first, second, value - first - second]
        };
        let mut sum = 0.0;
        for (x, w) in x.chunks(DEPTH).zip(w.chunks(DEPTH)) {
            for (i, j) in [(2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0)] {
                let chain = |part: Range<usize>| {
                    let part = part.start.min(x.len())..part.end.min(x.len());
                    part.fold(0.0f32, |sum, k| terms(x[k])[i].mul_add(terms(w[k])[j], sum))
                };
                sum += chain(0..SIDE) + chain(SIDE..DEPTH);
            }
        }
        sum
    }

    /// Whether `found` is `dot` to the bit, and near what float64 says.
    fn right(found: f32, x: &[f32], w: &[f32]) -> bool {
        let products = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()));
        // what is left out of each product, and a rounding in each of 17 places of six products of a chunk
        let roundings = f64::from(f32::EPSILON) / 2.0 * (17 + 6 * x.len().div_ceil(DEPTH)) as f64;
        found.to_bits() == dot(x, w).to_bits()
            && (f64::from(found) - sum).abs() <= size * (2.0f64.powi(-21) + roundings)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn numbers_are_sums_of_the_terms_products_in_any_company(
            kind in prop::sample::select(Kind::ALL),
            rows in 1usize..180,
            blocks in 1usize..4,
            odd in 1usize..130,
            count in 1usize..100,
            seed: u64,
        ) {
            if !usable() {
                return Ok(());
            }
            let columns = if kind.block_size() == 1 { odd } else { kind.block_size() * blocks };
            let mut bytes = vec![0; rows * columns / kind.block_size() * kind.block_bytes()];
            quant::quantize(kind, &noise(rows * columns, seed), None, &mut bytes).unwrap();
            let mut w = vec![0.0; rows * columns];
            quant::dequantize(kind, &bytes, &mut w).unwrap();
            let matrix = Matrix::new(kind, &bytes, rows, columns).unwrap();

            let x = noise(count * columns, seed + 1);
            let product = |x: &[f32]| {
                let mut y = vec![f32::NAN; x.len() / columns * rows];
                Team::run(|team| super::super::matmul_in_training(team, matrix, x, &mut y)).unwrap();
                y
            };
            let y = product(&x);
            for (index, &found) in y.iter().enumerate() {
                let (t, r) = (index / rows, index % rows);
                prop_assert!(right(found, &x[t * columns..][..columns], &w[r * columns..][..columns]), "{t} {r}");
            }
            prop_assert_eq!(&product(&x[(count - 1) * columns..]), &y[(count - 1) * rows..]);

            let dy = noise(count * rows, seed + 2);
            let product = |dy: &[f32]| {
                let mut dx = vec![f32::NAN; dy.len() / rows * columns];
                Team::run(|team| super::super::matmul_transposed(team, matrix, dy, &mut dx)).unwrap();
                dx
            };
            let dx = product(&dy);
            for (index, &found) in dx.iter().enumerate() {
                let (t, k) = (index / columns, index % columns);
                let column: Vec<f32> = w.iter().skip(k).step_by(columns).copied().collect();
                prop_assert!(right(found, &dy[t * rows..][..rows], &column), "{t} {k}");
            }
            prop_assert_eq!(&product(&dy[(count - 1) * rows..]), &dx[(count - 1) * columns..]);
        }
    }

    #[test]
    fn large_matrices_are_gone_through_in_parts() {
        if !usable() {
            return;
        }
        // more columns, and rows, than have terms in the second cache; and more columns than there is room for
        for (rows, columns, count) in [(6000, 1600, 100), (200, 12_000, 40)] {
            let (w, x, dy) = (noise(rows * columns, 1), noise(count * columns, 2), noise(count * rows, 3));
            let matrix = Matrix::new(Kind::F32, bytemuck::cast_slice(&w), rows, columns).unwrap();
            let (mut y, mut dx) = (vec![0.0; count * rows], vec![1.0; count * columns]);
            Team::run(|team| {
                super::super::matmul_in_training(team, matrix, &x, &mut y).unwrap();
                super::super::matmul_transposed(team, matrix, &dy, &mut dx).unwrap();
            });
            for index in (0..y.len()).step_by(2999) {
                let (t, r) = (index / rows, index % rows);
                assert!(right(y[index], &x[t * columns..][..columns], &w[r * columns..][..columns]), "{t} {r}");
            }
            for index in (0..dx.len()).step_by(9973) {
                let (t, k) = (index / columns, index % columns);
                let column: Vec<f32> = w.iter().skip(k).step_by(columns).copied().collect();
                assert!(right(dx[index], &dy[t * rows..][..rows], &column), "{t} {k}");
            }
        }
    }

    #[test]
    fn the_least_numbers_are_lost_and_disturb_no_others() {
        if !usable() {
            return;
        }
        let (rows, columns, count) = (40, 70, 33);
        let tiny = |values: &mut [f32]| values.iter_mut().step_by(3).for_each(|value| *value *= 1e-37);
        let (mut w, mut x) = (noise(rows * columns, 1), noise(count * columns, 2));
        tiny(&mut w);
        tiny(&mut x);
        let matrix = Matrix::new(Kind::F32, bytemuck::cast_slice(&w), rows, columns).unwrap();
        let mut y = vec![0.0; count * rows];
        Team::run(|team| super::super::matmul_in_training(team, matrix, &x, &mut y)).unwrap();
        for (index, &found) in y.iter().enumerate() {
            let (t, r) = (index / rows, index % rows);
            let pairs = x[t * columns..][..columns].iter().zip(&w[r * columns..][..columns]);
            let sum: f64 = pairs.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            assert!((f64::from(found) - sum).abs() < 1e-5, "{found} {sum}");
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_row() {
        if !usable() {
            return;
        }
        let (rows, columns) = (20, 40);
        let (w, mut x) = (noise(rows * columns, 1), noise(3 * columns, 2));
        (x[columns + 5], x[2 * columns + 7]) = (f32::INFINITY, f32::NAN);
        let matrix = Matrix::new(Kind::F32, bytemuck::cast_slice(&w), rows, columns).unwrap();
        let mut y = vec![0.0; 3 * rows];
        Team::run(|team| super::super::matmul_in_training(team, matrix, &x, &mut y)).unwrap();
        assert!(y[..rows].iter().all(|value| value.is_finite()) && y[rows..].iter().all(|value| value.is_nan()));
    }
}
