//! Products of training in bfloat16, for processors whose tiles multiply it (AMX): sums in float32, rounded once.

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::tiles::halves as tiles;
use super::{Matrix, rows_of};
use crate::error::{Error, Result};
use crate::team::Team;

/// Where sums go.
pub enum Sums<'a> {
    /// To the nearest bfloat16: W is made to tiles as a whole.
    Rounded(&'a mut [bf16]),
    /// As they are: W is made to tiles part after part.
    Whole(&'a mut [f32]),
}

/// Whether this machine has what these products take.
pub fn usable() -> bool {
    #[cfg(target_arch = "x86_64")]
    return tiles::usable();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

fn needed() -> Result<()> {
    if usable() { Ok(()) } else { Err(Error::failure("products in bfloat16: expected a processor with AMX")) }
}

/// y = x Wᵀ, W rounded to bfloat16: x `[count, columns]`, y `[count, rows]`.
///
/// # Errors
/// Sizes that don't agree, or a machine that isn't [`usable`].
pub fn matmul(team: &Team, matrix: Matrix<'_>, x: &[bf16], y: &mut [bf16]) -> Result<()> {
    needed()?;
    rows_of("matmul", [x.len(), y.len()], [matrix.columns, matrix.rows])?;
    if x.is_empty() || y.is_empty() {
        y.fill(bf16::ZERO);
        return Ok(());
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the machine has what it takes, and lengths were checked.
    unsafe {
        tiles::matmul(team, &matrix, x, y);
    }
    Ok(())
}

/// dx = dy W, W rounded to bfloat16: dy `[count, rows]`, dx `[count, columns]`.
///
/// # Errors
/// As of [`matmul`].
pub fn matmul_transposed(team: &Team, matrix: Matrix<'_>, dy: &[bf16], dx: Sums<'_>) -> Result<()> {
    needed()?;
    let (len, widths) = (dy.len(), [matrix.rows, matrix.columns]);
    match dx {
        Sums::Rounded(dx) => {
            rows_of("matmul_transposed", [len, dx.len()], widths)?;
            if dy.is_empty() || dx.is_empty() {
                dx.fill(bf16::ZERO);
                return Ok(());
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the machine has what it takes, and lengths were checked.
            unsafe {
                tiles::matmul_transposed(team, &matrix, dy, dx);
            }
        }
        Sums::Whole(dx) => {
            rows_of("matmul_transposed", [len, dx.len()], widths)?;
            if dy.is_empty() || dx.is_empty() {
                dx.fill(0.0);
                return Ok(());
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            unsafe {
                tiles::matmul_transposed(team, &matrix, dy, dx);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::noise;
    use super::*;
    use crate::quant::{self, Kind};

    fn halves(count: usize, seed: u64) -> Vec<bf16> {
        noise(count, seed).into_iter().map(bf16::from_f32).collect()
    }

    /// Whether `found` is what float64 says of x and W's nearest bfloat16, but for roundings of float32 and the last one.
    fn right(found: f32, x: &[bf16], w: impl Iterator<Item = f32>, last: f64) -> bool {
        let products = x.iter().zip(w).map(|(x, w)| x.to_f64() * bf16::from_f32(w).to_f64());
        let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()));
        // a rounding in each of 17 places of a chunk
        let roundings = f64::from(f32::EPSILON) / 2.0 * (17 + x.len().div_ceil(32)) as f64;
        (f64::from(found) - sum).abs() <= size * roundings + sum.abs() * last
    }

    fn product(matrix: Matrix<'_>, x: &[bf16]) -> Vec<bf16> {
        let mut y = vec![bf16::NAN; x.len() / matrix.columns * matrix.rows];
        Team::run(|team| matmul(team, matrix, x, &mut y)).unwrap();
        y
    }

    fn transposed(matrix: Matrix<'_>, dy: &[bf16]) -> (Vec<bf16>, Vec<f32>) {
        let count = dy.len() / matrix.rows * matrix.columns;
        let (mut rounded, mut whole) = (vec![bf16::NAN; count], vec![f32::NAN; count]);
        Team::run(|team| {
            matmul_transposed(team, matrix, dy, Sums::Rounded(&mut rounded)).unwrap();
            matmul_transposed(team, matrix, dy, Sums::Whole(&mut whole)).unwrap();
        });
        (rounded, whole)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn numbers_are_sums_rounded_once_in_any_company(
            kind in prop::sample::select(Kind::ALL),
            rows in 1usize..180,
            blocks in 1usize..4,
            odd in 1usize..130,
            count in 1usize..100,
            seed: u64,
        ) {
            if !usable() {
                return Ok(());
            }
            let columns = if kind.block_size() == 1 { odd } else { kind.block_size() * blocks };
            let mut bytes = vec![0; rows * columns / kind.block_size() * kind.block_bytes()];
            quant::quantize(kind, &noise(rows * columns, seed), None, &mut bytes).unwrap();
            let mut w = vec![0.0; rows * columns];
            quant::dequantize(kind, &bytes, &mut w).unwrap();
            let matrix = Matrix::new(kind, &bytes, rows, columns).unwrap();
            let half = f64::from(bf16::EPSILON.to_f32()) / 2.0;

            let x = halves(count * columns, seed + 1);
            let y = product(matrix, &x);
            for (index, found) in y.iter().enumerate() {
                let (t, r) = (index / rows, index % rows);
                let w = w[r * columns..][..columns].iter().copied();
                prop_assert!(right(found.to_f32(), &x[t * columns..][..columns], w, half), "{t} {r}");
            }
            prop_assert_eq!(&product(matrix, &x[(count - 1) * columns..]), &y[(count - 1) * rows..]);

            let dy = halves(count * rows, seed + 2);
            let (rounded, whole) = transposed(matrix, &dy);
            for (index, found) in whole.iter().enumerate() {
                let (t, k) = (index / columns, index % columns);
                let w = w.iter().skip(k).step_by(columns).copied();
                prop_assert!(right(*found, &dy[t * rows..][..rows], w, 0.0), "{t} {k}");
                prop_assert_eq!(rounded[index], bf16::from_f32(*found));
            }
            prop_assert_eq!(&transposed(matrix, &dy[(count - 1) * rows..]).1, &whole[(count - 1) * columns..]);
        }
    }

    #[test]
    fn large_matrices_are_gone_through_in_parts() {
        if !usable() {
            return;
        }
        // more of W, and of x, than is made to tiles at once
        for (rows, columns, count) in [(6000, 1600, 100), (200, 12_000, 140)] {
            let (w, x, dy) = (noise(rows * columns, 1), halves(count * columns, 2), halves(count * rows, 3));
            let matrix = Matrix::new(Kind::F32, bytemuck::cast_slice(&w), rows, columns).unwrap();
            let y = product(matrix, &x);
            let (rounded, whole) = transposed(matrix, &dy);
            let half = f64::from(bf16::EPSILON.to_f32()) / 2.0;
            for index in (0..y.len()).step_by(2999) {
                let (t, r) = (index / rows, index % rows);
                let w = w[r * columns..][..columns].iter().copied();
                assert!(right(y[index].to_f32(), &x[t * columns..][..columns], w, half), "{t} {r}");
            }
            for index in (0..whole.len()).step_by(9973) {
                let (t, k) = (index / columns, index % columns);
                let column = w.iter().skip(k).step_by(columns).copied();
                assert!(right(whole[index], &dy[t * rows..][..rows], column.clone(), 0.0), "{t} {k}");
                assert!(right(rounded[index].to_f32(), &dy[t * rows..][..rows], column, half), "{t} {k}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_an_error() {
        let values = [0.0f32; 64 * 3];
        let matrix = Matrix::new(Kind::F32, bytemuck::cast_slice(&values), 3, 64).unwrap();
        let run = |x: usize, y: usize| {
            Team::run(|team| matmul(team, matrix, &vec![bf16::ONE; x], &mut vec![bf16::ONE; y])).is_ok()
        };
        assert_eq!((run(128, 6), run(0, 0)), (usable(), usable()));
        assert!(!run(128, 5) && !run(127, 6) && !run(64, 6));
    }
}
