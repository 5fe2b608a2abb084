//! How much each value of a block counts: the squared error that a search minimises is Σ w (x − x̂)².
//!
//! Weights are one for each column of a matrix, the same in every row. Without any, all count alike, and the products
//! with the constant 1 leave the compiled code.

use crate::error::{Error, Result};

/// The weights of a block's values.
pub(super) trait Weights: Copy {
    /// Whether they may differ: an optimum may then lie far from where the outermost values put it.
    fn differ(self) -> bool;

    /// They, eight at a time.
    fn eights(self) -> impl Iterator<Item = [f32; 8]>;

    /// Those of the `size` values from `start` on.
    fn part(self, start: usize, size: usize) -> Self;

    /// The sum of the first `size`.
    fn total(self, size: usize) -> f32;
}

/// Every value counts 1.
#[derive(Clone, Copy)]
pub(super) struct Even;

impl Weights for Even {
    #[inline(always)]
    fn differ(self) -> bool {
        false
    }

    #[inline(always)]
    fn eights(self) -> impl Iterator<Item = [f32; 8]> {
        std::iter::repeat([1.0; 8])
    }

    #[inline(always)]
    fn part(self, _: usize, _: usize) -> Self {
        self
    }

    #[inline(always)]
    fn total(self, size: usize) -> f32 {
        size as f32
    }
}

impl Weights for &[f32] {
    fn differ(self) -> bool {
        self.windows(2).any(|pair| pair[0] != pair[1])
    }

    #[inline(always)]
    fn eights(self) -> impl Iterator<Item = [f32; 8]> {
        self.as_chunks().0.iter().copied()
    }

    #[inline(always)]
    fn part(self, start: usize, size: usize) -> Self {
        self.get(start..start + size).unwrap_or(&[]) // not reached: parts are within a block
    }

    #[inline(always)]
    fn total(self, size: usize) -> f32 {
        self.iter().take(size).sum()
    }
}

/// How much the columns of a matrix matter, on average 1.
#[derive(Clone, Debug)]
pub struct Importance {
    columns: Vec<f32>,
}

impl Importance {
    /// The least weight, as a share of the average: what never mattered so far is stored with what is left over.
    const FLOOR: f64 = 1e-6;

    /// From numbers of any scale, such as the mean squares of a layer's inputs; all alike when all are zero.
    ///
    /// # Errors
    /// There is none, or one is negative or not finite.
    pub fn of_columns(columns: &[f32]) -> Result<Self> {
        if let Some(index) = columns.iter().position(|value| !value.is_finite() || *value < 0.0) {
            return Err(Error::input(format!(
                "importance: expected finite numbers of at least 0, got {} at index {index}",
                columns[index]
            )));
        }
        if columns.is_empty() {
            return Err(Error::input("importance: expected one number a column, got none"));
        }
        let mean = columns.iter().copied().map(f64::from).sum::<f64>() / columns.len() as f64;
        let share = |&value: &f32| if mean > 0.0 { (f64::from(value) / mean).max(Self::FLOOR) as f32 } else { 1.0 };
        Ok(Self { columns: columns.iter().map(share).collect() })
    }

    /// Columns of the matrix.
    pub fn columns(&self) -> usize {
        self.columns.len()
    }

    /// The weights of the `size` values from `start` on, counted through the rows; they are in one row.
    pub(super) fn of_values(&self, start: usize, size: usize) -> &[f32] {
        self.columns.as_slice().part(start % self.columns.len(), size)
    }
}
