use proptest::prelude::*;

use super::*;
use crate::quant;
use crate::quant::matmul::tests::noise;

fn whole() -> Vec<Kind> {
    Kind::ALL.iter().copied().filter(|kind| kind.integer_form().is_some()).collect()
}

fn run(path: Path, matrices: &[&Packed], x: &[f32], count: usize) -> Vec<f32> {
    let mut y = vec![f32::NAN; count * matrices.iter().map(|matrix| matrix.rows).sum::<usize>()];
    Team::run(|team| matmul_by(path, team, matrices, x, &mut y)).unwrap();
    y
}

/// x as it is rounded: the numbers that are really multiplied.
fn rounded(x: &[f32]) -> Vec<f32> {
    let steps = x.as_chunks::<STEP>().0.iter();
    steps
        .flat_map(|x| {
            let (codes, scale, _) = kernel::round(x);
            codes.map(|code| f32::from(code) * scale)
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_path_gives_the_same_bits_and_the_products_of_what_was_rounded(
        kind in prop::sample::select(whole()),
        rows in 1usize..40,
        more in 0usize..20,
        blocks_a_row in 1usize..4,
        count in prop_oneof![0usize..11, 31usize..80],
        seed: u64,
    ) {
        let columns = kind.block_size() * blocks_a_row;
        let mut blocks = vec![0; (rows + more) * blocks_a_row * kind.block_bytes()];
        quant::quantize(kind, &noise((rows + more) * columns, seed), None, &mut blocks).unwrap();
        let mut dense = vec![0.0; (rows + more) * columns];
        quant::dequantize(kind, &blocks, &mut dense).unwrap();
        let (first, second) = blocks.split_at(rows * blocks_a_row * kind.block_bytes());
        let first = Packed::new(kind, first, rows, columns).unwrap().unwrap();
        let second = Packed::new(kind, second, more, columns).unwrap().unwrap();
        let x = noise(count * columns, seed ^ 1);
        let expected = run(Path::Portable, &[&first, &second], &x, count);
        let taken = rounded(&x);
        for (index, &found) in expected.iter().enumerate() {
            let (t, r) = (index / (rows + more), index % (rows + more));
            let pairs = taken[t * columns..][..columns].iter().zip(&dense[r * columns..][..columns]);
            let exact: f64 = pairs.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            // sums of 32 products are exact; codes and offsets cancel, so what rounds is larger than the result
            let largest = dense.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
            let bound = 1e-6 * columns as f64 * f64::from(largest);
            prop_assert!((f64::from(found) - exact).abs() <= bound, "{kind:?} {t} {r}: {found} {exact}");
        }
        for path in Path::all() {
            prop_assert_eq!(&run(path, &[&first, &second], &x, count), &expected, "{:?}", path);
            for t in 0..count {
                let alone = run(path, &[&first, &second], &x[t * columns..][..columns], 1);
                prop_assert_eq!(&alone[..], &expected[t * (rows + more)..][..rows + more], "{:?}", path);
            }
        }
    }
}

#[test]
fn rounding_is_to_the_nearest_of_255_numbers() {
    let x: [f32; 32] = std::array::from_fn(|i| (i as f32 - 10.3) * 0.37);
    let (codes, scale, sums) = kernel::round(&x);
    for (x, code) in x.iter().zip(codes) {
        assert!((x - f32::from(code) * scale).abs() <= scale * 0.5001);
    }
    assert_eq!(codes.map(i32::from).iter().sum::<i32>(), sums[0] + sums[1]);
    assert_eq!(codes.iter().map(|code| code.abs()).max(), Some(127));
    let (codes, scale, _) = kernel::round(&[0.0; 32]);
    assert!(codes == [0; 32] && scale == 0.0);
    for odd in [f32::NAN, f32::INFINITY] {
        let mut x = [1.0; 32];
        x[7] = odd;
        assert!(kernel::round(&x).1.is_nan(), "what isn't finite stays visible");
    }
}

proptest! {
    #[test]
    fn rounding_is_the_same_on_every_machine(x in prop::array::uniform32(prop_oneof![
        9 => -1e3f32..1e3, 1 => Just(0.0), 1 => any::<f32>(),
    ])) {
        let (found, expected) = (kernel::round(&x), kernel::round_portable(&x));
        prop_assert_eq!((found.0, found.1.to_bits(), found.2), (expected.0, expected.1.to_bits(), expected.2));
    }
}

#[test]
fn sizes_that_do_not_agree_are_errors() {
    assert!(Packed::new(Kind::Q4_0, &[0; 17], 1, 32).is_err());
    assert!(Packed::new(Kind::F32, &[0; 128], 1, 32).unwrap().is_none());
    let matrix = Packed::new(Kind::Q4_0, &[0; 36], 2, 32).unwrap().unwrap();
    let call = |x: usize, y: usize| Team::run(|team| matmul(team, &[&matrix], &vec![0.0; x], &mut vec![0.0; y]));
    assert!(call(32, 2).is_ok() && call(0, 0).is_ok());
    assert!(call(32, 3).is_err() && call(33, 2).is_err() && call(64, 2).is_err());
}
