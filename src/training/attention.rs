//! Causal attention inside each sequence of a ragged batch, forward and back, without a matrix of tokens by tokens.
//!
//! ```text
//! s_tj = scale q_t · k_j    m_t = log Σ_j exp s_tj    p_tj = exp(s_tj − m_t)    y_t = Σ_j p_tj v_j      j ≤ t, j > t − window
//! δ_t = dy_t · y_t    e_tj = scale p_tj (dy_t · v_j − δ_t)
//! dq_t = Σ_j e_tj k_j    dk_j = Σ_t e_tj q_t    dv_j = Σ_t p_tj dy_t
//! ```
//! A tile of queries meets a block of keys at a time; forward, sums so far are scaled down when a larger score comes. Of
//! the forward pass y and m are kept. Blocks begin with the sequence, and their sums run in order, so a row's numbers
//! depend on its sequence alone. Products of bfloat16 are made of tiles where a machine has them (`attention/tiles.rs`).
//!
//! Source: Dao et al., `FlashAttention`, 2022, arXiv 2205.14135; Milakov and Gimelshein, Online normalizer calculation
//! for softmax, 2018, arXiv 1805.02867.

#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::cell::RefCell;
use std::ops::Range;

use bytemuck::Zeroable;

use super::number::Number;
use super::rows::{shares, slopes, weigh};
use super::tile::{COLUMNS as KEYS, Out, Strides, accumulate};
use crate::error::{Error, Result};
use crate::quant::matmul::{Line, Path};
use crate::team::Team;

/// Queries of a tile.
const QUERIES: usize = 48;
/// Queries of it that see about the same keys.
const FEW: usize = 12;
/// Queries of a forward task, where there are more.
const TASK: usize = 8 * QUERIES;

/// What tensors q `[T, heads, head_dim]`, k and v `[T, key_value_heads, head_dim]` hold, and who sees what.
#[derive(Clone, Copy, Debug)]
pub struct Shape<'a> {
    /// The sequences' own tokens, in order.
    pub lengths: &'a [usize],
    /// Of each sequence, the tokens before its own: the first ones of the last sequence before it that has none; empty
    /// where no sequence has any.
    pub shared: &'a [usize],
    /// Query heads, a multiple of the key and value heads.
    pub heads: usize,
    /// Heads of keys and values.
    pub key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens that a token sees, itself included.
    pub window: Option<usize>,
    /// Of the scores.
    pub scale: f32,
}

/// One sequence: where its own tokens are, and those that come before them.
#[derive(Clone, Copy, Debug)]
struct Sequence {
    start: usize,
    length: usize,
    before: usize,
    before_start: usize,
}

impl Sequence {
    fn seen(&self) -> usize {
        self.before + self.length
    }

    /// The row of the key at a position.
    fn row(&self, position: usize) -> usize {
        if position < self.before { self.before_start + position } else { self.start + position - self.before }
    }
}

impl Shape<'_> {
    fn sequences(&self) -> Result<Vec<Sequence>> {
        let wrong = |what: String| Err(Error::failure(format!("attention: {what}")));
        let dims = [self.heads, self.key_value_heads, self.head_dim];
        if dims.contains(&0) || !self.heads.is_multiple_of(self.key_value_heads) || self.window == Some(0) {
            return wrong(format!("expected sizes that agree, got {self:?}"));
        }
        if !self.shared.is_empty() && self.shared.len() != self.lengths.len() {
            return wrong(format!("expected {} shared counts, got {}", self.lengths.len(), self.shared.len()));
        }
        let (mut start, mut whole) = (0, (0, 0));
        let mut found = Vec::new();
        for (index, &length) in self.lengths.iter().enumerate() {
            let before = self.shared.get(index).copied().unwrap_or(0);
            if before == 0 {
                whole = (start, length);
            } else if before > whole.1 {
                return wrong(format!("expected at most {} shared tokens, got {before}", whole.1));
            }
            found.push(Sequence { start, length, before, before_start: whole.0 });
            start += length;
        }
        Ok(found)
    }

    fn check(&self, tensors: &[(&str, usize, usize)]) -> Result<()> {
        let tokens: usize = self.lengths.iter().sum();
        for &(name, got, width) in tensors {
            if got != tokens * width {
                return Err(Error::failure(format!(
                    "attention: expected {} numbers of {name}, got {got}",
                    tokens * width
                )));
            }
        }
        Ok(())
    }

    fn queries(&self) -> usize {
        self.heads * self.head_dim
    }

    fn keys(&self) -> usize {
        self.key_value_heads * self.head_dim
    }

    fn group(&self) -> usize {
        self.heads / self.key_value_heads
    }

    /// The positions that the query at a position sees.
    fn sees(&self, position: usize) -> Range<usize> {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1
    }
}

/// Keys or values of a sequence and a head, in blocks of [`KEYS`]: `[blocks, head_dim, KEYS]`, times a factor.
fn pack<T: Number>(
    values: &[T],
    shape: &Shape<'_>,
    sequence: &Sequence,
    head: usize,
    end: usize,
    factor: f32,
    out: &mut [f32],
) {
    let dim = shape.head_dim;
    for position in 0..end {
        let row = &values[sequence.row(position) * shape.keys() + head * dim..][..dim];
        let block = &mut out[position / KEYS * KEYS * dim..][..KEYS * dim];
        for (column, value) in block[position % KEYS..].iter_mut().step_by(KEYS).zip(row) {
            *column = factor * value.wide();
        }
    }
}

/// The same in rows `[positions, head_dim]`.
fn gather<T: Number>(values: &[T], shape: &Shape<'_>, sequence: &Sequence, head: usize, end: usize, out: &mut [f32]) {
    for (position, out) in out.chunks_exact_mut(shape.head_dim).take(end).enumerate() {
        let row = &values[sequence.row(position) * shape.keys() + head * shape.head_dim..][..shape.head_dim];
        out.iter_mut().zip(row).for_each(|(out, value)| *out = value.wide());
    }
}

thread_local! {
    static ROOM: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with slices of this thread's memory, of the lengths asked for.
fn with_room<const N: usize>(lengths: [usize; N], work: impl FnOnce([&mut [f32]; N])) {
    ROOM.with_borrow_mut(|lines| {
        let whole: usize = lengths.iter().map(|length| length.next_multiple_of(16)).sum();
        if lines.len() < whole / 16 {
            lines.resize(whole / 16, Line::zeroed());
        }
        let mut rest: &mut [f32] = bytemuck::cast_slice_mut(lines);
        work(lengths.map(|length| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(length.next_multiple_of(16));
            rest = after;
            &mut part[..length]
        }));
    });
}

/// Tiles of so many queries in a range of positions: their first rows in the stream, and their positions.
fn tiles_of(sequence: Sequence, own: Range<usize>, queries: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    own.clone().step_by(queries).map(move |first| {
        let end = own.end.min(first + queries);
        (sequence.start + first, sequence.before + first..sequence.before + end)
    })
}

/// Runs of [`FEW`] queries of a tile, with the columns of a block that any of them sees: (first, end, columns).
fn runs(
    shape: &Shape<'_>,
    positions: &Range<usize>,
    block: usize,
) -> impl Iterator<Item = (usize, usize, Range<usize>)> {
    let (shape, positions) = (*shape, positions.clone());
    let keys = block * KEYS..(block + 1) * KEYS;
    (0..positions.len()).step_by(FEW).filter_map(move |first| {
        let end = positions.len().min(first + FEW);
        let low = shape.sees(positions.start + first).start.max(keys.start);
        let high = shape.sees(positions.start + end - 1).end.min(keys.end);
        (low < high).then(|| (first, end, low - keys.start..high - keys.start))
    })
}

/// Writes y, like q, and m `[T, heads]`.
///
/// # Errors
/// Sizes that don't agree.
#[allow(clippy::too_many_arguments)]
pub fn forward<T: Number>(
    path: Path,
    team: &Team,
    shape: Shape<'_>,
    q: &[T],
    k: &[T],
    v: &[T],
    y: &mut [T],
    m: &mut [f32],
) -> Result<()> {
    let (wide, narrow) = (shape.queries(), shape.keys());
    shape.check(&[("q", q.len(), wide), ("k", k.len(), narrow), ("v", v.len(), narrow)])?;
    shape.check(&[("y", y.len(), wide), ("m", m.len(), shape.heads)])?;
    let mut tasks = Vec::new();
    for sequence in shape.sequences()? {
        for first in (0..sequence.length).step_by(TASK) {
            let own = first..sequence.length.min(first + TASK);
            tasks.extend((0..shape.key_value_heads).map(|head| (sequence, own.clone(), head)));
        }
    }
    let (m, dim) = (Out::new(m), shape.head_dim);
    #[cfg(target_arch = "x86_64")]
    if T::HALF && tiles::usable(shape.head_dim) {
        let ([q, k, v], y) = ([q, k, v].map(bytemuck::cast_slice), Out::new(bytemuck::cast_slice_mut(y)));
        // SAFETY: the machine has the tiles; rows of a head are one task's.
        team.each(tasks.len(), &|task| unsafe { tiles::forward(&shape, &tasks[task], q, k, v, y, m) });
        return Ok(());
    }
    let y = Out::new(y);
    team.each(tasks.len(), &|task| {
        let (sequence, own, head) = &tasks[task];
        let end = sequence.before + own.end;
        let blocks = end.div_ceil(KEYS);
        let packed = blocks * KEYS * dim;
        with_room(
            [packed, end * dim, QUERIES * KEYS, QUERIES * dim, QUERIES * dim, 2 * QUERIES],
            |[columns, values, p, sums, queries, kept]| {
                pack(k, &shape, sequence, *head, end, shape.scale, columns);
                gather(v, &shape, sequence, *head, end, values);
                let (largest, totals) = kept.split_at_mut(QUERIES);
                for (row, positions) in tiles_of(*sequence, own.clone(), QUERIES) {
                    for query in head * shape.group()..(head + 1) * shape.group() {
                        largest.fill(f32::NEG_INFINITY);
                        totals.fill(0.0);
                        sums.fill(0.0);
                        let (q, q_row) = T::rows(&q[row * wide + query * dim..], wide, dim, positions.len(), queries);
                        for block in 0..positions.end.div_ceil(KEYS) {
                            for (first, last, seen) in runs(&shape, &positions, block) {
                                let p = &mut p[first * KEYS..last * KEYS];
                                let strides = Strides { a_row: q_row, a_step: 1, b_step: KEYS, c_row: KEYS };
                                let columns = &columns[block * KEYS * dim..];
                                // SAFETY: these queries are inside q, a block is KEYS columns wide, and so are rows of p.
                                unsafe {
                                    let sizes = (last - first, dim, seen.end.next_multiple_of(16));
                                    accumulate(
                                        path,
                                        sizes,
                                        strides,
                                        q.add(first * q_row),
                                        columns.as_ptr(),
                                        p.as_mut_ptr(),
                                        true,
                                    );
                                }
                                for (i, p) in p.chunks_exact_mut(KEYS).enumerate() {
                                    let sees = shape.sees(positions.start + first + i);
                                    let own =
                                        sees.start.saturating_sub(block * KEYS)..sees.end.saturating_sub(block * KEYS);
                                    let own = own.start.min(KEYS)..own.end.min(KEYS);
                                    let place = first + i;
                                    let sums = &mut sums[place * dim..][..dim];
                                    shares(p, own, seen.end, &mut largest[place], &mut totals[place], sums);
                                }
                                let strides = Strides { a_row: KEYS, a_step: 1, b_step: dim, c_row: dim };
                                // SAFETY: keys that are seen are among the gathered values; the sums are this tile's.
                                unsafe {
                                    let values = values[(block * KEYS + seen.start) * dim..].as_ptr();
                                    let p = p[seen.start..].as_ptr();
                                    let sums = sums[first * dim..].as_mut_ptr();
                                    accumulate(path, (last - first, seen.len(), dim), strides, p, values, sums, false);
                                }
                            }
                        }
                        for i in 0..positions.len() {
                            let (at, sums) = ((row + i) * wide + query * dim, &mut sums[i * dim..][..dim]);
                            weigh(sums, 1.0 / totals[i]);
                            // SAFETY: inside; each query of each head is one task's.
                            unsafe {
                                let y = std::slice::from_raw_parts_mut(y.at(at), dim);
                                T::write(y, p, |y| y.copy_from_slice(sums));
                                *m.at((row + i) * shape.heads + query) = largest[i] + totals[i].ln();
                            }
                        }
                    }
                }
            },
        );
    });
    Ok(())
}

/// What the forward pass read and kept, and the gradient of its result.
#[derive(Clone, Copy, Debug)]
pub struct Kept<'a, T> {
    /// As in [`forward`].
    pub q: &'a [T],
    /// As in [`forward`].
    pub k: &'a [T],
    /// As in [`forward`].
    pub v: &'a [T],
    /// As in [`forward`].
    pub y: &'a [T],
    /// As in [`forward`].
    pub m: &'a [f32],
    /// Like y.
    pub dy: &'a [T],
}

impl<T: Number> Kept<'_, T> {
    /// The same where numbers are bfloat16.
    #[cfg(target_arch = "x86_64")]
    fn halves(&self) -> Kept<'_, half::bf16> {
        let &Self { m, .. } = self;
        let [q, k, v, y, dy] = [self.q, self.k, self.v, self.y, self.dy].map(bytemuck::cast_slice);
        Kept { q, k, v, y, m, dy }
    }

    /// δ of a sequence's own queries, of the heads that read one head of keys and values `[length, heads]`.
    fn deltas(&self, shape: &Shape<'_>, sequence: &Sequence, head: usize, out: &mut [f32]) {
        let dim = shape.head_dim;
        for (i, deltas) in out.chunks_exact_mut(shape.group()).enumerate() {
            for (query, delta) in (head * shape.group()..).zip(deltas) {
                let at = (sequence.start + i) * shape.queries() + query * dim;
                *delta = dot(&self.y[at..][..dim], &self.dy[at..][..dim]);
            }
        }
    }
}

/// Writes dq, dk and dv.
///
/// # Errors
/// Sizes that don't agree.
pub fn backward<T: Number>(
    path: Path,
    team: &Team,
    shape: Shape<'_>,
    kept: Kept<'_, T>,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) -> Result<()> {
    let (wide, narrow) = (shape.queries(), shape.keys());
    shape.check(&[("q", kept.q.len(), wide), ("k", kept.k.len(), narrow), ("v", kept.v.len(), narrow)])?;
    shape.check(&[("y", kept.y.len(), wide), ("m", kept.m.len(), shape.heads), ("dy", kept.dy.len(), wide)])?;
    shape.check(&[("dq", dq.len(), wide), ("dk", dk.len(), narrow), ("dv", dv.len(), narrow)])?;
    dq.fill(0.0);
    dk.fill(0.0);
    dv.fill(0.0);
    let sequences = shape.sequences()?;
    // those that share keys stand together: their gradients meet in them
    let families: Vec<&[Sequence]> = sequences.chunk_by(|_, next| next.before > 0).collect();
    let (dq, dk, dv) = (Out::new(dq), Out::new(dk), Out::new(dv));
    #[cfg(target_arch = "x86_64")]
    let halves = (T::HALF && tiles::usable(shape.head_dim)).then(|| kept.halves());
    team.each(families.len() * shape.key_value_heads, &|task| {
        let head = task % shape.key_value_heads;
        for sequence in families[task / shape.key_value_heads] {
            #[cfg(target_arch = "x86_64")]
            if let Some(kept) = &halves {
                // SAFETY: the machine has the tiles; a family's rows of a head are one task's.
                unsafe { tiles::backward(&shape, kept, sequence, head, [dq, dk, dv]) };
                continue;
            }
            back_through(path, &shape, &kept, sequence, head, [dq, dk, dv]);
        }
    });
    Ok(())
}

/// Adds one sequence's gradients of one head of keys and values, and of the query heads that read it.
fn back_through<T: Number>(
    path: Path,
    shape: &Shape<'_>,
    kept: &Kept<'_, T>,
    sequence: &Sequence,
    head: usize,
    out: [Out<'_>; 3],
) {
    let (dim, wide, end) = (shape.head_dim, shape.queries(), sequence.seen());
    let [dq, dk, dv] = out;
    let blocks = end.div_ceil(KEYS);
    let packed = blocks * KEYS * dim;
    let tile = QUERIES * KEYS;
    let deltas = sequence.length * shape.group();
    let queries = QUERIES * dim;
    let room = [packed, packed, end * dim, tile, tile, KEYS * dim, KEYS * dim, deltas, queries, queries];
    with_room(room, |[keys, values, rows, p, e, dks, dvs, deltas, q_room, dy_room]| {
        pack(kept.k, shape, sequence, head, end, shape.scale, keys);
        pack(kept.v, shape, sequence, head, end, 1.0, values);
        gather(kept.k, shape, sequence, head, end, rows);
        kept.deltas(shape, sequence, head, deltas);
        for block in 0..blocks {
            dks.fill(0.0);
            dvs.fill(0.0);
            let width = KEYS.min(end - block * KEYS);
            for (row, positions) in tiles_of(*sequence, 0..sequence.length, QUERIES) {
                let seen_by_all = runs(shape, &positions, block).count();
                if seen_by_all == 0 {
                    continue;
                }
                for query in head * shape.group()..(head + 1) * shape.group() {
                    p.fill(0.0);
                    e.fill(0.0);
                    let at = row * wide + query * dim;
                    let (q, q_row) = T::rows(&kept.q[at..], wide, dim, positions.len(), q_room);
                    let (dy, dy_row) = T::rows(&kept.dy[at..], wide, dim, positions.len(), dy_room);
                    for (first, last, seen) in runs(shape, &positions, block) {
                        let sizes = (last - first, dim, seen.end.next_multiple_of(16));
                        let (p, e) = (&mut p[first * KEYS..last * KEYS], &mut e[first * KEYS..last * KEYS]);
                        for (left, a_row, right, found) in
                            [(q, q_row, &*keys, &mut *p), (dy, dy_row, &*values, &mut *e)]
                        {
                            let strides = Strides { a_row, a_step: 1, b_step: KEYS, c_row: KEYS };
                            let right = &right[block * KEYS * dim..];
                            // SAFETY: these queries are inside, a block is KEYS columns wide, and so are p and e.
                            unsafe {
                                accumulate(
                                    path,
                                    sizes,
                                    strides,
                                    left.add(first * a_row),
                                    right.as_ptr(),
                                    found.as_mut_ptr(),
                                    true,
                                );
                            }
                        }
                        for (i, (p, e)) in p.chunks_exact_mut(KEYS).zip(e.chunks_exact_mut(KEYS)).enumerate() {
                            let position = positions.start + first + i;
                            let sees = shape.sees(position);
                            let own = sees.start.saturating_sub(block * KEYS)..sees.end.saturating_sub(block * KEYS);
                            let own = own.start.min(KEYS)..own.end.min(KEYS);
                            let m = kept.m[(row + first + i) * shape.heads + query];
                            let delta = deltas[(position - sequence.before) * shape.group() + query % shape.group()];
                            slopes(p, e, own, m, delta, shape.scale);
                        }
                    }
                    let count = positions.len();
                    let across = Strides { a_row: KEYS, a_step: 1, b_step: dim, c_row: wide };
                    let down = |b_step| Strides { a_row: 1, a_step: KEYS, b_step, c_row: dim };
                    // SAFETY: queries and keys are inside, and this task's alone.
                    unsafe {
                        let rows = rows[block * KEYS * dim..].as_ptr();
                        accumulate(path, (count, width, dim), across, e.as_ptr(), rows, dq.at(at), false);
                        accumulate(path, (width, count, dim), down(q_row), e.as_ptr(), q, dks.as_mut_ptr(), false);
                        accumulate(path, (width, count, dim), down(dy_row), p.as_ptr(), dy, dvs.as_mut_ptr(), false);
                    }
                }
            }
            for (position, (dks, dvs)) in (block * KEYS..end).zip(dks.chunks_exact(dim).zip(dvs.chunks_exact(dim))) {
                let at = sequence.row(position) * shape.keys() + head * dim;
                for (out, found) in [(dk, dks), (dv, dvs)] {
                    // SAFETY: keys of a family and a head are one task's.
                    let out = unsafe { std::slice::from_raw_parts_mut(out.at(at), dim) };
                    out.iter_mut().zip(found).for_each(|(out, found)| *out += found);
                }
            }
        }
    });
}

/// Σ x y, in 16 lanes.
#[inline]
fn dot<T: Number>(x: &[T], y: &[T]) -> f32 {
    let ((whole, rest), (y_whole, y_rest)) = (x.as_chunks::<16>(), y.as_chunks::<16>());
    let mut lanes = [0.0; 16];
    for (x, y) in whole.iter().zip(y_whole) {
        for lane in 0..16 {
            lanes[lane] += x[lane].wide() * y[lane].wide();
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().zip(y_rest).map(|(x, y)| x.wide() * y.wide()).sum::<f32>()
}

#[cfg(test)]
mod tests;
