//! Products with a matrix of blocks: a few rows are dequantized into the inner cache and used at once.
//!
//! Every number of a product is a dot product over K in 16 lanes, added up as a tree, so it depends on its own two rows
//! and on K alone: not on the rows beside it, not on the threads, and not on the machine, which decides only how fast
//! it goes. Multiplications and additions are fused; activations stay in float32.
//!
//! Products of training, forward ([`matmul_in_training`]) and back ([`matmul_transposed`]), depend on the machine, too: on
//! AMX they are summed as [`tiles`] says.

pub mod halves;
mod micro;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tiles;
mod transposed;

use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

use bytemuck::{Pod, Zeroable};

pub use micro::{Path, ROWS};
pub use transposed::{matmul_transposed, matmul_transposed_by};

use super::Kind;
use super::coded::{Coded, Numbers, Table};
use crate::error::{Error, Result};
use crate::team::{Shared, Team};

/// Rows of the matrix that are dequantized together where rows of x are few: they stay in the first cache.
const FEW_ROWS: usize = 4;
/// At least so many where they are many; tasks begin at multiples of it.
const MANY_ROWS: usize = 32;
/// Values of W that are dequantized together then, and by the transposed product: they stay in the second cache.
const TILE: usize = 1 << 16;
/// From so many rows of x on there are many.
const MANY: usize = 8;
/// Multiplications that are worth a task of their own.
const TASK: usize = 1 << 17;

/// W `[rows, columns]`, row by row.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    stored: Stored<'a>,
    rows: usize,
    columns: usize,
}

/// How W is stored.
#[derive(Clone, Copy, Debug)]
enum Stored<'a> {
    Blocks(Kind, &'a [u8]),
    Coded(Coded<'a>),
}

impl<'a> Matrix<'a> {
    /// # Errors
    /// The bytes are not those of `rows` rows of whole blocks.
    pub fn new(kind: Kind, blocks: &'a [u8], rows: usize, columns: usize) -> Result<Self> {
        let whole = columns.is_multiple_of(kind.block_size());
        let bytes = (columns / kind.block_size()).checked_mul(kind.block_bytes()).and_then(|row| row.checked_mul(rows));
        if !whole || bytes != Some(blocks.len()) {
            return Err(Error::failure(format!(
                "{}: expected the blocks of {rows} rows of {columns} values, got {} bytes",
                kind.name(),
                blocks.len()
            )));
        }
        Ok(Self { stored: Stored::Blocks(kind, blocks), rows, columns })
    }

    /// # Errors
    /// Lengths that don't agree (see [`Coded::new`]).
    #[allow(clippy::too_many_arguments)]
    pub fn coded(
        table: Table<'a>,
        codes: &'a [u8],
        rows: usize,
        columns: usize,
        group: usize,
        scales: Numbers<'a>,
        offsets: Option<Numbers<'a>>,
    ) -> Result<Self> {
        let coded = Coded::new(table, codes, rows, columns, group, scales, offsets)?;
        Ok(Self { stored: Stored::Coded(coded), rows, columns })
    }

    /// Outputs of the product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs of the product.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// What is read of the rows from `first` to `end`.
    fn bytes(&self, first: usize, end: usize) -> &'a [u8] {
        let (bytes, row) = match self.stored {
            Stored::Blocks(kind, blocks) => (blocks, self.columns / kind.block_size() * kind.block_bytes()),
            Stored::Coded(coded) => (coded.codes(), coded.row_bytes()),
        };
        &bytes[(first * row).min(bytes.len())..(end * row).min(bytes.len())]
    }

    /// The rows from `first` to `end` where they are stored as float32.
    fn floats(&self, first: usize, end: usize) -> Option<&'a [f32]> {
        match self.stored {
            Stored::Blocks(Kind::F32, _) => bytemuck::try_cast_slice(self.bytes(first, end)).ok(),
            _ => None,
        }
    }

    /// Those rows where they are stored as bfloat16.
    #[cfg(target_arch = "x86_64")]
    fn halves(&self, rows: std::ops::Range<usize>) -> Option<&'a [half::bf16]> {
        match self.stored {
            Stored::Blocks(Kind::Bf16, _) => bytemuck::try_cast_slice(self.bytes(rows.start, rows.end)).ok(),
            _ => None,
        }
    }

    /// The values of rows from `first` on, as many as `out` has room for.
    fn values(&self, path: Path, first: usize, out: &mut [f32]) {
        match self.stored {
            Stored::Blocks(kind, _) => {
                path.dequantize(kind, self.bytes(first, first + out.len() / self.columns.max(1)), out);
            }
            Stored::Coded(coded) => path.decode(&coded, first, out),
        }
    }

    /// The values of one row.
    ///
    /// # Errors
    /// There is no such row, or `out` has room for more or less.
    pub fn row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        if row >= self.rows || out.len() != self.columns {
            return Err(Error::failure(format!(
                "expected one of {} rows and room for {} values, got {row} and {}",
                self.rows,
                self.columns,
                out.len()
            )));
        }
        self.values(Path::best(), row, out);
        Ok(())
    }

    /// All values `[rows, columns]`, in parallel.
    ///
    /// # Errors
    /// `out` has room for more or less.
    pub fn dequantize(&self, team: &Team, out: &mut [f32]) -> Result<()> {
        if out.len() != self.rows * self.columns {
            return Err(Error::failure(format!(
                "expected room for {} values, got {}",
                self.rows * self.columns,
                out.len()
            )));
        }
        let rows = (TASK / self.columns.max(1)).max(1);
        let parts: Vec<_> = out.chunks_mut((rows * self.columns).max(1)).map(Mutex::new).collect();
        team.each(parts.len(), &|index| {
            let mut part = parts[index].lock().unwrap_or_else(PoisonError::into_inner);
            self.values(Path::best(), index * rows, &mut part);
        });
        Ok(())
    }
}

/// y = x Wᵀ for several matrices of the same inputs: x `[count, columns]`, y `[count, Σ rows]`, side by side.
///
/// # Errors
/// Sizes that don't agree.
pub fn matmul(team: &Team, matrices: &[Matrix<'_>], x: &[f32], y: &mut [f32]) -> Result<()> {
    matmul_by(Path::best(), team, matrices, x, y)
}

/// [`matmul`] on a path of one's choice, which this machine must have.
///
/// # Errors
/// Sizes that don't agree.
pub fn matmul_by(path: Path, team: &Team, matrices: &[Matrix<'_>], x: &[f32], y: &mut [f32]) -> Result<()> {
    let width: usize = matrices.iter().map(|matrix| matrix.rows).sum();
    let columns = matrices.first().map_or(0, |matrix| matrix.columns);
    if matrices.iter().any(|matrix| matrix.columns != columns) {
        return Err(Error::failure(format!("matmul: expected matrices of {columns} columns each, got others")));
    }
    let count = rows_of("matmul", [x.len(), y.len()], [columns, width])?;
    if columns == 0 {
        y.fill(0.0);
    }
    if y.is_empty() || columns == 0 {
        return Ok(());
    }
    let (least, tile) = match count >= MANY {
        true => (MANY_ROWS, (TILE / columns / 4 * 4).max(MANY_ROWS)),
        false => (FEW_ROWS, FEW_ROWS),
    };
    let rows = width.div_ceil(team.tasks(count * width * columns, TASK)).next_multiple_of(least);
    let out = Shared::new(y);
    let task = |first: usize| {
        let mut begin = 0;
        for matrix in matrices {
            let part = first.max(begin)..(first + rows).min(begin + matrix.rows);
            for start in part.clone().step_by(tile) {
                let tile = start - begin..part.end.min(start + tile) - begin;
                product(path, matrix, tile, x, count, &out, start, width);
            }
            begin += matrix.rows;
        }
    };
    team.each(width.div_ceil(rows), &|index| task(index * rows));
    Ok(())
}

/// [`matmul`] of a matrix in training: not the same to the bit where AMX is faster (see [`tiles`]).
///
/// # Errors
/// Sizes that don't agree.
pub fn matmul_in_training(team: &Team, matrix: Matrix<'_>, x: &[f32], y: &mut [f32]) -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    if tiles::usable() && !x.is_empty() && !y.is_empty() {
        rows_of("matmul", [x.len(), y.len()], [matrix.columns, matrix.rows])?;
        // SAFETY: the machine has what it takes, and lengths were checked.
        unsafe { tiles::matmul(team, &matrix, x, y) };
        return Ok(());
    }
    matmul(team, &[matrix], x, y)
}

/// How many rows of so many columns two slices of such lengths have.
///
/// # Errors
/// They have others, or not the same number.
fn rows_of(what: &str, lengths: [usize; 2], columns: [usize; 2]) -> Result<usize> {
    let count = lengths[0].checked_div(columns[0]).unwrap_or(lengths[1] / columns[1].max(1));
    if lengths != columns.map(|columns| count * columns) {
        return Err(Error::failure(format!(
            "{what}: expected rows of {} in and {} out, got {} and {} numbers",
            columns[0], columns[1], lengths[0], lengths[1]
        )));
    }
    Ok(count)
}

/// A line of the cache: vectors that cross no two of them load at full speed.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line([f32; 16]);

/// Some rows of a matrix with all rows of x: columns `at..` of y.
#[allow(clippy::too_many_arguments)]
fn product(
    path: Path,
    matrix: &Matrix<'_>,
    tile: std::ops::Range<usize>,
    x: &[f32],
    count: usize,
    y: &Shared<'_, f32>,
    at: usize,
    width: usize,
) {
    thread_local! {
        static BUFFER: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    let (columns, rows) = (matrix.columns, tile.len());
    let each = |w: &[f32]| {
        // some rows of x and four of W at a time are in the innermost cache
        for t in (0..count).step_by(ROWS) {
            let here = ROWS.min(count - t);
            path.products(&x[t * columns..(t + here) * columns], w, columns, |r, found| {
                for (i, found) in found.iter().take(here).enumerate() {
                    let place = (t + i) * width + at + r;
                    // SAFETY: columns `at` to `at + rows` of y belong to this task alone.
                    unsafe {
                        match found.get(..rows - r) {
                            Some(part) => y.write(place, part),
                            None => y.write(place, found), // of a length that is known: no loop
                        }
                    }
                }
            });
        }
    };
    if rows == 0 {
        return;
    }
    match matrix.floats(tile.start, tile.end) {
        Some(values) => each(values),
        None => BUFFER.with_borrow_mut(|buffer| {
            buffer.resize((rows * columns).div_ceil(16), Line::zeroed());
            let values = &mut bytemuck::cast_slice_mut(buffer)[..rows * columns];
            path.prefetch(matrix.bytes(tile.end, matrix.rows), matrix.bytes(tile.start, tile.end).len());
            matrix.values(path, tile.start, values);
            each(values);
        }),
    }
}

#[cfg(test)]
pub(crate) mod tests;
