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

/// A matrix W `[out, in]` with a low-rank one beside it, both rounded to bfloat16.
pub struct LowRank<'a> {
    /// W
    pub matrix: Matrix<'a>,
    /// A `[rank, in]`
    pub a: &'a [f32],
    /// B `[out, rank]`
    pub b: &'a [f32],
    /// s
    pub scale: f32,
}

/// What such a layer gives.
pub struct Forward<'a> {
    /// y `[count, out]`
    pub y: &'a mut [bf16],
    /// x Aᵀ `[count, rank]`
    pub low: &'a mut [bf16],
}

/// What such a layer's backward pass reads and writes.
pub struct Back<'a> {
    /// dy `[count, out]`
    pub dy: &'a [bf16],
    /// x Aᵀ `[count, rank]`, of the forward pass
    pub low: &'a [bf16],
    /// dA `[rank, in]`, where it is wanted
    pub da: Option<&'a mut [f32]>,
    /// dB `[out, rank]`, where it is wanted
    pub db: Option<&'a mut [f32]>,
}

/// y_i = x W_iᵀ + s_i (x A_iᵀ) B_iᵀ of x `[count, inputs]`, and x A_iᵀ.
///
/// # Errors
/// As of [`matmul`].
pub fn low_rank(team: &Team, x: &[bf16], inputs: usize, parts: &[LowRank<'_>], out: &mut [Forward<'_>]) -> Result<()> {
    needed()?;
    let lengths = out.iter().map(|out| [out.y.len(), out.low.len()]);
    if check(x, inputs, parts, lengths)? {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the machine has what it takes, and lengths were checked.
        unsafe {
            super::tiles::low_rank::forward(team, x, inputs, parts, out);
        }
    } else {
        out.iter_mut().for_each(|out| out.y.fill(bf16::ZERO));
    }
    Ok(())
}

/// The gradients of [`low_rank`]: of A and B where they are wanted, and of x, dx = Σ_i dy_i W_i + s_i (dy_i B_i) A_i.
///
/// # Errors
/// As of [`matmul`].
pub fn low_rank_back(
    team: &Team,
    x: &[bf16],
    inputs: usize,
    parts: &[LowRank<'_>],
    back: &mut [Back<'_>],
    dx: Option<&mut [bf16]>,
) -> Result<()> {
    needed()?;
    let lengths = back.iter().map(|back| [back.dy.len(), back.low.len()]);
    let some = check(x, inputs, parts, lengths)?;
    for (part, back) in parts.iter().zip(&*back) {
        let agree =
            |gradient: &Option<&mut [f32]>, of: &[f32]| gradient.as_ref().is_none_or(|own| own.len() == of.len());
        if !agree(&back.da, part.a) || !agree(&back.db, part.b) || dx.as_ref().is_some_and(|dx| dx.len() != x.len()) {
            return Err(Error::failure("low-rank linear: expected gradients as long as what they are of, got others"));
        }
    }
    if some {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the machine has what it takes, and lengths were checked.
        unsafe {
            super::tiles::low_rank::backward(team, x, inputs, parts, back, dx);
        }
    } else {
        for gradient in back.iter_mut().flat_map(|back| [&mut back.da, &mut back.db]).flatten() {
            gradient.fill(0.0);
        }
        dx.into_iter().for_each(|dx| dx.fill(bf16::ZERO));
    }
    Ok(())
}

/// Whether there is anything to multiply.
///
/// # Errors
/// Sizes that don't agree.
fn check(
    x: &[bf16],
    inputs: usize,
    parts: &[LowRank<'_>],
    lengths: impl ExactSizeIterator<Item = [usize; 2]>,
) -> Result<bool> {
    let count = x.len().checked_div(inputs).unwrap_or(0);
    let mut some = count > 0 && inputs > 0;
    let mut agree = x.len() == count * inputs && lengths.len() == parts.len();
    for (part, [outputs, low]) in parts.iter().zip(lengths) {
        let (rows, rank) = (part.matrix.rows(), part.a.len().checked_div(inputs).unwrap_or(0));
        agree &= part.matrix.columns() == inputs && part.a.len() == rank * inputs && part.b.len() == rows * rank;
        agree &= rank > 0 && outputs == count * rows && low == count * rank;
        some &= rows > 0;
    }
    match agree {
        true => Ok(some && !parts.is_empty()),
        false => Err(Error::failure(format!(
            "low-rank linear: expected W [out, {inputs}], A [rank, {inputs}], B [out, rank] and rows of as many, got others"
        ))),
    }
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

    /// Σ x w, and the sum of the products' sizes.
    fn sum(pairs: &[(f64, f64)]) -> (f64, f64) {
        pairs.iter().fold((0.0, 0.0), |(sum, size), (x, w)| (sum + x * w, size + (x * w).abs()))
    }

    fn round(value: f32) -> f64 {
        bf16::from_f32(value).to_f64()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn low_ranks_are_more_columns_of_the_product(
            outputs in prop::collection::vec((1usize..90, 1usize..70), 1..4),
            inputs in 1usize..90,
            count in prop_oneof![1usize..100, Just(4200)],
            kind in prop::sample::select(vec![Kind::F32, Kind::Bf16]),
            wanted: bool,
            seed: u64,
        ) {
            if !usable() {
                return Ok(());
            }
            const HALF: f64 = 1.0 / 256.0; // the most that a bfloat16 is rounded by
            let scale = 1.7;
            let x = halves(count * inputs, seed);
            let made: Vec<_> = outputs.iter().zip(1..).map(|(&(rows, rank), i)| {
                let mut w = vec![0; rows * inputs * kind.block_bytes()];
                quant::quantize(kind, &noise(rows * inputs, seed + i), None, &mut w).unwrap();
                let (a, b) = (noise(rank * inputs, seed + 10 + i), noise(rows * rank, seed + 20 + i));
                (w, a, b, halves(count * rows, seed + 30 + i))
            }).collect();
            let parts: Vec<LowRank<'_>> = made.iter().zip(&outputs).map(|((w, a, b, _), &(rows, _))| {
                LowRank { matrix: Matrix::new(kind, w, rows, inputs).unwrap(), a, b, scale }
            }).collect();
            let nan = |len: usize| vec![bf16::NAN; len];
            let mut found: Vec<_> =
                outputs.iter().map(|&(rows, rank)| (nan(count * rows), nan(count * rank))).collect();
            let mut out: Vec<_> = found.iter_mut().map(|(y, low)| Forward { y, low }).collect();
            Team::run(|team| low_rank(team, &x, inputs, &parts, &mut out)).unwrap();

            let mut gradients: Vec<_> =
                made.iter().map(|(_, a, b, _)| (vec![f32::NAN; a.len()], vec![f32::NAN; b.len()])).collect();
            let mut back: Vec<_> = gradients.iter_mut().zip(&made).zip(&found).map(|(((da, db), made), (_, low))| {
                Back { dy: &made.3, low, da: Some(da), db: Some(db) }
            }).collect();
            let mut dx = nan(count * inputs);
            let into = wanted.then_some(&mut dx[..]);
            Team::run(|team| low_rank_back(team, &x, inputs, &parts, &mut back, into)).unwrap();

            let sampled = |t: usize| t < 40 || t.is_multiple_of(517);
            let mut pairs_of_dx: Vec<Vec<(f64, f64)>> = vec![Vec::new(); count * inputs];
            for (i, &(rows, rank)) in outputs.iter().enumerate() {
                let (_, a, b, dy) = &made[i];
                let mut w = vec![0.0; rows * inputs];
                Team::run(|team| parts[i].matrix.dequantize(team, &mut w)).unwrap();
                let ((y, low), (da, db)) = (&found[i], &gradients[i]);
                let row = |t: usize| x[t * inputs..][..inputs].iter().map(|x| x.to_f64());
                let mut dlow = vec![0.0; count * rank];
                for t in 0..count {
                    for r in 0..rank {
                        let of_dy = |o: usize| dy[t * rows + o].to_f64();
                        let pairs: Vec<_> = (0..rows).map(|o| (of_dy(o), round(scale * b[o * rank + r]))).collect();
                        dlow[t * rank + r] = round(sum(&pairs).0 as f32);
                        if sampled(t) {
                            let pairs: Vec<_> = row(t).zip(a[r * inputs..].iter().map(|&a| round(a))).collect();
                            let (expected, size) = sum(&pairs);
                            let found = low[t * rank + r].to_f64();
                            prop_assert!((found - expected).abs() <= expected.abs() * HALF + size * 1e-5);
                        }
                    }
                }
                for t in (0..count).filter(|&t| sampled(t)) {
                    let lows = || (0..rank).map(|r| low[t * rank + r].to_f64());
                    for o in 0..rows {
                        let mut pairs: Vec<_> = row(t).zip(w[o * inputs..].iter().map(|&w| round(w))).collect();
                        pairs.extend(lows().zip(b[o * rank..].iter().map(|b| round(scale * b))));
                        let ((expected, size), found) = (sum(&pairs), y[t * rows + o].to_f64());
                        prop_assert!((found - expected).abs() <= expected.abs() * HALF + size * 1e-5);
                    }
                    for k in 0..inputs {
                        let pairs = &mut pairs_of_dx[t * inputs + k];
                        pairs.extend((0..rows).map(|o| (dy[t * rows + o].to_f64(), round(w[o * inputs + k]))));
                        pairs.extend((0..rank).map(|r| (dlow[t * rank + r], round(a[r * inputs + k]))));
                    }
                }
                for r in 0..rank {
                    for k in (0..inputs).step_by(7) {
                        let pairs: Vec<_> =
                            (0..count).map(|t| (dlow[t * rank + r], x[t * inputs + k].to_f64())).collect();
                        let (expected, size) = sum(&pairs);
                        // where a sum is halfway, d is rounded to the other side
                        prop_assert!((f64::from(da[r * inputs + k]) - expected).abs() <= size * 2.0 * HALF);
                    }
                    for o in (0..rows).step_by(7) {
                        let pairs: Vec<_> =
                            (0..count).map(|t| (low[t * rank + r].to_f64(), dy[t * rows + o].to_f64())).collect();
                        let (expected, size) = sum(&pairs);
                        let (found, scale) = (f64::from(db[o * rank + r]), f64::from(scale));
                        prop_assert!((found - scale * expected).abs() <= scale * size * 1e-5);
                    }
                }
            }
            for (found, pairs) in dx.iter().zip(&pairs_of_dx).filter(|(_, pairs)| !pairs.is_empty()) {
                let (expected, size) = sum(pairs);
                let near = (found.to_f64() - expected).abs() <= expected.abs() * HALF + size * HALF / 8.0;
                prop_assert!(near || !wanted, "{found} {expected}");
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
