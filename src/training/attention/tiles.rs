//! Attention of bfloat16 on AMX: the file's equations, with keys below each other and queries side by side.
//!
//! ```text
//! Sᵀ = K Qᵀ    Yᵀ = Vᵀ bf16(Pᵀ)    (dY Vᵀ)ᵀ = V dYᵀ
//! dV = bf16(Pᵀ) dY    dK = bf16(Eᵀ) Q    dQᵀ = Kᵀ bf16(Eᵀ)
//! ```
//! A square is 32 keys by 32 queries; what a query has of its own (m, δ, sums of exponentials) is a lane. Sums are
//! float32's. Shares P and slopes E are rounded to bfloat16 before they are multiplied; the sums of shares that y is
//! divided by are not.

use std::ops::Range;

use half::bf16;

use super::super::rows::weigh;
use super::lanes::{LANES as SIDE, Sight, Slopes, Stats};
use super::{Kept, Sequence, Shape, tiles_of, with_room};
use crate::quant::matmul::tiles::halves;
use crate::quant::matmul::tiles::x86::{Both, configure, paired_halves, release, transposed_halves, turned_halves};
use crate::quant::matmul::{Line, Path};
use crate::training::number::narrow;
use crate::training::tile::Out;

/// Rows of a tile.
const HALF: usize = 16;
/// Keys of a block, whose squares are computed together.
const KEYS: usize = 128;
/// Lines of a block of keys, two in each, for 16 queries.
const OVER_KEYS: usize = KEYS / SIDE * HALF;
/// Numbers of float32 of a square.
const SQUARE: usize = SIDE * SIDE;

/// Whether attention over heads of this width can be computed here.
pub(super) fn usable(head_dim: usize) -> bool {
    head_dim.is_multiple_of(SIDE) && halves::usable()
}

/// Keys or values of a sequence and a head, a row each: tiles `[keys / 16, head_dim / 32, 16]`.
fn rows(values: &[bf16], shape: &Shape<'_>, sequence: &Sequence, head: usize, end: usize, out: &mut [Line]) {
    let chunks = shape.head_dim / SIDE;
    let out: &mut [[bf16; SIDE]] = bytemuck::cast_slice_mut(out);
    for position in 0..end {
        let row = &values[sequence.row(position) * shape.keys() + head * shape.head_dim..][..shape.head_dim];
        for (chunk, part) in row.as_chunks::<SIDE>().0.iter().enumerate() {
            out[(position / HALF * chunks + chunk) * HALF + position % HALF] = *part;
        }
    }
}

/// The same, a row for each number of the head: tiles `[head_dim / 16, keys / 32, 16]`, zeros behind the last key.
///
/// # Safety
/// The machine is [`usable`].
unsafe fn columns(values: &[bf16], shape: &Shape<'_>, sequence: &Sequence, head: usize, end: usize, out: &mut [Line]) {
    let (dim, chunks) = (shape.head_dim, out.len() / shape.head_dim);
    let mut square = [[bf16::ZERO; SIDE]; SIDE];
    for (chunk, d) in (0..chunks).flat_map(|chunk| (0..dim).step_by(SIDE).map(move |d| (chunk, d))) {
        for (position, row) in (chunk * SIDE..).zip(&mut square) {
            *row = match position < end {
                true => *values[sequence.row(position) * shape.keys() + head * dim + d..].first_chunk().unwrap_or(row),
                false => [bf16::ZERO; SIDE],
            };
        }
        for half in 0..2 {
            let out = &mut out[((d / HALF + half) * chunks + chunk) * HALF..][..HALF];
            // SAFETY: the caller's promise.
            unsafe { transposed_halves(square.as_flattened(), half * HALF, out) };
        }
    }
}

/// One head of a tile of queries, or of gradients of what they got.
struct Queries<'a> {
    values: &'a [bf16],
    /// From a row to the next.
    stride: usize,
    head_dim: usize,
}

impl<'a> Queries<'a> {
    fn of(values: &'a [bf16], shape: &Shape<'_>, row: usize, query: usize, count: usize) -> Self {
        let (stride, head_dim) = (shape.queries(), shape.head_dim);
        let first = row * stride + query * head_dim;
        Self { values: &values[first..first + (count - 1) * stride + head_dim], stride, head_dim }
    }

    /// A lane for each query: tiles `[2, head_dim / 32, 16]`.
    ///
    /// # Safety
    /// The machine is [`usable`].
    unsafe fn side_by_side(&self, out: &mut [Line]) {
        let half = out.len() / 2;
        for (number, out) in out.chunks_exact_mut(half).enumerate() {
            let rows = self.values.get(number * HALF * self.stride..).unwrap_or(&[]);
            let rows = &rows[..rows.len().min((HALF - 1) * self.stride + self.head_dim)];
            // SAFETY: the caller's promise.
            unsafe { turned_halves(rows, self.stride, self.head_dim, out) };
        }
    }

    /// A lane for each number of the head: tiles `[head_dim / 16, 16]`.
    ///
    /// # Safety
    /// The machine is [`usable`].
    unsafe fn below_each_other(&self, out: &mut [Line]) {
        for (number, out) in out.chunks_exact_mut(HALF).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { paired_halves(self.values, self.stride, self.head_dim, number * HALF, out) };
        }
    }
}

/// What stands on the left of products of one head: blocks of 16 rows, each of so many lines.
struct Left<'a> {
    tiles: &'a [Line],
    size: usize,
}

impl Left<'_> {
    /// Multiplies 32 rows from `block` on, from a chunk of 32 numbers on, with `w`, blocks of which are `w_size` lines.
    ///
    /// # Safety
    /// The machine is [`usable`] and configured; 32 rows of 32 sums, `stride` apart, are there.
    #[allow(clippy::too_many_arguments)]
    unsafe fn multiply(
        &self,
        (block, chunk, chunks): (usize, usize, usize),
        w: &[Line],
        w_size: usize,
        sums: *mut f32,
        stride: usize,
        add: bool,
    ) {
        let x = &self.tiles[block * self.size + chunk * HALF..];
        let both = Both { x, x_size: self.size, w, w_size, chunks, terms: 1, needed: 1 };
        // SAFETY: the caller's promise.
        unsafe { both.multiply(sums, stride, add) };
    }
}

/// The squares of a block with keys that any query of a tile sees, none where there are none.
fn squares(shape: &Shape<'_>, positions: &Range<usize>, block: usize) -> Range<usize> {
    let start = block * KEYS;
    let low = shape.sees(positions.start).start.saturating_sub(start) / SIDE;
    let high = positions.end.saturating_sub(start).min(KEYS).div_ceil(SIDE);
    low.min(high)..high
}

/// Writes y and m of the queries in a range of positions, of the heads that read one head of keys and values.
///
/// # Safety
/// The machine is [`usable`], and nobody else has these rows and heads of y and m.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn forward(
    shape: &Shape<'_>,
    (sequence, own, head): &(Sequence, Range<usize>, usize),
    q: &[bf16],
    k: &[bf16],
    v: &[bf16],
    y: Out<'_, bf16>,
    m: Out<'_>,
) {
    let (dim, wide, end) = (shape.head_dim, shape.queries(), sequence.before + own.end);
    let padded = end.next_multiple_of(KEYS) * dim / 2;
    let room = [padded, padded, SIDE * dim / 2, KEYS * SIDE, KEYS * SIDE / 2, dim * SIDE, dim * SIDE];
    with_room(room, |[keys, values, queries, scores, shared, sums, turned]| {
        let [keys, values, queries, shared] = [keys, values, queries, shared].map(lines);
        rows(k, shape, sequence, *head, end, keys);
        // SAFETY: the caller's promise.
        unsafe { columns(v, shape, sequence, *head, end, values) };
        let keys = Left { tiles: keys, size: dim / SIDE * HALF };
        let values = Left { size: values.len() / (dim / HALF), tiles: values };
        // SAFETY: the caller's promise; places are inside their slices.
        unsafe {
            configure();
            for (row, positions) in tiles_of(*sequence, own.clone(), SIDE) {
                for query in head * shape.group()..(head + 1) * shape.group() {
                    Queries::of(q, shape, row, query, positions.len()).side_by_side(queries);
                    let mut stats = Stats::new();
                    sums.fill(0.0);
                    for block in 0..positions.end.div_ceil(KEYS) {
                        let seen = squares(shape, &positions, block);
                        if seen.is_empty() {
                            continue;
                        }
                        let first = block * KEYS / SIDE + seen.start;
                        let scores = &mut scores[..seen.len() * SQUARE];
                        for (number, square) in scores.chunks_exact_mut(SQUARE).enumerate() {
                            let place = (2 * (first + number), 0, dim / SIDE);
                            keys.multiply(place, queries, keys.size, square.as_mut_ptr(), SIDE, false);
                        }
                        let sight = Sight::new(shape, &positions, first * SIDE);
                        stats.shares(scores, sight, shape.scale, sums, shared, OVER_KEYS);
                        for d in (0..dim).step_by(SIDE) {
                            let place = (d / HALF, first, seen.len());
                            values.multiply(place, shared, OVER_KEYS, sums[d * SIDE..].as_mut_ptr(), SIDE, true);
                        }
                    }
                    let [totals, logs] = stats.done();
                    turn(sums, turned, dim);
                    for (i, found) in turned.chunks_exact_mut(dim).enumerate().take(positions.len()) {
                        weigh(found, 1.0 / totals[i]);
                        let y = y.at((row + i) * wide + query * dim);
                        narrow(found, std::slice::from_raw_parts_mut(y, dim));
                        *m.at((row + i) * shape.heads + query) = logs[i];
                    }
                }
            }
            release();
        }
    });
}

/// Adds one sequence's gradients of one head of keys and values, and of the query heads that read it.
///
/// # Safety
/// The machine is [`usable`], and nobody else has these rows and heads of the gradients.
pub(super) unsafe fn backward(
    shape: &Shape<'_>,
    kept: &Kept<'_, bf16>,
    sequence: &Sequence,
    head: usize,
    [dq, dk, dv]: [Out<'_>; 3],
) {
    let (dim, wide, end, group) = (shape.head_dim, shape.queries(), sequence.seen(), shape.group());
    let (padded, tile) = (end.next_multiple_of(KEYS) * dim / 2, SIDE * dim / 2);
    let (block_of, halved) = (KEYS * SIDE, KEYS * SIDE / 2);
    let (deltas, turns) = (sequence.length * group, dim * SIDE);
    let room = [padded, padded, padded, deltas, 4 * tile, block_of, block_of, 3 * halved, 2 * KEYS * dim, turns, turns];
    with_room(room, |[keys, values, turned_keys, deltas, sides, scores, products, rounded, sums, found, turned]| {
        kept.deltas(shape, sequence, head, deltas);
        let [keys, values, turned_keys] = [keys, values, turned_keys].map(lines);
        rows(kept.k, shape, sequence, head, end, keys);
        rows(kept.v, shape, sequence, head, end, values);
        // SAFETY: the caller's promise.
        unsafe { columns(kept.k, shape, sequence, head, end, turned_keys) };
        let size = dim / SIDE * HALF;
        let (keys, values) = (Left { tiles: keys, size }, Left { tiles: values, size });
        let turned_keys = Left { size: turned_keys.len() / (dim / HALF), tiles: turned_keys };
        let (sides, rounded) = (lines(sides), lines(rounded));
        let (dks, dvs) = sums.split_at_mut(KEYS * dim);
        // SAFETY: the caller's promise; places are inside their slices.
        unsafe {
            configure();
            for block in 0..end.div_ceil(KEYS) {
                dks.fill(0.0);
                dvs.fill(0.0);
                for (row, positions) in tiles_of(*sequence, 0..sequence.length, SIDE) {
                    let seen = squares(shape, &positions, block);
                    if seen.is_empty() {
                        continue;
                    }
                    let first = block * KEYS / SIDE + seen.start;
                    let sight = Sight::new(shape, &positions, first * SIDE);
                    for query in head * group..(head + 1) * group {
                        let (q, rest) = sides.split_at_mut(2 * size);
                        let (dy, rest) = rest.split_at_mut(2 * size);
                        let (q_below, dy_below) = rest.split_at_mut(2 * size);
                        let [given, got] =
                            [kept.q, kept.dy].map(|values| Queries::of(values, shape, row, query, positions.len()));
                        given.side_by_side(q);
                        given.below_each_other(q_below);
                        got.side_by_side(dy);
                        got.below_each_other(dy_below);
                        let (scores, products) =
                            (&mut scores[..seen.len() * SQUARE], &mut products[..seen.len() * SQUARE]);
                        for number in 0..seen.len() {
                            let place = (2 * (first + number), 0, dim / SIDE);
                            keys.multiply(place, q, size, scores[number * SQUARE..].as_mut_ptr(), SIDE, false);
                            values.multiply(place, dy, size, products[number * SQUARE..].as_mut_ptr(), SIDE, false);
                        }
                        let mut own = [[0.0; SIDE]; 2];
                        for i in 0..positions.len() {
                            own[0][i] = kept.m[(row + i) * shape.heads + query];
                            own[1][i] = deltas[(row + i - sequence.start) * group + query % group];
                        }
                        let (p, rest) = rounded.split_at_mut(KEYS);
                        let (e, pairs) = rest.split_at_mut(KEYS);
                        let mut slopes = Slopes { p, e, pairs, stride: OVER_KEYS };
                        slopes.fill([scores, products], sight, shape.scale, &own);
                        let (p, e) = (Left { tiles: p, size: HALF }, Left { tiles: e, size: HALF });
                        for d in (0..dim).step_by(SIDE) {
                            for number in 0..seen.len() {
                                let (place, at) = ((2 * number, 0, 1), (seen.start + number) * SIDE * dim + d);
                                p.multiply(place, &dy_below[d..], HALF, dvs[at..].as_mut_ptr(), dim, true);
                                e.multiply(place, &q_below[d..], HALF, dks[at..].as_mut_ptr(), dim, true);
                            }
                            let (place, w_size) = ((d / HALF, first, seen.len()), OVER_KEYS);
                            let sums = found[d * SIDE..].as_mut_ptr();
                            turned_keys.multiply(place, pairs, w_size, sums, SIDE, false);
                        }
                        turn(found, turned, dim);
                        for (i, found) in turned.chunks_exact(dim).enumerate().take(positions.len()) {
                            let out = dq.at((row + i) * wide + query * dim);
                            add(found, std::slice::from_raw_parts_mut(out, dim));
                        }
                    }
                }
                for (position, (dks, dvs)) in (block * KEYS..end).zip(dks.chunks_exact(dim).zip(dvs.chunks_exact(dim)))
                {
                    let at = sequence.row(position) * shape.keys() + head * dim;
                    add(dks, std::slice::from_raw_parts_mut(dk.at(at), dim));
                    add(dvs, std::slice::from_raw_parts_mut(dv.at(at), dim));
                }
            }
            release();
        }
    });
}

fn lines(room: &mut [f32]) -> &mut [Line] {
    bytemuck::cast_slice_mut(room)
}

/// Sums `[head_dim, 32]` as `[32, head_dim]`.
fn turn(sums: &[f32], out: &mut [f32], dim: usize) {
    let rows: Vec<&[f32]> = sums.chunks_exact(SIDE).collect();
    Path::best().transpose(&rows, SIDE, out, dim);
}

fn add(found: &[f32], out: &mut [f32]) {
    out.iter_mut().zip(found).for_each(|(out, found)| *out += found);
}
