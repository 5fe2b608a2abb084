//! What low-rank matrices beside linear layers of the same inputs add: forward, and back.
//!
//! ```text
//! y_i += s_i l_i B_iᵀ,  l_i = x A_iᵀ
//! d_i = s_i dy_i B_i    dA_i = d_iᵀ x    dB_i = s_i dy_iᵀ l_i    dx += Σ_i d_i A_i
//! ```
//! Sums run in order (over inputs; ranks; rows), fused. Rows do not touch each other, and gradients of A and B add up rows
//! from the first to the last, whatever the number of threads.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::Zeroable;

use super::tile::{self, COLUMNS, Out, Strides, accumulate};
use crate::error::{Error, Result};
use crate::quant::matmul::{Line, Path};
use crate::team::Team;

/// Rows of a packed panel that are gone through together: they stay in the second cache.
const STEPS: usize = 512;
/// Fewest rows of x that are worth a task of their own.
const FEW: usize = 16 * tile::ROWS;
/// Rows that gradients of A and B add up at a time.
const RUN: usize = 128;

/// One layer.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// A `[rank, in]`
    pub a: &'a [f32],
    /// B `[out, rank]`
    pub b: &'a [f32],
    /// s
    pub scale: f32,
}

/// What `inputs` tells of a part: outputs and rank.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    out: usize,
    rank: usize,
}

fn sizes(parts: &[Part<'_>], inputs: usize) -> Result<Vec<Sizes>> {
    let wrong = |what: String| Err(Error::failure(format!("low-rank linear: {what}")));
    let mut found = Vec::new();
    for part in parts {
        let rank = part.a.len().checked_div(inputs).unwrap_or(0);
        let out = part.b.len().checked_div(rank).unwrap_or(0);
        if rank == 0 || part.a.len() != rank * inputs || part.b.len() != out * rank {
            return wrong(format!(
                "expected A [rank, {inputs}] and B [out, rank], got {} and {} numbers",
                part.a.len(),
                part.b.len()
            ));
        }
        found.push(Sizes { out, rank });
    }
    Ok(found)
}

fn length(name: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::failure(format!("low-rank linear: expected {expected} numbers of {name}, got {got}")))
}

/// Adds to y_i `[rows, out]` and writes l_i `[rows, rank]`, of x `[rows, inputs]`.
///
/// # Errors
/// Sizes that don't agree.
pub fn forward(
    path: Path,
    team: &Team,
    x: &[f32],
    inputs: usize,
    parts: &[Part<'_>],
    y: &mut [&mut [f32]],
    low: &mut [&mut [f32]],
) -> Result<()> {
    let sizes = sizes(parts, inputs)?;
    let rows = x.len().checked_div(inputs).unwrap_or(0);
    length("x", x.len(), rows * inputs)?;
    length("outputs", y.len().min(low.len()), parts.len())?;
    for ((size, y), low) in sizes.iter().zip(&*y).zip(&*low) {
        length("y", y.len(), rows * size.out)?;
        length("low", low.len(), rows * size.rank)?;
    }
    for ((part, size), low) in parts.iter().zip(&sizes).zip(&mut *low) {
        let flat = transposed(part.a, size.rank, inputs, 1.0);
        let strides = Strides { a_row: inputs, a_step: 1, b_step: size.rank, c_row: size.rank };
        by_rows(path, team, (rows, inputs, size.rank), strides, x, &flat, low);
    }
    let ends: Vec<usize> = sizes
        .iter()
        .scan(0, |sum, size| {
            *sum += size.out.div_ceil(COLUMNS);
            Some(*sum)
        })
        .collect();
    let outs: Vec<Out> = y.iter_mut().map(|y| Out::new(y)).collect();
    let lows: Vec<&[f32]> = low.iter().map(|low| &**low).collect();
    panels(team, ends.last().copied().unwrap_or(0), rows, &|panel, buffer, fresh, range| {
        let index = ends.partition_point(|&end| end <= panel);
        let (part, Sizes { out, rank }) = (&parts[index], sizes[index]);
        let first = (panel - index.checked_sub(1).map_or(0, |before| ends[before])) * COLUMNS;
        let wide = COLUMNS.min(out - first);
        let packed = buffer.room(rank * COLUMNS);
        if fresh {
            pack_rows(&part.b[first * rank..], rank, wide, part.scale, packed);
        }
        for start in (0..rank).step_by(STEPS) {
            let steps = STEPS.min(rank - start);
            let strides = Strides { a_row: rank, a_step: 1, b_step: COLUMNS, c_row: out };
            // SAFETY: rows and columns are inside (lengths were checked); these of y are this task's alone.
            unsafe {
                let a = lows[index].as_ptr().add(range.start * rank + start);
                let c = outs[index].at(range.start * out + first);
                let panel = packed.as_ptr().add(start * COLUMNS);
                accumulate(path, (range.len(), steps, wide), strides, a, panel, c, false);
            }
        }
    });
    Ok(())
}

/// What a part's backward pass reads and writes.
pub struct Back<'a> {
    /// dy `[rows, out]`
    pub dy: &'a [f32],
    /// l `[rows, rank]`, of the forward pass
    pub low: &'a [f32],
    /// d `[rows, rank]`, to be written
    pub dlow: &'a mut [f32],
    /// dA `[rank, in]`, to be written where it is wanted
    pub da: Option<&'a mut [f32]>,
    /// dB `[out, rank]`, to be written where it is wanted
    pub db: Option<&'a mut [f32]>,
}

/// Writes the gradients of A and B where they are wanted, and adds to that of x where it is.
///
/// # Errors
/// Sizes that don't agree.
pub fn backward(
    path: Path,
    team: &Team,
    x: &[f32],
    inputs: usize,
    parts: &[Part<'_>],
    back: &mut [Back<'_>],
    dx: Option<&mut [f32]>,
) -> Result<()> {
    let sizes = sizes(parts, inputs)?;
    let rows = x.len().checked_div(inputs).unwrap_or(0);
    length("x", x.len(), rows * inputs)?;
    length("gradients", back.len(), parts.len())?;
    for (size, back) in sizes.iter().zip(&*back) {
        length("dy", back.dy.len(), rows * size.out)?;
        length("low", back.low.len(), rows * size.rank)?;
        length("dlow", back.dlow.len(), rows * size.rank)?;
        length("da", back.da.as_ref().map_or(size.rank * inputs, |da| da.len()), size.rank * inputs)?;
        length("db", back.db.as_ref().map_or(size.out * size.rank, |db| db.len()), size.out * size.rank)?;
    }
    if let Some(dx) = &dx {
        length("dx", dx.len(), rows * inputs)?;
    }
    for ((part, &Sizes { out, rank }), back) in parts.iter().zip(&sizes).zip(&mut *back) {
        let scaled: Vec<f32> = part.b.iter().map(|b| part.scale * b).collect();
        let strides = Strides { a_row: out, a_step: 1, b_step: rank, c_row: rank };
        by_rows(path, team, (rows, out, rank), strides, back.dy, &scaled, back.dlow);
        if let Some(db) = &mut back.db {
            over_rows(path, team, (out, rank), rows, back.dy, back.low, db);
            db.iter_mut().for_each(|db| *db *= part.scale);
        }
        if let Some(da) = &mut back.da {
            over_rows(path, team, (rank, inputs), rows, back.dlow, x, da);
        }
    }
    let Some(dx) = dx else { return Ok(()) };
    let dx = Out::new(dx);
    let back = &*back;
    let deep: usize = sizes.iter().map(|size| size.rank).sum();
    panels(team, inputs.div_ceil(COLUMNS), rows, &|panel, buffer, fresh, range| {
        let first = panel * COLUMNS;
        let wide = COLUMNS.min(inputs - first);
        let packed = buffer.room(deep * COLUMNS);
        let mut from = 0;
        for ((part, &Sizes { rank, .. }), back) in parts.iter().zip(&sizes).zip(back) {
            let packed = &mut packed[from * COLUMNS..][..rank * COLUMNS];
            if fresh {
                pack_columns(&part.a[first..], inputs, wide, packed);
            }
            for start in (0..rank).step_by(STEPS) {
                let steps = STEPS.min(rank - start);
                let strides = Strides { a_row: rank, a_step: 1, b_step: COLUMNS, c_row: inputs };
                // SAFETY: rows and columns are inside (lengths were checked); these of dx are this task's alone.
                unsafe {
                    let a = back.dlow.as_ptr().add(range.start * rank + start);
                    let c = dx.at(range.start * inputs + first);
                    let panel = packed.as_ptr().add(start * COLUMNS);
                    accumulate(path, (range.len(), steps, wide), strides, a, panel, c, false);
                }
            }
            from += rank;
        }
    });
    Ok(())
}

/// c `[rows, columns]` = a `[rows, steps]` b `[steps, columns]`, in parallel over rows.
fn by_rows(
    path: Path,
    team: &Team,
    (rows, steps, columns): (usize, usize, usize),
    strides: Strides,
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
) {
    let c = Out::new(c);
    let run = rows.div_ceil(team.tasks(rows * steps * columns, 1 << 17)).next_multiple_of(12).max(12);
    team.each(rows.div_ceil(run), &|task| {
        let first = task * run;
        let count = run.min(rows - first);
        // SAFETY: the caller's slices are as long as the sizes say; these rows of c are this task's alone.
        unsafe {
            let (a, c) = (a.as_ptr().add(first * steps), c.at(first * columns));
            accumulate(path, (count, steps, columns), strides, a, b.as_ptr(), c, true);
        }
    });
}

/// c `[high, wide]` = Σ_t a`[t, high]` b`[t, wide]`, in the order of t, in parallel over the longer side of c.
fn over_rows(path: Path, team: &Team, (high, wide): (usize, usize), rows: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
    if rows == 0 {
        c.fill(0.0);
        return;
    }
    let c = Out::new(c);
    let strip = if high > wide { 96 } else { COLUMNS };
    let strides = Strides { a_row: 1, a_step: high, b_step: wide, c_row: wide };
    team.each(high.max(wide).div_ceil(strip), &|task| {
        let first = task * strip;
        let (i, j) = if high > wide { (first, 0) } else { (0, first) };
        let sizes = if high > wide { (strip.min(high - first), wide) } else { (high, strip.min(wide - first)) };
        for start in (0..rows).step_by(RUN) {
            let steps = RUN.min(rows - start);
            // SAFETY: the caller's slices are as long as the sizes say; this part of c is this task's alone.
            unsafe {
                let (a, b) = (a.as_ptr().add(start * high + i), b.as_ptr().add(start * wide + j));
                accumulate(path, (sizes.0, steps, sizes.1), strides, a, b, c.at(i * wide + j), start == 0);
            }
        }
    });
}

/// Memory for a panel, and which one stands in it.
struct Buffer {
    lines: Vec<Line>,
    holds: (u64, usize),
}

impl Buffer {
    fn room(&mut self, count: usize) -> &mut [f32] {
        if self.lines.len() < count.div_ceil(16) {
            self.lines.resize(count.div_ceil(16), Line::zeroed());
        }
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..count]
    }
}

/// What is done with a panel: its number, memory, whether it is to be packed, rows.
type Work<'a> = dyn Fn(usize, &mut Buffer, bool, std::ops::Range<usize>) + Sync + 'a;

/// Calls `work` with each panel and each run of rows, in parallel. A thread packs a panel once for all the rows that it
/// goes through with it.
fn panels(team: &Team, count: usize, rows: usize, work: &Work<'_>) {
    thread_local! {
        static BUFFER: RefCell<Buffer> = const { RefCell::new(Buffer { lines: Vec::new(), holds: (0, 0) }) };
    }
    static CALLS: AtomicU64 = AtomicU64::new(1);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    if count == 0 || rows == 0 {
        return;
    }
    let most = (4 * team.threads()).div_ceil(count).clamp(1, rows.div_ceil(FEW));
    let run = rows.div_ceil(most).next_multiple_of(tile::ROWS);
    let runs = rows.div_ceil(run);
    team.each(count * runs, &|task| {
        let (panel, start) = (task / runs, task % runs * run);
        BUFFER.with_borrow_mut(|buffer| {
            let fresh = buffer.holds != (call, panel);
            buffer.holds = (call, panel);
            work(panel, buffer, fresh, start..rows.min(start + run));
        });
    });
}

/// The first `wide` rows of a matrix of `columns`, times `scale`, side by side: `[columns, COLUMNS]`.
fn pack_rows(matrix: &[f32], columns: usize, wide: usize, scale: f32, packed: &mut [f32]) {
    const BLOCK: usize = 16;
    for start in (0..columns).step_by(BLOCK) {
        let end = columns.min(start + BLOCK);
        for (j, row) in matrix.chunks_exact(columns).take(wide).enumerate() {
            for (k, value) in (start..end).zip(&row[start..end]) {
                packed[k * COLUMNS + j] = scale * value;
            }
        }
    }
}

/// `wide` columns of a matrix whose rows are `columns` long: `[rows, COLUMNS]`.
fn pack_columns(matrix: &[f32], columns: usize, wide: usize, packed: &mut [f32]) {
    for (row, packed) in matrix.chunks(columns).zip(packed.chunks_exact_mut(COLUMNS)) {
        packed[..wide].copy_from_slice(&row[..wide]);
    }
}

/// A matrix `[rows, columns]`, times `scale`, as `[columns, rows]`.
fn transposed(matrix: &[f32], rows: usize, columns: usize, scale: f32) -> Vec<f32> {
    let mut found = vec![0.0; rows * columns];
    for (r, row) in matrix.chunks_exact(columns.max(1)).enumerate() {
        row.iter().enumerate().for_each(|(c, value)| found[c * rows + r] = scale * value);
    }
    found
}
