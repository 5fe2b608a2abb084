//! Products of training in bfloat16 on AMX.
//!
//! ```text
//! y = Σ x · bf16(w)     of 32 columns, then of the next 32, in float32; rounded once
//! ```
//! x is multiplied as it is, W in the bfloat16 that is nearest to it. The tile's sums are two chains, of the columns with
//! even numbers and of those with odd ones, of which each product is exact; both are added to what came before. A number
//! depends on its own two rows and on K alone. Numbers below 2⁻¹²⁶ count as zero.
//!
//! A part of W is made to tiles by all threads together, and then each has rows of x of its own.

use std::cell::RefCell;
use std::ops::Range;

use bytemuck::Pod;
use half::bf16;

use super::{BOTH, DEPTH, Line, Matrix, PAIR, SIDE, Square, lines, with_values, x86};
use crate::team::{Shared, Team};

/// Lines of W's tiles, 4 MiB, that are made at once.
pub(super) const ROOM: usize = 1 << 16;
/// Lines of x's tiles, 768 KiB, that are multiplied with one part of W after another: they stay in the second cache.
pub(super) const GROUP: usize = 12 << 10;
/// Multiplications that are worth a task of their own.
pub(super) const TASK: usize = 1 << 22;

thread_local! {
    pub(super) static X: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    static W: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Whether the machine has what it takes.
pub(crate) fn usable() -> bool {
    super::usable() && std::arch::is_x86_feature_detected!("avx512bf16")
}

/// What sums are written to.
pub(in super::super) trait Sum: Pod + Send {
    /// Whether more can be added to it without rounding what was there.
    const ADDS: bool;
    /// The first `width` numbers of the first `count` rows, written or added to rows `stride` apart.
    ///
    /// # Safety
    /// The machine is [`usable`], and they have room.
    unsafe fn put(found: &Square, count: usize, width: usize, out: *mut Self, stride: usize, add: bool);
}

impl Sum for bf16 {
    const ADDS: bool = false;
    unsafe fn put(found: &Square, count: usize, width: usize, out: *mut Self, stride: usize, _add: bool) {
        // SAFETY: the caller's promise.
        unsafe { x86::narrow(found, count, width, out, stride) };
    }
}

impl Sum for f32 {
    const ADDS: bool = true;
    unsafe fn put(found: &Square, count: usize, width: usize, out: *mut Self, stride: usize, add: bool) {
        for (r, row) in found.0.iter().enumerate().take(count) {
            // SAFETY: the caller's promise.
            let out = unsafe { std::slice::from_raw_parts_mut(out.add(r * stride), width) };
            match add {
                true => out.iter_mut().zip(row).for_each(|(out, found)| *out += found),
                false => out.copy_from_slice(&row[..width]),
            }
        }
    }
}

/// y = x Wᵀ: x `[count, columns]`, y `[count, rows]`, none of them empty.
///
/// # Safety
/// The machine is [`usable`], and lengths agree.
pub(in super::super) unsafe fn matmul(team: &Team, matrix: &Matrix<'_>, x: &[bf16], y: &mut [bf16]) {
    let (rows, columns) = (matrix.rows, matrix.columns);
    let size = columns.div_ceil(DEPTH) * SIDE;
    let band = (ROOM / (PAIR * size)).max(1) * BOTH;
    let y = Shared::new(y);
    with_room(|buffer| {
        for start in (0..rows).step_by(band) {
            let width = band.min(rows - start);
            let tiles = lines(buffer, width.div_ceil(BOTH) * PAIR * size);
            let shared = Shared::new(tiles);
            team.each(width.div_ceil(BOTH), &|pair| {
                let first = start + pair * BOTH;
                // SAFETY: these tiles are this task's alone.
                let tiles = unsafe { shared.part(pair * PAIR * size..(pair + 1) * PAIR * size) };
                turned_rows(matrix, first..rows.min(first + BOTH), tiles, size);
            });
            let x = Columns { values: x, stride: columns, first: 0, count: columns };
            // SAFETY: the caller's promise.
            unsafe { multiply(team, &x, tiles, &y, (start, width, rows), false) };
        }
    });
}

/// Some rows of W as tiles, 16 rows' `size` lines behind the last 16's; zeros for rows that there are not.
pub(super) fn turned<T: x86::Nearest>(values: &[T], columns: usize, tiles: &mut [Line], size: usize) {
    let mut blocks = values.chunks(SIDE * columns);
    for tiles in tiles.chunks_mut(size) {
        // SAFETY: only called where the machine is usable; the tiles are of all columns.
        unsafe {
            let tiles = &mut tiles[..columns.div_ceil(DEPTH) * SIDE];
            x86::turned_halves(blocks.next().unwrap_or(&[]), columns, columns, tiles)
        };
    }
}

/// Rows of the matrix as [`turned`].
pub(super) fn turned_rows(matrix: &Matrix<'_>, rows: Range<usize>, tiles: &mut [Line], size: usize) {
    match matrix.halves(rows.clone()) {
        Some(values) => turned(values, matrix.columns, tiles, size),
        None => with_values(matrix, rows, |values| turned(values, matrix.columns, tiles, size)),
    }
}

/// Up to 32 rows, number `chunk` of `chunks`, as a tile for each 16 columns.
pub(super) fn paired<T: x86::Nearest>(
    values: &[T],
    columns: usize,
    tiles: &Shared<'_, Line>,
    (chunk, chunks): (usize, usize),
) {
    for panel in 0..columns.div_ceil(SIDE) {
        let at = (panel * chunks + chunk) * SIDE;
        // SAFETY: only called where the machine is usable; the tiles of these rows are the calling task's alone.
        unsafe { x86::paired_halves(values, columns, columns, panel * SIDE, tiles.part(at..at + SIDE)) };
    }
}

/// Rows of the matrix as [`paired`].
pub(super) fn paired_rows(matrix: &Matrix<'_>, rows: Range<usize>, tiles: &Shared<'_, Line>, place: (usize, usize)) {
    match matrix.halves(rows.clone()) {
        Some(values) => paired(values, matrix.columns, tiles, place),
        None => with_values(matrix, rows, |values| paired(values, matrix.columns, tiles, place)),
    }
}

/// dx = dy W: dy `[count, rows]`, dx `[count, columns]`, none of them empty. All of W is made to tiles at once where dx
/// cannot be added to.
///
/// # Safety
/// As of [`matmul`].
pub(in super::super) unsafe fn matmul_transposed<T: Sum>(team: &Team, matrix: &Matrix<'_>, dy: &[bf16], dx: &mut [T]) {
    let (rows, columns) = (matrix.rows, matrix.columns);
    let panels = columns.div_ceil(BOTH) * PAIR;
    let part = if T::ADDS { (ROOM / (panels * SIDE)).max(1) * DEPTH } else { rows };
    let dx = Shared::new(dx);
    with_room(|buffer| {
        for first in (0..rows).step_by(part) {
            let here = part.min(rows - first);
            let chunks = here.div_ceil(DEPTH);
            let tiles = lines(buffer, panels * chunks * SIDE);
            let shared = Shared::new(tiles);
            team.each(chunks, &|chunk| {
                let start = first + chunk * DEPTH;
                paired_rows(matrix, start..rows.min(start + DEPTH), &shared, (chunk, chunks));
            });
            let dy = Columns { values: dy, stride: rows, first, count: here };
            // SAFETY: the caller's promise.
            unsafe { multiply(team, &dy, tiles, &dx, (0, columns, columns), first > 0) };
        }
    });
}

/// Calls `work` with this thread's room for W's tiles; work inside it finds another.
pub(super) fn with_room(work: impl FnOnce(&mut Vec<Line>)) {
    let mut buffer = W.take();
    work(&mut buffer);
    W.set(buffer);
}

/// Some columns of rows `stride` apart.
struct Columns<'a> {
    values: &'a [bf16],
    stride: usize,
    first: usize,
    count: usize,
}

/// Those columns' products with W's tiles: to the columns `at..at + width` of y, whose rows are `stride` apart.
///
/// # Safety
/// As of [`matmul`].
unsafe fn multiply<T: Sum>(
    team: &Team,
    x: &Columns<'_>,
    w: &[Line],
    y: &Shared<'_, T>,
    (at, width, stride): (usize, usize, usize),
    add: bool,
) {
    let (count, chunks) = (x.values.len() / x.stride, x.count.div_ceil(DEPTH));
    let size = chunks * SIDE;
    let tasks = team.tasks(count * width * x.count, TASK);
    let run = count.div_ceil(BOTH).div_ceil(tasks).min((GROUP / (PAIR * size)).max(1)) * BOTH;
    team.each(count.div_ceil(run), &|task| {
        let rows = &x.values[task * run * x.stride..count.min((task + 1) * run) * x.stride];
        X.with_borrow_mut(|buffer| {
            let tiles = lines(buffer, run / SIDE * size);
            let blocks = rows.chunks(SIDE * x.stride).zip(tiles.chunks_exact_mut(size));
            // SAFETY: the caller's promise.
            blocks.for_each(|(rows, tiles)| unsafe { x86::copied(&rows[x.first..], x.stride, x.count, tiles) });
            let given = Tiles { x: tiles, x_size: size, w, w_size: size, chunks };
            // SAFETY: the caller's promise; these rows of y are this task's alone.
            unsafe {
                x86::configure();
                given.multiply(rows.len() / x.stride, width, |row, column, count, wide, found| {
                    T::put(found, count, wide, y.at((task * run + row) * stride + at + column), stride, add);
                });
                x86::release();
            }
        });
    });
}

/// Tiles of x, 16 rows' `x_size` lines behind the last 16's, and of W, of which as many of each are multiplied.
pub(super) struct Tiles<'a> {
    pub x: &'a [Line],
    pub x_size: usize,
    pub w: &'a [Line],
    pub w_size: usize,
    pub chunks: usize,
}

impl Tiles<'_> {
    /// Calls `put` with (row, column, rows, columns, products) of each 32 of `rows` rows with each 32 of `width` of W.
    ///
    /// # Safety
    /// The machine is [`usable`] and configured.
    pub(super) unsafe fn multiply(
        &self,
        rows: usize,
        width: usize,
        mut put: impl FnMut(usize, usize, usize, usize, &Square),
    ) {
        let &Self { x_size, w_size, chunks, .. } = self;
        let mut found = Square([[0.0; BOTH]; BOTH]);
        for column in (0..width).step_by(BOTH) {
            let w = &self.w[column / SIDE * w_size..];
            for row in (0..rows).step_by(BOTH) {
                let x = &self.x[row / SIDE * x_size..];
                let both = x86::Both { x, x_size, w, w_size, chunks, terms: 1, needed: 1 };
                // SAFETY: the caller's promise; the square has room.
                unsafe { both.multiply(found.0.as_mut_ptr().cast(), BOTH, false) };
                put(row, column, BOTH.min(rows - row), BOTH.min(width - column), &found);
            }
        }
    }
}
