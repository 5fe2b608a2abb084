use half::bf16;
use proptest::prelude::*;

use super::*;

/// Numbers that look random, about as large as 1.
fn noise(count: usize, seed: u64) -> Vec<bf16> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bf16::from_f32((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// A sum, and the sum of its terms' sizes.
#[derive(Clone, Copy, Default)]
struct Sum(f64, f64);

impl Sum {
    fn add(&mut self, term: f64) {
        *self = Self(self.0 + term, self.1 + term.abs());
    }

    /// Whether `found` is near: each term, and the result, may be off by a part of so much.
    fn near(self, found: f32, part: f64) -> bool {
        (f64::from(found) - self.0).abs() <= part * self.1 + 1e-5
    }
}

/// What each query and key gets, in float64: y, m, and from y as it was rounded dq, dk and dv.
struct Expected {
    y: Vec<Sum>,
    m: Vec<f64>,
    dq: Vec<Sum>,
    dk: Vec<Sum>,
    dv: Vec<Sum>,
}

fn expected(shape: &Shape<'_>, [q, k, v, dy]: [&[bf16]; 4], y: &[bf16]) -> Expected {
    let (dim, wide, narrow) = (shape.head_dim, shape.queries(), shape.keys());
    let zeros = |count: usize| vec![Sum::default(); count];
    let mut found =
        Expected { y: zeros(q.len()), m: Vec::new(), dq: zeros(q.len()), dk: zeros(k.len()), dv: zeros(k.len()) };
    let dot = |x: &[bf16], y: &[bf16]| -> f64 { x.iter().zip(y).map(|(x, y)| x.to_f64() * y.to_f64()).sum() };
    for sequence in shape.sequences().unwrap() {
        for (i, query) in (0..sequence.length).flat_map(|i| (0..shape.heads).map(move |query| (i, query))) {
            let at = (sequence.start + i) * wide + query * dim;
            let [q, dy, y] = [q, dy, y].map(|values| &values[at..][..dim]);
            let places = shape.sees(sequence.before + i);
            let places = places.map(|key| sequence.row(key) * narrow + query / shape.group() * dim);
            let scores: Vec<(usize, f64)> =
                places.map(|key| (key, f64::from(shape.scale) * dot(q, &k[key..][..dim]))).collect();
            let most = scores.iter().map(|score| score.1).fold(f64::NEG_INFINITY, f64::max);
            let m = most + scores.iter().map(|score| (score.1 - most).exp()).sum::<f64>().ln();
            found.m.push(m);
            for (key, score) in scores {
                let p = (score - m).exp();
                let e = f64::from(shape.scale) * p * (dot(dy, &v[key..][..dim]) - dot(dy, y));
                for d in 0..dim {
                    found.y[at + d].add(p * v[key + d].to_f64());
                    found.dq[at + d].add(e * k[key + d].to_f64());
                    found.dk[key + d].add(e * q[d].to_f64());
                    found.dv[key + d].add(p * dy[d].to_f64());
                }
            }
        }
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bfloat16_is_near_what_float64_says(
        lengths in prop::collection::vec(1usize..210, 1..4),
        shares in prop::collection::vec(prop_oneof![Just(0), 1usize..210], 4),
        window in prop_oneof![Just(None), (1usize..200).prop_map(Some)],
        heads in (1usize..3, 1usize..4),
        head_dim in prop::sample::select(vec![32, 64, 96, 40]),
        seed: u64,
    ) {
        let mut whole = 0;
        let shared: Vec<usize> = lengths.iter().zip(shares).enumerate().map(|(index, (&length, share))| {
            let before = if index == 0 { 0 } else { share.min(whole) };
            if before == 0 {
                whole = length;
            }
            before
        }).collect();
        let (key_value_heads, group) = heads;
        let shape = Shape {
            lengths: &lengths,
            shared: &shared,
            heads: key_value_heads * group,
            key_value_heads,
            head_dim,
            window,
            scale: 0.4,
        };
        let tokens: usize = lengths.iter().sum();
        let (queries, keys) = (tokens * shape.queries(), tokens * shape.keys());
        let [q, k, v, dy] = [(queries, 1), (keys, 2), (keys, 3), (queries, 4)].map(|(count, i)| noise(count, seed ^ i));
        let (mut y, mut m) = (vec![bf16::NAN; queries], vec![f32::NAN; tokens * shape.heads]);
        let [mut dq, mut dk, mut dv] = [queries, keys, keys].map(|count| vec![f32::NAN; count]);
        Team::run(|team| {
            forward(Path::best(), team, shape, &q, &k, &v, &mut y, &mut m).unwrap();
            let kept = Kept { q: &q, k: &k, v: &v, y: &y, m: &m, dy: &dy };
            backward(Path::best(), team, shape, kept, &mut dq, &mut dk, &mut dv).unwrap();
        });

        const HALF: f64 = 1.0 / 256.0; // the most that a bfloat16 is rounded by
        let expected = expected(&shape, [&q, &k, &v, &dy], &y);
        for (found, expected) in y.iter().zip(&expected.y) {
            prop_assert!(expected.near(found.to_f32(), 2.0 * HALF));
        }
        for (found, expected) in m.iter().zip(&expected.m) {
            prop_assert!((f64::from(*found) - expected).abs() < 1e-5 * (1.0 + expected.abs()));
        }
        for (found, expected) in [(&dq, &expected.dq), (&dk, &expected.dk), (&dv, &expected.dv)] {
            for (found, expected) in found.iter().zip(expected) {
                prop_assert!(expected.near(*found, HALF), "{found} {} {}", expected.0, expected.1);
            }
        }

        // the last sequence alone, with what it shares, is the same to the bit
        let last = lengths.len() - 1;
        let first = if shared[last] == 0 { last } else { shared.iter().take(last).rposition(|&share| share == 0).unwrap() };
        let taken = if first == last { vec![last] } else { vec![first, last] };
        let few: Vec<usize> = taken.iter().map(|&index| lengths[index]).collect();
        let few_shared: Vec<usize> = taken.iter().map(|&index| shared[index]).collect();
        let of = |values: &[bf16], width: usize| -> Vec<bf16> {
            taken.iter().flat_map(|&index| {
                let start: usize = lengths[..index].iter().sum();
                values[start * width..(start + lengths[index]) * width].to_vec()
            }).collect()
        };
        let alone = Shape { lengths: &few, shared: &few_shared, ..shape };
        let count: usize = few.iter().sum();
        let (mut again, mut logs) = (vec![bf16::NAN; count * shape.queries()], vec![f32::NAN; count * shape.heads]);
        let [q, k, v] = [(&q, shape.queries()), (&k, shape.keys()), (&v, shape.keys())].map(|(x, width)| of(x, width));
        Team::run(|team| forward(Path::best(), team, alone, &q, &k, &v, &mut again, &mut logs)).unwrap();
        let own = lengths[last] * shape.queries();
        prop_assert_eq!(&again[again.len() - own..], &y[y.len() - own..]);
    }
}
