//! The product with the transposed matrix: the gradient of [`super::matmul`] in its inputs.
//!
//! ```text
//! dx[t] = Σ_o dy[t, o] W[o]     fused, in the order of o
//! ```
//! A few rows of W at a time are dequantized by all threads together and then used by all of them, each for rows of its
//! own. A number of dx depends on its row of dy and its column of W alone. On AMX it goes another way: see [`tiles`].

use std::cell::RefCell;

use bytemuck::Zeroable;

#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{Line, Matrix, Path, ROWS, TILE, rows_of};
use crate::error::Result;
use crate::team::{Shared, Team};

/// Multiplications, or values to dequantize, that are worth a task of their own.
const TASK: usize = 1 << 17;

/// dx = dy W: dy `[count, rows]`, dx `[count, columns]`.
///
/// # Errors
/// Sizes that don't agree.
pub fn matmul_transposed(team: &Team, matrix: Matrix<'_>, dy: &[f32], dx: &mut [f32]) -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    if tiles::usable() && !dy.is_empty() && !dx.is_empty() {
        rows_of("matmul_transposed", [dy.len(), dx.len()], [matrix.rows, matrix.columns])?;
        // SAFETY: the machine has what it takes, and lengths were checked.
        unsafe { tiles::matmul_transposed(team, &matrix, dy, dx) };
        return Ok(());
    }
    matmul_transposed_by(Path::best(), team, matrix, dy, dx)
}

/// [`matmul_transposed`] on a path of one's choice, which this machine must have.
///
/// # Errors
/// Sizes that don't agree.
pub fn matmul_transposed_by(path: Path, team: &Team, matrix: Matrix<'_>, dy: &[f32], dx: &mut [f32]) -> Result<()> {
    thread_local! {
        static BUFFER: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    let (rows, columns) = (matrix.rows, matrix.columns);
    let count = rows_of("matmul_transposed", [dy.len(), dx.len()], [rows, columns])?;
    dx.fill(0.0);
    if dy.is_empty() || dx.is_empty() {
        return Ok(());
    }
    let tile = (TILE / columns).clamp(1, rows);
    let dx = Shared::new(dx);
    let run = count.div_ceil(ROWS).div_ceil(team.tasks(count * tile * columns, TASK)) * ROWS;
    let multiply = |first: usize, values: &[f32]| {
        let w: Vec<&[f32]> = values.chunks_exact(columns).collect();
        team.each(count.div_ceil(run), &|task| {
            let end = count.min((task + 1) * run);
            for t in (task * run..end).step_by(ROWS) {
                // SAFETY: these rows of dx are this task's alone.
                let sums = unsafe { dx.part(t * columns..end.min(t + ROWS) * columns) };
                path.weighted(&dy[t * rows + first..], rows, &w, w.len(), columns, sums);
            }
        });
    };
    if let Some(values) = matrix.floats(0, rows) {
        values.chunks(tile * columns).enumerate().for_each(|(index, values)| multiply(index * tile, values));
        return Ok(());
    }
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize((tile * columns).div_ceil(16), Line::zeroed());
        let all: &mut [f32] = bytemuck::cast_slice_mut(buffer);
        for first in (0..rows).step_by(tile) {
            let here = tile.min(rows - first);
            let share = here.div_ceil(team.tasks(here * columns, TASK / 8));
            let values = Shared::new(&mut all[..here * columns]);
            team.each(here.div_ceil(share), &|task| {
                let part = task * share..here.min((task + 1) * share);
                // SAFETY: these rows of the tile are this task's alone.
                let out = unsafe { values.part(part.start * columns..part.end * columns) };
                matrix.values(path, first + part.start, out);
            });
            multiply(first, &all[..here * columns]);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::noise;
    use super::*;
    use crate::quant::Kind;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_path_and_company_gives_the_sums_in_order(
            kind in prop::sample::select(Kind::ALL),
            rows in 0usize..300,
            blocks in 1usize..3,
            count in 0usize..20,
            seed: u64,
        ) {
            let columns = blocks * kind.block_size().max(96);
            let mut bytes = vec![0; rows * columns / kind.block_size() * kind.block_bytes()];
            crate::quant::quantize(kind, &noise(rows * columns, seed), None, &mut bytes).unwrap();
            let mut values = vec![0.0; rows * columns];
            crate::quant::dequantize(kind, &bytes, &mut values).unwrap();
            let dy = noise(count * rows, seed + 1);
            let mut expected = vec![0.0f32; count * columns];
            for t in 0..count {
                for o in 0..rows {
                    for k in 0..columns {
                        let sum = &mut expected[t * columns + k];
                        *sum = dy[t * rows + o].mul_add(values[o * columns + k], *sum);
                    }
                }
            }
            let matrix = Matrix::new(kind, &bytes, rows, columns).unwrap();
            for path in Path::all() {
                let mut found = vec![f32::NAN; count * columns];
                Team::run(|team| matmul_transposed_by(path, team, matrix, &dy, &mut found)).unwrap();
                prop_assert_eq!(&found, &expected, "{:?}", path);
                if count > 0 {
                    let mut alone = vec![f32::NAN; columns];
                    let last = &dy[(count - 1) * rows..];
                    Team::run(|team| matmul_transposed_by(path, team, matrix, last, &mut alone)).unwrap();
                    prop_assert_eq!(&alone, &expected[(count - 1) * columns..]);
                }
            }
        }
    }

    #[test]
    fn sizes_that_do_not_agree_are_errors() {
        let values = [0.0f32; 64 * 3];
        let matrix = Matrix::new(Kind::F32, bytemuck::cast_slice(&values), 3, 64).unwrap();
        let run = |dy: usize, dx: usize| {
            Team::run(|team| matmul_transposed(team, matrix, &vec![0.0; dy], &mut vec![0.0; dx])).is_ok()
        };
        assert!(run(6, 128) && run(0, 0));
        assert!(!run(5, 128) && !run(6, 127) && !run(6, 64));
    }
}
