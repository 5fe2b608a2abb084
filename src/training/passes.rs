//! One pass over all rows, in parallel: norms, gated activations, rotations, forward and back, and the loss of scores
//! with its gradient (see [`super::rows`]).

use std::ops::Range;

use super::number::Number;
use super::rows;
use super::tile::Out;
use crate::error::{Error, Result};
use crate::team::Team;

/// Numbers that are worth a task of their own.
const TASK: usize = 1 << 14;
/// Numbers that are gone through together: as float32 they stay in the first cache.
const STRIP: usize = 1 << 11;

fn same(name: &str, lengths: &[usize]) -> Result<()> {
    if lengths.iter().all(|length| *length == lengths[0]) {
        return Ok(());
    }
    Err(Error::failure(format!("{name}: expected as many numbers of each, got {lengths:?}")))
}

/// Calls `work` with strips of rows of `width` numbers, and memory for `tensors` strips of them.
fn in_strips<T: Number>(
    team: &Team,
    rows: usize,
    width: usize,
    tensors: usize,
    work: &(dyn Fn(Range<usize>, &mut [f32]) + Sync),
) {
    let run = rows.div_ceil(team.tasks(rows * width, TASK)).max(1);
    let strip = STRIP.checked_div(width).unwrap_or(1).clamp(1, run);
    team.each(rows.div_ceil(run), &|task| {
        let end = rows.min((task + 1) * run);
        let mut room = T::room(tensors * strip * width);
        for start in (task * run..end).step_by(strip) {
            work(start..end.min(start + strip), &mut room);
        }
    });
}

/// The numbers of some rows, to be written.
///
/// # Safety
/// They are inside, and nobody else's while the slice lives.
#[allow(clippy::mut_from_ref)]
unsafe fn of<'a, T>(out: &'a Out<'_, T>, rows: &Range<usize>, width: usize) -> &'a mut [T] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(out.at(rows.start * width), rows.len() * width) }
}

fn some<'a, T>(values: &'a [T], rows: &Range<usize>, width: usize) -> &'a [T] {
    &values[rows.start * width..rows.end * width]
}

/// Memory in parts of `count` numbers; of none where there is none.
fn parts<const N: usize>(room: &mut [f32], count: usize) -> [&mut [f32]; N] {
    let mut rest = room;
    std::array::from_fn(|_| {
        let length = count.min(rest.len());
        rest.split_off_mut(..length).unwrap_or_default()
    })
}

/// y = weight ⊙ x r,  r = 1 / √(mean(x²) + ε): x and y `[rows, d]`, weight `[d]`, r `[rows]`. x r is rounded, too: as
/// published weights expect.
///
/// # Errors
/// Sizes that don't agree.
pub fn rms_norm<T: Number>(
    team: &Team,
    x: &[T],
    weight: &[T],
    epsilon: f32,
    y: &mut [T],
    roots: &mut [f32],
) -> Result<()> {
    let width = weight.len();
    same("rms_norm", &[x.len(), y.len(), roots.len() * width])?;
    let mut room = T::room(width);
    let weight = T::read(weight, &mut room);
    let (rows, y, roots) = (roots.len(), Out::new(y), Out::new(roots));
    in_strips::<T>(team, rows, width, 2, &|rows, room| {
        // SAFETY: lengths were checked, and the rows are this task's.
        let (y, roots) = unsafe { (of(&y, &rows, width), of(&roots, &rows, 1)) };
        let [x_room, y_room] = parts(room, y.len());
        let x = T::read(some(x, &rows, width), x_room);
        T::write(y, y_room, |y| {
            rows::normalize(x, width, epsilon, y, roots);
            T::round(y);
            rows::weigh_rows(weight, y);
        });
    });
    Ok(())
}

/// The gradient of [`rms_norm`] in x.
///
/// # Errors
/// Sizes that don't agree.
pub fn rms_norm_back<T: Number>(
    team: &Team,
    dy: &[T],
    x: &[T],
    weight: &[T],
    roots: &[f32],
    dx: &mut [T],
) -> Result<()> {
    let width = weight.len();
    same("rms_norm", &[x.len(), dy.len(), dx.len(), roots.len() * width])?;
    let mut room = T::room(width);
    let weight = T::read(weight, &mut room);
    let dx = Out::new(dx);
    in_strips::<T>(team, roots.len(), width, 3, &|rows, room| {
        // SAFETY: lengths were checked, and the rows are this task's.
        let dx = unsafe { of(&dx, &rows, width) };
        let [dy_room, x_room, dx_room] = parts(room, dx.len());
        let (dy, x) = (T::read(some(dy, &rows, width), dy_room), T::read(some(x, &rows, width), x_room));
        T::write(dx, dx_room, |dx| rows::rms_norm_back(dy, x, weight, &roots[rows.clone()], dx));
    });
    Ok(())
}

/// y = silu(gate) ⊙ up, all of one length.
///
/// # Errors
/// Lengths that differ.
pub fn swiglu<T: Number>(team: &Team, gate: &[T], up: &[T], y: &mut [T]) -> Result<()> {
    same("swiglu", &[gate.len(), up.len(), y.len()])?;
    let y = Out::new(y);
    in_strips::<T>(team, gate.len(), 1, 3, &|run, room| {
        // SAFETY: lengths were checked, and the numbers are this task's.
        let y = unsafe { of(&y, &run, 1) };
        let [gate_room, up_room, y_room] = parts(room, y.len());
        let (gate, up) = (T::read(&gate[run.clone()], gate_room), T::read(&up[run], up_room));
        T::write(y, y_room, |y| rows::swiglu(gate, up, y));
    });
    Ok(())
}

/// The gradients of [`swiglu`].
///
/// # Errors
/// Lengths that differ.
pub fn swiglu_back<T: Number>(
    team: &Team,
    dy: &[T],
    gate: &[T],
    up: &[T],
    dgate: &mut [T],
    dup: &mut [T],
) -> Result<()> {
    same("swiglu", &[dy.len(), gate.len(), up.len(), dgate.len(), dup.len()])?;
    let (dgate, dup) = (Out::new(dgate), Out::new(dup));
    in_strips::<T>(team, gate.len(), 1, 5, &|run, room| {
        // SAFETY: lengths were checked, and the numbers are this task's.
        let (dgate, dup) = unsafe { (of(&dgate, &run, 1), of(&dup, &run, 1)) };
        let [dy_room, gate_room, up_room, dgate_room, dup_room] = parts(room, run.len());
        let (dy, gate) = (T::read(&dy[run.clone()], dy_room), T::read(&gate[run.clone()], gate_room));
        let up = T::read(&up[run], up_room);
        T::write(dgate, dgate_room, |dgate| T::write(dup, dup_room, |dup| rows::swiglu_back(dy, gate, up, dgate, dup)));
    });
    Ok(())
}

/// Turns each head by its token's angles, or back: x and y `[tokens, heads, head_dim]`, cos and sin
/// `[tokens, head_dim / 2]`.
///
/// # Errors
/// Sizes that don't agree.
pub fn rotate<T: Number>(
    team: &Team,
    x: &[T],
    (tokens, heads): (usize, usize),
    cos: &[T],
    sin: &[T],
    back: bool,
    y: &mut [T],
) -> Result<()> {
    let half = cos.len().checked_div(tokens).unwrap_or(0);
    same("rope", &[x.len(), y.len(), 2 * tokens * heads * half])?;
    same("rope", &[cos.len(), sin.len(), tokens * half])?;
    let (width, y) = (2 * heads * half, Out::new(y));
    in_strips::<T>(team, tokens, width, 4, &|run, room| {
        // SAFETY: lengths were checked, and the rows are this task's.
        let y = unsafe { of(&y, &run, width) };
        let [x_room, y_room, cos_room, sin_room] = parts(room, y.len());
        let x = T::read(some(x, &run, width), x_room);
        let (cos, sin) = (T::read(some(cos, &run, half), cos_room), T::read(some(sin, &run, half), sin_room));
        T::write(y, y_room, |y| rows::rotate(x, heads, cos, sin, back, half, y));
    });
    Ok(())
}

/// loss = log Σ exp(z) − z[target] of each row of scores z `[rows, V]`, and softmax(z) − [v = target] where it is wanted.
///
/// # Errors
/// Sizes that don't agree, or a target that isn't one of the V.
pub fn cross_entropy<T: Number>(
    team: &Team,
    scores: &[T],
    targets: &[i64],
    losses: &mut [f32],
    slopes: Option<&mut [T]>,
) -> Result<()> {
    let (rows, width) = (targets.len(), scores.len().checked_div(targets.len()).unwrap_or(0));
    same("cross_entropy", &[scores.len(), rows * width, slopes.as_ref().map_or(scores.len(), |slopes| slopes.len())])?;
    same("cross_entropy", &[rows, losses.len()])?;
    if let Some(target) = targets.iter().find(|target| !(0..width as i64).contains(target)) {
        return Err(Error::failure(format!("cross_entropy: expected targets below {width}, got {target}")));
    }
    let (losses, slopes) = (Out::new(losses), slopes.map(Out::new));
    in_strips::<T>(team, rows, width, 2, &|run, room| {
        let [scores_room, slopes_room] = parts(room, run.len() * width);
        let all = T::read(some(scores, &run, width), scores_room);
        // SAFETY: lengths were checked, and the rows are this task's.
        let losses = unsafe { of(&losses, &run, 1) };
        let each = || run.clone().zip(all.chunks_exact(width)).map(|(row, scores)| (scores, targets[row] as usize));
        let mut totals = vec![(0.0, 0.0); run.len()];
        for (((scores, target), total), loss) in each().zip(&mut totals).zip(losses) {
            rows::log_total(scores, total);
            *loss = (total.0 - scores[target]) + total.1;
        }
        let Some(slopes) = &slopes else { return };
        // SAFETY: as above.
        T::write(unsafe { of(slopes, &run, width) }, slopes_room, |slopes| {
            for (((scores, target), total), slopes) in each().zip(&totals).zip(slopes.chunks_exact_mut(width)) {
                rows::softmax(scores, *total, slopes);
                slopes[target] -= 1.0;
            }
        });
    });
    Ok(())
}
