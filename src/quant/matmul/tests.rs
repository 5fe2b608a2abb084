use proptest::prelude::*;

use super::*;
use crate::quant;

/// Values without a pattern, from −1 to 1.
pub(crate) fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn blocks(kind: Kind, rows: usize, columns: usize, seed: u64) -> Vec<u8> {
    let mut blocks = vec![0; rows * columns / kind.block_size() * kind.block_bytes()];
    quant::quantize(kind, &noise(rows * columns, seed), None, &mut blocks).unwrap();
    blocks
}

fn run(path: Path, matrices: &[Matrix<'_>], x: &[f32], count: usize) -> Vec<f32> {
    let mut y = vec![f32::NAN; count * matrices.iter().map(Matrix::rows).sum::<usize>()];
    Team::run(|team| matmul_by(path, team, matrices, x, &mut y)).unwrap();
    y
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_path_gives_the_same_bits_and_the_right_sums(
        kind in prop::sample::select(Kind::ALL),
        rows in 1usize..40,
        more in 0usize..6,
        blocks_a_row in 1usize..4,
        odd in 0usize..17,
        count in 0usize..11,
        seed: u64,
    ) {
        // odd ones are long enough to be gone through in parts
        let one = [40, 400][odd % 2] * blocks_a_row + odd;
        let columns = if kind.block_size() == 1 { one } else { kind.block_size() * blocks_a_row };
        let (first, second) = (blocks(kind, rows, columns, seed), blocks(kind, more, columns, seed + 1));
        let matrices = [
            Matrix::new(kind, &first, rows, columns).unwrap(),
            Matrix::new(kind, &second, more, columns).unwrap(),
        ];
        let x = noise(count * columns, seed + 2);
        let mut dense = vec![0.0; (rows + more) * columns];
        quant::dequantize(kind, &first, &mut dense[..rows * columns]).unwrap();
        quant::dequantize(kind, &second, &mut dense[rows * columns..]).unwrap();
        let expected = run(Path::Portable, &matrices, &x, count);
        for (index, &found) in expected.iter().enumerate() {
            let (t, r) = (index / (rows + more), index % (rows + more));
            let pairs = x[t * columns..][..columns].iter().zip(&dense[r * columns..][..columns]);
            let products = pairs.map(|(&x, &w)| f64::from(x) * f64::from(w));
            let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()));
            // each of at most K / 16 + 6 roundings is half a unit of the sum of sizes
            let bound = size * f64::from(f32::EPSILON) / 2.0 * (columns / 16 + 6 + columns % 16) as f64 + 1e-30;
            prop_assert!((f64::from(found) - sum).abs() <= bound, "{found} {sum}");
        }
        for path in Path::all() {
            let found = run(path, &matrices, &x, count);
            prop_assert_eq!(bits(&found), bits(&expected), "{:?}", path);
            for t in 0..count {
                let alone = run(path, &matrices, &x[t * columns..][..columns], 1);
                prop_assert_eq!(bits(&alone), bits(&expected[t * (rows + more)..][..rows + more]), "{:?} alone", path);
            }
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn the_threads_change_nothing() {
    let kind = Kind::Q4K;
    let blocks = blocks(kind, 300, 512, 3);
    let (matrix, x) = (Matrix::new(kind, &blocks, 300, 512).unwrap(), noise(33 * 512, 4));
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(Path::best(), &[matrix], &x, 33))
    };
    assert_eq!(bits(&with(1)), bits(&with(3)));
}

#[test]
fn sizes_that_disagree_are_errors() {
    let blocks = blocks(Kind::Q4_0, 2, 32, 1);
    assert!(Matrix::new(Kind::Q4_0, &blocks, 2, 64).is_err());
    assert!(Matrix::new(Kind::Q4_0, &blocks, 2, 33).is_err());
    assert!(Matrix::new(Kind::Q4_0, &blocks, usize::MAX, 32).is_err());
    let matrix = Matrix::new(Kind::Q4_0, &blocks, 2, 32).unwrap();
    Team::run(|team| {
        assert!(matmul(team, &[matrix], &[0.0; 31], &mut [0.0; 2]).is_err());
        assert!(matmul(team, &[matrix], &[0.0; 32], &mut [0.0; 3]).is_err());
        matmul(team, &[], &[], &mut []).unwrap();
    });
}

#[test]
fn halves_widen_as_they_should() {
    for bits in 0..=u16::MAX {
        let (ours, theirs) = (crate::quant::scales::wide(bits), half::f16::from_bits(bits).to_f32());
        assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn weighted_sums_have_the_same_bits_on_every_path(
        count in 1usize..=ROWS,
        values in 0usize..9,
        behind in 0usize..20,
        more in 0usize..3,
        width in 0usize..150,
        seed: u64,
    ) {
        let stride = values + more;
        let (shares, start) = (noise(count * stride, seed), noise(count * width, seed + 1));
        let rows: Vec<Vec<f32>> = (0..values + behind).map(|s| noise(width, seed + 2 + s as u64)).collect();
        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let expected: Vec<f32> = (0..count * width).map(|index| {
            let (t, at) = (index / width, index % width);
            let values = rows[..values].iter().enumerate();
            values.fold(start[index], |sum, (s, row)| shares[t * stride + s].mul_add(row[at], sum))
        }).collect();
        for path in Path::all() {
            let mut found = start.clone();
            path.weighted(&shares, stride, &rows, values, width, &mut found);
            prop_assert_eq!(&found, &expected, "{:?}", path);
        }
    }

    #[test]
    fn scores_are_the_weighted_sums_of_columns_on_every_path(
        count in 1usize..=ROWS,
        keys in 0usize..70,
        behind in 0usize..20,
        more in 0usize..3,
        width in 0usize..40,
        seed: u64,
    ) {
        let stride = keys + more;
        let (queries, start) = (noise(count * width, seed), noise(count * stride, seed + 1));
        let rows: Vec<Vec<f32>> = (0..keys + behind).map(|s| noise(width, seed + 2 + s as u64)).collect();
        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let mut expected = start.clone();
        for (t, expected) in expected.chunks_exact_mut(stride.max(1)).enumerate().filter(|_| width > 0) {
            for (expected, key) in expected.iter_mut().zip(&rows[..keys]) {
                let query = queries[t * width..][..width].iter();
                *expected = query.zip(*key).fold(0.0, |sum, (query, key)| query.mul_add(*key, sum));
            }
        }
        for path in Path::all() {
            let mut found = start.clone();
            path.scores(&queries, &rows, keys, width, &mut found, stride);
            prop_assert_eq!(&found, &expected, "{:?}", path);
            let mut columns = vec![0.0; width * stride];
            path.transpose(&rows[..keys], width, &mut columns, stride);
            let columns: Vec<&[f32]> = columns.chunks_exact(stride.max(1)).collect();
            let mut sums = vec![0.0; count * stride];
            path.weighted(&queries, width, &columns, columns.len(), stride, &mut sums);
            for (t, sums) in sums.chunks_exact(stride.max(1)).enumerate().filter(|_| width > 0) {
                prop_assert_eq!(&sums[..keys], &found[t * stride..][..keys], "{:?}", path);
            }
        }
    }
}
