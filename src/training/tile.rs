//! The one product that training's kernels are made of, on each kind of processor, equal to the bit.
//!
//! ```text
//! c[i, j] = (c[i, j] or 0) + Σ_k a(i, k) · b[k, j]     fused, in the order of k
//! ```
//! a is read wherever its strides lead, so it may be transposed; rows of b and c are contiguous. A number of c depends on
//! its row of a and its column of b alone, whatever it is computed beside.

use std::marker::PhantomData;

use crate::quant::matmul::Path;

/// Columns that go together through the widest processor's registers.
pub const COLUMNS: usize = 64;
/// Rows that do.
pub const ROWS: usize = 6;
/// Rows where there are no more columns than one vector has.
const NARROW_ROWS: usize = 12;
const LANES: usize = 16;

/// Memory that tasks write to at places of their own.
#[derive(Clone, Copy)]
pub struct Out<'a, T = f32> {
    start: *mut T,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: who asks for a place promises that nobody else uses it meanwhile.
unsafe impl<T> Sync for Out<'_, T> {}
// SAFETY: as above.
unsafe impl<T> Send for Out<'_, T> {}

impl<'a, T> Out<'a, T> {
    /// Borrows the slice for as long as tasks write.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), _slice: PhantomData }
    }

    /// The place of a number.
    ///
    /// # Safety
    /// It is inside the slice.
    pub unsafe fn at(&self, index: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.start.add(index) }
    }
}

/// How far it is from a number to the next.
#[derive(Clone, Copy, Debug)]
pub struct Strides {
    /// From a(i, k) to a(i + 1, k).
    pub a_row: usize,
    /// From a(i, k) to a(i, k + 1).
    pub a_step: usize,
    /// From b[k, j] to b[k + 1, j].
    pub b_step: usize,
    /// From c[i, j] to c[i + 1, j].
    pub c_row: usize,
}

/// c `[rows, columns]` as the file says; `fresh`: without what stands in it.
///
/// # Safety
/// For all i below `rows`, k below `steps` and j below `columns`, the places of a and b may be read and those of c
/// written, by nobody else meanwhile; the machine has the path.
#[allow(clippy::too_many_arguments)]
pub unsafe fn accumulate(
    path: Path,
    (rows, steps, columns): (usize, usize, usize),
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    fresh: bool,
) {
    let at = |i: usize, j: usize| {
        // SAFETY: inside, where i < rows and j < columns.
        unsafe { (a.add(i * strides.a_row), b.add(j), c.add(i * strides.c_row + j)) }
    };
    let block = |i: usize, j: usize, here: usize, wide: usize| {
        let (a, b, c) = at(i, j);
        /// The kernel for the number of rows.
        #[cfg(target_arch = "x86_64")]
        macro_rules! by_rows {
            ($kernel:ident, $vectors:literal, [$($count:literal)*]) => {
                match here {
                    // SAFETY: the caller's promise, for these rows and columns.
                    $($count => unsafe { $kernel::<$count, $vectors>(steps, strides, a, b, c, fresh) },)*
                    _ => {}
                }
            };
        }
        match (path, wide) {
            #[cfg(target_arch = "x86_64")]
            (Path::Avx512, COLUMNS) => by_rows!(avx512, 4, [1 2 3 4 5 6]),
            #[cfg(target_arch = "x86_64")]
            (Path::Avx512, LANES) => by_rows!(avx512, 1, [1 2 3 4 5 6 7 8 9 10 11 12]),
            #[cfg(target_arch = "x86_64")]
            (Path::Avx2, LANES) => by_rows!(avx2, 2, [1 2 3 4 5 6]),
            // SAFETY: the caller's promise, for these rows and columns.
            _ => unsafe { portable((here, steps, wide), strides, a, b, c, fresh) },
        }
    };
    let (full, rows_of_vector) = match path {
        Path::Portable => (LANES, ROWS),
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 => (LANES, ROWS),
        #[cfg(target_arch = "x86_64")]
        Path::Avx512 => (COLUMNS, NARROW_ROWS),
    };
    let mut j = 0;
    while j < columns {
        let wide = match columns - j {
            rest if rest >= full => full,
            rest if rest >= LANES => LANES,
            rest => rest,
        };
        let high = if wide == COLUMNS { ROWS } else { rows_of_vector };
        let mut i = 0;
        while i < rows {
            let here = high.min(rows - i);
            block(i, j, here, wide);
            i += here;
        }
        j += wide;
    }
}

/// # Safety
/// As for [`accumulate`].
unsafe fn portable(
    (rows, steps, columns): (usize, usize, usize),
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    fresh: bool,
) {
    for i in 0..rows {
        for j in 0..columns {
            // SAFETY: the caller's promise.
            unsafe {
                let place = c.add(i * strides.c_row + j);
                let mut sum = if fresh { 0.0 } else { *place };
                for k in 0..steps {
                    sum = (*a.add(i * strides.a_row + k * strides.a_step)).mul_add(*b.add(k * strides.b_step + j), sum);
                }
                *place = sum;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// # Safety
/// As for [`accumulate`], for ROWS rows and 16 · VECTORS columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl")]
unsafe fn avx512<const ROWS: usize, const VECTORS: usize>(
    steps: usize,
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    fresh: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        if !fresh {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(c.add(i * strides.c_row + LANES * v));
                }
            }
        }
        let (mut a, mut b) = (a, b);
        for _ in 0..steps {
            let row: [_; VECTORS] = std::array::from_fn(|v| _mm512_loadu_ps(b.add(LANES * v)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let factor = _mm512_set1_ps(*a.add(i * strides.a_row));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = _mm512_fmadd_ps(factor, row, *sum);
                }
            }
            (a, b) = (a.wrapping_add(strides.a_step), b.wrapping_add(strides.b_step));
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                _mm512_storeu_ps(c.add(i * strides.c_row + LANES * v), sum);
            }
        }
    }
}

/// # Safety
/// As for [`accumulate`], for ROWS rows and 8 · VECTORS columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const ROWS: usize, const VECTORS: usize>(
    steps: usize,
    strides: Strides,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    fresh: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
        if !fresh {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm256_loadu_ps(c.add(i * strides.c_row + 8 * v));
                }
            }
        }
        let (mut a, mut b) = (a, b);
        for _ in 0..steps {
            let row: [_; VECTORS] = std::array::from_fn(|v| _mm256_loadu_ps(b.add(8 * v)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let factor = _mm256_set1_ps(*a.add(i * strides.a_row));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = _mm256_fmadd_ps(factor, row, *sum);
                }
            }
            (a, b) = (a.wrapping_add(strides.a_step), b.wrapping_add(strides.b_step));
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                _mm256_storeu_ps(c.add(i * strides.c_row + 8 * v), sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quant::matmul::tests::noise;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_path_gives_the_sums_in_order(
            rows in 0usize..17, steps in 0usize..19, columns in 0usize..150, transposed: bool, fresh: bool, seed: u64,
        ) {
            let (a, b) = (noise(rows * steps, seed), noise(steps * (columns + 3), seed + 1));
            let start = noise(rows * (columns + 5), seed + 2);
            let (a_row, a_step) = if transposed { (1, rows) } else { (steps, 1) };
            let strides = Strides { a_row, a_step, b_step: columns + 3, c_row: columns + 5 };
            let mut expected = start.clone();
            for i in 0..rows {
                for j in 0..columns {
                    let place = &mut expected[i * (columns + 5) + j];
                    *place = (0..steps).fold(if fresh { 0.0 } else { *place }, |sum, k| {
                        a[i * a_row + k * a_step].mul_add(b[k * (columns + 3) + j], sum)
                    });
                }
            }
            for path in Path::all() {
                let mut found = start.clone();
                // SAFETY: the strides are those of the vectors.
                unsafe {
                    let sizes = (rows, steps, columns);
                    accumulate(path, sizes, strides, a.as_ptr(), b.as_ptr(), found.as_mut_ptr(), fresh);
                }
                prop_assert_eq!(&found, &expected, "{:?}", path);
            }
        }
    }
}
