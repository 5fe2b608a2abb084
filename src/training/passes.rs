//! One pass over all rows, in parallel: norms, gated activations, rotations, forward and back (see [`super::rows`]).

use std::ops::Range;

use super::rows;
use super::tile::Out;
use crate::error::{Error, Result};
use crate::team::Team;

/// Numbers that are worth a task of their own.
const TASK: usize = 1 << 14;

fn same(name: &str, lengths: &[usize]) -> Result<()> {
    if lengths.iter().all(|length| *length == lengths[0]) {
        return Ok(());
    }
    Err(Error::failure(format!("{name}: expected as many numbers of each, got {lengths:?}")))
}

/// Calls `work` with runs of rows of `width` numbers.
fn in_runs(team: &Team, rows: usize, width: usize, work: &(dyn Fn(Range<usize>) + Sync)) {
    let run = rows.div_ceil(team.tasks(rows * width, TASK)).max(1);
    team.each(rows.div_ceil(run), &|task| work(task * run..rows.min((task + 1) * run)));
}

/// The numbers of some rows, to be written.
///
/// # Safety
/// They are inside, and nobody else's while the slice lives.
#[allow(clippy::mut_from_ref)]
unsafe fn of<'a>(out: &'a Out<'_>, rows: &Range<usize>, width: usize) -> &'a mut [f32] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(out.at(rows.start * width), rows.len() * width) }
}

fn some<'a>(values: &'a [f32], rows: &Range<usize>, width: usize) -> &'a [f32] {
    &values[rows.start * width..rows.end * width]
}

/// y = weight ⊙ x r,  r = 1 / √(mean(x²) + ε): x and y `[rows, d]`, weight `[d]`, r `[rows]`.
///
/// # Errors
/// Sizes that don't agree.
pub fn rms_norm(team: &Team, x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32], roots: &mut [f32]) -> Result<()> {
    let width = weight.len();
    same("rms_norm", &[x.len(), y.len(), roots.len() * width])?;
    let (rows, y, roots) = (roots.len(), Out::new(y), Out::new(roots));
    in_runs(team, rows, width, &|run| {
        // SAFETY: lengths were checked, and the rows are this task's.
        let (y, roots) = unsafe { (of(&y, &run, width), of(&roots, &run, 1)) };
        rows::rms_norm(some(x, &run, width), weight, epsilon, y, roots);
    });
    Ok(())
}

/// The gradient of [`rms_norm`] in x.
///
/// # Errors
/// Sizes that don't agree.
pub fn rms_norm_back(team: &Team, dy: &[f32], x: &[f32], weight: &[f32], roots: &[f32], dx: &mut [f32]) -> Result<()> {
    let width = weight.len();
    same("rms_norm", &[x.len(), dy.len(), dx.len(), roots.len() * width])?;
    let dx = Out::new(dx);
    in_runs(team, roots.len(), width, &|run| {
        // SAFETY: lengths were checked, and the rows are this task's.
        let dx = unsafe { of(&dx, &run, width) };
        rows::rms_norm_back(some(dy, &run, width), some(x, &run, width), weight, &roots[run.clone()], dx);
    });
    Ok(())
}

/// y = silu(gate) ⊙ up, all of one length.
///
/// # Errors
/// Lengths that differ.
pub fn swiglu(team: &Team, gate: &[f32], up: &[f32], y: &mut [f32]) -> Result<()> {
    same("swiglu", &[gate.len(), up.len(), y.len()])?;
    let y = Out::new(y);
    in_runs(team, gate.len(), 1, &|run| {
        // SAFETY: lengths were checked, and the numbers are this task's.
        rows::swiglu(&gate[run.clone()], &up[run.clone()], unsafe { of(&y, &run, 1) });
    });
    Ok(())
}

/// The gradients of [`swiglu`].
///
/// # Errors
/// Lengths that differ.
pub fn swiglu_back(
    team: &Team,
    dy: &[f32],
    gate: &[f32],
    up: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) -> Result<()> {
    same("swiglu", &[dy.len(), gate.len(), up.len(), dgate.len(), dup.len()])?;
    let (dgate, dup) = (Out::new(dgate), Out::new(dup));
    in_runs(team, gate.len(), 1, &|run| {
        // SAFETY: lengths were checked, and the numbers are this task's.
        let (dgate, dup) = unsafe { (of(&dgate, &run, 1), of(&dup, &run, 1)) };
        rows::swiglu_back(&dy[run.clone()], &gate[run.clone()], &up[run.clone()], dgate, dup);
    });
    Ok(())
}

/// Turns each head by its token's angles, or back: x and y `[tokens, heads, head_dim]`, cos and sin
/// `[tokens, head_dim / 2]`.
///
/// # Errors
/// Sizes that don't agree.
pub fn rotate(
    team: &Team,
    x: &[f32],
    (tokens, heads): (usize, usize),
    cos: &[f32],
    sin: &[f32],
    back: bool,
    y: &mut [f32],
) -> Result<()> {
    let half = cos.len().checked_div(tokens).unwrap_or(0);
    same("rope", &[x.len(), y.len(), 2 * tokens * heads * half])?;
    same("rope", &[cos.len(), sin.len(), tokens * half])?;
    let (width, y) = (2 * heads * half, Out::new(y));
    in_runs(team, tokens, width, &|run| {
        // SAFETY: lengths were checked, and the rows are this task's.
        let y = unsafe { of(&y, &run, width) };
        rows::rotate(some(x, &run, width), heads, some(cos, &run, half), some(sin, &run, half), back, half, y);
    });
    Ok(())
}
