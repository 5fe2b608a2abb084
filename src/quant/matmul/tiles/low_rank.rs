//! Linear layers with low-rank matrices beside them, in bfloat16: what a low rank adds is a few more columns of the same
//! product.
//!
//! ```text
//! y_i = [x | l_i] [W_i | s_i B_i]ᵀ      l_i = bf16(x A_iᵀ)
//! dx  = Σ_i [dy_i | d_i] [W_i ; A_i]    d_i = bf16(s_i dy_i B_i)    dA_i = d_iᵀ x    dB_i = s_i dy_iᵀ l_i
//! ```
//! A task has rows of x as tiles, multiplies them with A, and puts what comes out behind them. Sums are float32's, over
//! columns and over rows from the first to the last; y, dx, l and d are rounded once.

use std::ops::Range;

use bytemuck::Zeroable;
use half::bf16;

use super::super::halves::{Back, Forward, LowRank};
use super::halves::{GROUP, ROOM, Sum, TASK, Tiles, X, paired, paired_rows, turned, turned_rows, with_room};
use super::{BOTH, DEPTH, Line, PAIR, SIDE, Square, lines, x86};
use crate::team::{Shared, Team};

/// Chunks of 32 rows that gradients of A and B add up at a time.
const RUN: usize = 128;

/// Writes y_i and l_i of x `[count, inputs]`, not empty.
///
/// # Safety
/// The machine is [`super::halves::usable`], and lengths agree.
pub(in super::super) unsafe fn forward(
    team: &Team,
    x: &[bf16],
    inputs: usize,
    parts: &[LowRank<'_>],
    out: &mut [Forward<'_>],
) {
    for (part, out) in parts.iter().zip(out) {
        // SAFETY: the caller's promise.
        unsafe { forward_one(team, x, inputs, part, out) };
    }
}

unsafe fn forward_one(team: &Team, x: &[bf16], inputs: usize, part: &LowRank<'_>, out: &mut Forward<'_>) {
    let (outputs, rank, count) = (part.matrix.rows, part.a.len() / inputs, x.len() / inputs);
    let (chunks, more) = (inputs.div_ceil(DEPTH), rank.div_ceil(DEPTH));
    let (size, a_size) = ((chunks + more) * SIDE, chunks * SIDE);
    let band = (ROOM / (PAIR * size)).max(1) * BOTH;
    let scaled: Vec<f32> = part.b.iter().map(|b| part.scale * b).collect();
    let (y, low) = (Shared::new(out.y), Shared::new(out.low));
    with_room(|buffer| {
        for start in (0..outputs).step_by(band) {
            let width = band.min(outputs - start);
            let pairs = width.div_ceil(BOTH);
            let (w_tiles, a_tiles) =
                lines(buffer, pairs * PAIR * size + more * PAIR * a_size).split_at_mut(pairs * PAIR * size);
            let (w_shared, a_shared) = (Shared::new(w_tiles), Shared::new(a_tiles));
            team.each(pairs + more, &|pair| {
                if let Some(pair) = pair.checked_sub(pairs) {
                    // SAFETY: these tiles are this task's alone.
                    let tiles = unsafe { a_shared.part(pair * PAIR * a_size..(pair + 1) * PAIR * a_size) };
                    let rows = pair * BOTH..rank.min((pair + 1) * BOTH);
                    turned(&part.a[rows.start * inputs..rows.end * inputs], inputs, tiles, a_size);
                    return;
                }
                // SAFETY: as above.
                let tiles = unsafe { w_shared.part(pair * PAIR * size..(pair + 1) * PAIR * size) };
                let rows = start + pair * BOTH..outputs.min(start + (pair + 1) * BOTH);
                turned_rows(&part.matrix, rows.clone(), tiles, size);
                turned(&scaled[rows.start * rank..rows.end * rank], rank, &mut tiles[a_size..], size);
            });
            let (w_tiles, a_tiles) = (&*w_tiles, &*a_tiles);
            in_groups(team, count, (chunks + more) * (width + rank), chunks + more, &|rows, tiles| {
                // SAFETY: the caller's promise; these rows of y and low are this task's alone.
                unsafe {
                    copied(&x[rows.start * inputs..rows.end * inputs], inputs, tiles, size);
                    x86::configure();
                    if start == 0 {
                        let given = Tiles { x: tiles, x_size: size, w: a_tiles, w_size: a_size, chunks };
                        given.multiply(rows.len(), rank, |row, column, count, wide, found| {
                            let out = low.at((rows.start + row) * rank + column);
                            bf16::put(found, count, wide, out, rank, false);
                        });
                    }
                    copied(low.part(rows.start * rank..rows.end * rank), rank, &mut tiles[a_size..], size);
                    let given = Tiles { x: tiles, x_size: size, w: w_tiles, w_size: size, chunks: chunks + more };
                    given.multiply(rows.len(), width, |row, column, count, wide, found| {
                        let out = y.at((rows.start + row) * outputs + start + column);
                        bf16::put(found, count, wide, out, outputs, false);
                    });
                    x86::release();
                }
            });
        }
    });
}

/// Writes dx `[count, inputs]` and gradients of A and B where they are wanted.
///
/// # Safety
/// As of [`forward`].
pub(in super::super) unsafe fn backward(
    team: &Team,
    x: &[bf16],
    inputs: usize,
    parts: &[LowRank<'_>],
    back: &mut [Back<'_>],
    dx: Option<&mut [bf16]>,
) {
    let count = x.len() / inputs;
    let ranks: Vec<usize> = parts.iter().map(|part| part.a.len() / inputs).collect();
    let mut dlows: Vec<Vec<bf16>> = ranks.iter().map(|rank| vec![bf16::ZERO; count * rank]).collect();
    // SAFETY: the caller's promise.
    unsafe { inputs_gradient(team, inputs, parts, &ranks, back, &mut dlows, dx) };
    for (((part, back), rank), dlow) in parts.iter().zip(back).zip(ranks).zip(dlows) {
        let outputs = part.matrix.rows;
        // SAFETY: as above.
        unsafe {
            if let Some(da) = &mut back.da {
                over_rows(team, (&dlow, rank), (x, inputs), 1.0, (inputs, 1), da);
            }
            if let Some(db) = &mut back.db {
                over_rows(team, (back.low, rank), (back.dy, outputs), part.scale, (1, rank), db);
            }
        }
    }
}

/// Writes dx where it is wanted, and d_i.
///
/// # Safety
/// As of [`forward`].
unsafe fn inputs_gradient(
    team: &Team,
    inputs: usize,
    parts: &[LowRank<'_>],
    ranks: &[usize],
    back: &[Back<'_>],
    dlows: &mut [Vec<bf16>],
    dx: Option<&mut [bf16]>,
) {
    let count = dlows[0].len() / ranks[0];
    // of each part: the chunks of its outputs, and those of its low rank behind them
    let sizes = parts.iter().zip(ranks).map(|(part, rank)| [part.matrix.rows.div_ceil(DEPTH), rank.div_ceil(DEPTH)]);
    let sizes: Vec<[usize; 2]> = sizes.collect();
    let starts: Vec<usize> = sizes
        .iter()
        .scan(0, |end, [outputs, more]| {
            *end += outputs + more;
            Some(*end - outputs - more)
        })
        .collect();
    let chunks: usize = sizes.iter().flatten().sum();
    let panels = inputs.div_ceil(BOTH) * PAIR;
    let b_lines: Vec<usize> = sizes.iter().map(|[outputs, more]| more * PAIR * outputs * SIDE).collect();
    let scaled: Vec<Vec<f32>> = parts.iter().map(|part| part.b.iter().map(|b| part.scale * b).collect()).collect();
    let dlows: Vec<Shared<'_, bf16>> = dlows.iter_mut().map(|dlow| Shared::new(dlow)).collect();
    let (wanted, dx) = (dx.is_some(), Shared::new(dx.unwrap_or_default()));
    with_room(|buffer| {
        let w_lines = if wanted { panels * chunks * SIDE } else { 0 };
        let (w_tiles, mut rest) = lines(buffer, w_lines + b_lines.iter().sum::<usize>()).split_at_mut(w_lines);
        let mut b_tiles: Vec<&mut [Line]> =
            b_lines.iter().map(|&lines| rest.split_off_mut(..lines).unwrap_or_default()).collect();
        let w = Shared::new(w_tiles);
        let b: Vec<Shared<'_, Line>> = b_tiles.iter_mut().map(|tiles| Shared::new(tiles)).collect();
        // a chunk of 32 rows of one of the matrices
        let all: Vec<(usize, usize)> = sizes
            .iter()
            .enumerate()
            .flat_map(|(i, [outputs, more])| (0..outputs + more).map(move |at| (i, at)))
            .collect();
        team.each(all.len(), &|task| {
            let (i, at) = all[task];
            let ([outputs, _], part, rank) = (sizes[i], &parts[i], ranks[i]);
            let place = (starts[i] + at, chunks);
            let rows = |first: usize, most: usize| first * DEPTH..most.min((first + 1) * DEPTH);
            if at < outputs {
                let rows = rows(at, part.matrix.rows);
                paired(&scaled[i][rows.start * rank..rows.end * rank], rank, &b[i], (at, outputs));
                if wanted {
                    paired_rows(&part.matrix, rows, &w, place);
                }
            } else if wanted {
                let rows = rows(at - outputs, rank);
                paired(&part.a[rows.start * inputs..rows.end * inputs], inputs, &w, place);
            }
        });
        let (size, w_tiles) = (chunks * SIDE, &*w_tiles);
        in_groups(team, count, chunks * (if wanted { inputs } else { 0 } + ranks[0]), chunks, &|rows, tiles| {
            // SAFETY: the caller's promise; these rows are this task's alone.
            unsafe {
                x86::configure();
                for (i, [outputs, _]) in sizes.iter().enumerate() {
                    let (width, rank) = (parts[i].matrix.rows, ranks[i]);
                    let (first, behind) = (starts[i] * SIDE, (starts[i] + outputs) * SIDE);
                    copied(&back[i].dy[rows.start * width..rows.end * width], width, &mut tiles[first..], size);
                    let (x, w_size) = (&tiles[first..], outputs * SIDE);
                    let given = Tiles { x, x_size: size, w: &*b_tiles[i], w_size, chunks: *outputs };
                    given.multiply(rows.len(), rank, |row, column, count, wide, found| {
                        let out = dlows[i].at((rows.start + row) * rank + column);
                        bf16::put(found, count, wide, out, rank, false);
                    });
                    copied(dlows[i].part(rows.start * rank..rows.end * rank), rank, &mut tiles[behind..], size);
                }
                if wanted {
                    let given = Tiles { x: tiles, x_size: size, w: w_tiles, w_size: size, chunks };
                    given.multiply(rows.len(), inputs, |row, column, count, wide, found| {
                        let out = dx.at((rows.start + row) * inputs + column);
                        bf16::put(found, count, wide, out, inputs, false);
                    });
                }
                x86::release();
            }
        });
    });
}

/// Calls `work` with groups of rows, in parallel, and with room for their tiles of so many chunks; a row is `cost` times
/// 32 multiplications.
fn in_groups(team: &Team, count: usize, cost: usize, chunks: usize, work: &(dyn Fn(Range<usize>, &mut [Line]) + Sync)) {
    let stripe = PAIR * chunks * SIDE;
    let tasks = team.tasks(count * cost * DEPTH, TASK);
    let run = count.div_ceil(BOTH).div_ceil(tasks).min((GROUP / stripe).max(1));
    team.each(count.div_ceil(run * BOTH), &|task| {
        X.with_borrow_mut(|buffer| {
            work(task * run * BOTH..count.min((task + 1) * run * BOTH), lines(buffer, run * stripe));
        });
    });
}

/// Rows of so many numbers as tiles, 16 rows' `size` lines behind the last 16's.
///
/// # Safety
/// The machine is [`super::halves::usable`]; the tiles have room.
unsafe fn copied(rows: &[bf16], width: usize, tiles: &mut [Line], size: usize) {
    let chunks = width.div_ceil(DEPTH) * SIDE;
    for (rows, tiles) in rows.chunks(SIDE * width).zip(tiles.chunks_mut(size)) {
        // SAFETY: the caller's promise.
        unsafe { x86::copied(rows, width, width, &mut tiles[..chunks]) };
    }
}

/// scale leftᵀ right, left `[count, rank]` and right `[count, width]`, a rank's numbers `rank_stride` apart, a column's `stride`.
///
/// # Safety
/// As of [`forward`].
unsafe fn over_rows(
    team: &Team,
    (left, rank): (&[bf16], usize),
    (right, width): (&[bf16], usize),
    scale: f32,
    (rank_stride, stride): (usize, usize),
    out: &mut [f32],
) {
    let chunks = (left.len() / rank).div_ceil(DEPTH);
    let blocks = rank.div_ceil(BOTH) * PAIR;
    // a row of a tile is a rank's, of 32 rows
    let mut tiles = vec![Line::zeroed(); blocks * chunks * SIDE];
    let numbers: &mut [bf16] = bytemuck::cast_slice_mut(&mut tiles);
    for (t, row) in left.chunks_exact(rank).enumerate() {
        for (r, value) in row.iter().enumerate() {
            numbers[((r / SIDE * chunks + t / DEPTH) * SIDE + r % SIDE) * DEPTH + t % DEPTH] = *value;
        }
    }
    let out = Shared::new(out);
    team.each(width.div_ceil(BOTH), &|task| {
        let (first, wide) = (task * BOTH, BOTH.min(width - task * BOTH));
        let mut sums: Vec<Square> = (0..blocks / PAIR).map(|_| Square([[0.0; BOTH]; BOTH])).collect();
        X.with_borrow_mut(|buffer| {
            for start in (0..chunks).step_by(RUN) {
                let here = RUN.min(chunks - start);
                let w = lines(buffer, PAIR * here * SIDE);
                for (i, rows) in right[start * DEPTH * width..].chunks(DEPTH * width).take(here).enumerate() {
                    for half in 0..PAIR {
                        let (at, to) = (first + half * SIDE, (half * here + i) * SIDE);
                        if at < width {
                            // SAFETY: the caller's promise.
                            unsafe { x86::paired_halves(rows, width, width, at, &mut w[to..to + SIDE]) };
                        }
                    }
                }
                // SAFETY: as above; the squares have room.
                unsafe {
                    x86::configure();
                    for (pair, sums) in sums.iter_mut().enumerate() {
                        let x = &tiles[(pair * PAIR * chunks + start) * SIDE..];
                        let (x_size, w_size) = (chunks * SIDE, here * SIDE);
                        let both = x86::Both { x, x_size, w, w_size, chunks: here, terms: 1, needed: 1 };
                        both.multiply(sums.0.as_mut_ptr().cast(), BOTH, start > 0);
                    }
                    x86::release();
                }
            }
        });
        for (r, row) in sums.iter().flat_map(|square| &square.0).enumerate().take(rank) {
            for (c, sum) in row[..wide].iter().enumerate() {
                // SAFETY: these columns are this task's alone.
                unsafe { out.write((first + c) * stride + r * rank_stride, &[scale * sum]) };
            }
        }
    });
}
