//! The search for a scale: the least squared error over a few starting points, each refined by least squares.
//!
//! The first starting point is that of llama.cpp's reference quantizer, codes are the nearest ones under the scale as it
//! will be stored, and the best candidate is taken: so no block of 32 is worse than the reference's. Values may count by
//! weights; then more starting points are tried, since what matters may be small.
//!
//! The shape of each loop is chosen so that it vectorizes on the baseline of the architecture; sums are taken in one
//! fixed order.

use half::f16;

use super::weights::Weights;

/// Adding and subtracting 1.5 · 2²³ rounds to the nearest integer, ties to even, where |x| < 2²².
const ROUND: f32 = 12_582_912.0;

/// The nearest integer of a number below 2²² in magnitude.
pub(super) fn nearest(value: f32) -> f32 {
    (value + ROUND) - ROUND
}

/// The numbers that codes stand for, before the scale.
pub(super) trait Codes {
    /// The one nearest to `scaled`.
    fn nearest(scaled: f32) -> f32;
}

/// The integers from `LOWEST` to `HIGHEST`.
pub(super) struct Integers<const LOWEST: i32, const HIGHEST: i32>;

impl<const LOWEST: i32, const HIGHEST: i32> Codes for Integers<LOWEST, HIGHEST> {
    fn nearest(scaled: f32) -> f32 {
        nearest(scaled.clamp(LOWEST as f32, HIGHEST as f32))
    }
}

/// A number as half precision stores it.
pub(super) fn half(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

/// A candidate's squared error, and the scale that is best for its codes.
pub(super) struct Fit {
    /// Σ w (x − d q)².
    pub error: f32,
    /// Σ w x q, whose quotient by `squares` is the best scale.
    pub products: f32,
    /// Σ w q².
    pub squares: f32,
}

impl Fit {
    fn refined(&self) -> f32 {
        if self.squares > 0.0 { self.products / self.squares } else { 0.0 }
    }
}

/// How well d q, with the nearest codes q, gives the values.
pub(super) fn fit<C: Codes, const N: usize>(values: &[f32; N], weights: impl Weights, d: f32) -> Fit {
    let inverse = inverse(d);
    let mut sums = [[0.0f32; 8]; 3];
    for (values, weights) in values.as_chunks::<8>().0.iter().zip(weights.eights()) {
        for lane in 0..8 {
            let code = C::nearest(values[lane] * inverse);
            let difference = values[lane] - d * code;
            sums[0][lane] += weights[lane] * difference * difference;
            sums[1][lane] += weights[lane] * values[lane] * code;
            sums[2][lane] += weights[lane] * code * code;
        }
    }
    let [error, products, squares] = sums.map(|lanes| lanes.iter().sum());
    Fit { error, products, squares }
}

/// The best scale d for x ≈ d q, as `store` keeps it, from the scales of `starts`.
pub(super) fn symmetric<C: Codes, const N: usize, const STARTS: usize>(
    values: &[f32; N],
    weights: impl Weights,
    starts: [f32; STARTS],
    store: impl Fn(f32) -> f32,
) -> f32 {
    let mut best = (f32::INFINITY, 0.0);
    let more = weights.differ().then(|| smaller(values, weights).map(|share| starts[0] * share));
    for start in starts.into_iter().chain(more.into_iter().flatten()) {
        let mut candidate = start;
        for _ in 0..3 {
            let d = store(candidate);
            let fit = fit::<C, N>(values, weights, d);
            if fit.error < best.0 {
                best = (fit.error, d);
            }
            candidate = fit.refined();
        }
    }
    best.1
}

/// The shares of the first starting point's scale that are tried where values differ in weight; the last reaches just to
/// the value that counts most.
fn smaller<const N: usize>(values: &[f32; N], weights: impl Weights) -> [f32; 4] {
    let counting =
        values.iter().zip(weights.eights().flatten()).map(|(value, weight)| (weight * value * value, *value));
    let most = counting.fold((0.0, 0.0), |most, next| if next.0 > most.0 { next } else { most }).1;
    [0.8, 0.6, 0.4, most * inverse(signed_extreme(values))]
}

/// The codes of the values under the scale d.
pub(super) fn codes<C: Codes, const N: usize>(values: &[f32; N], d: f32) -> [i8; N] {
    let inverse = inverse(d);
    values.map(|value| C::nearest(value * inverse) as i8)
}

/// The best scale d and offset m for x ≈ d q + m, q in `0..=highest`, as `store` keeps both.
///
/// The first starting point spans from the least to the greatest value; the others leave out a share of the span at both
/// ends, or only at one, or leave out the last code. With `below_zero`, m is zero or less.
pub(super) fn affine<const N: usize>(
    values: &[f32; N],
    weights: impl Weights,
    highest: f32,
    below_zero: bool,
    store: impl Fn(f32) -> f32,
) -> (f32, f32) {
    let least = values.iter().copied().fold(f32::INFINITY, f32::min);
    let least = if below_zero { least.min(0.0) } else { least };
    let span = values.iter().copied().fold(f32::NEG_INFINITY, f32::max).max(least) - least;
    let mut best = (f32::INFINITY, 0.0, store(least));
    let step = 1.0 / (highest - 1.0); // the share of the span that one code less makes of a step
    let cuts = [(0.0, 0.0), (0.0, -step), (0.0, -step / 2.0), (0.03, 0.03), (0.07, 0.07), (0.06, 0.0), (0.0, 0.06)];
    let more = if weights.differ() { CUTS.as_slice() } else { &[] };
    // without weights an offset above zero may win, and files that exist rely on the bits that come of it
    let most = if below_zero && weights.differ() { 0.0 } else { f32::INFINITY };
    for (below, above) in cuts.iter().chain(more) {
        let mut candidate = (span * (1.0 - below - above) / highest, least + span * below);
        for _ in 0..3 {
            let (d, m) = (store(candidate.0), store(candidate.1.min(most)));
            let fit = fit_affine(values, weights, d, m, highest);
            if fit.error < best.0 {
                best = (fit.error, d, m);
            }
            candidate = fit.refined(below_zero);
        }
    }
    (best.1, best.2)
}

/// The shares of the span that are left out below and above where values differ in weight.
const CUTS: [(f32, f32); 4] = [(0.15, 0.15), (0.25, 0.25), (0.3, 0.0), (0.0, 0.3)];

/// A candidate's squared error, and the sums from which the best scale and offset for its codes follow.
struct AffineFit {
    error: f32,
    codes: f32,
    squares: f32,
    products: f32,
    values: f32,
    count: f32,
    at: f32,
}

impl AffineFit {
    fn refined(&self, below_zero: bool) -> (f32, f32) {
        let d = self.at;
        let determinant = self.count * self.squares - self.codes * self.codes;
        // of whole numbers it is none or more; of products with weights, what rounding leaves of none is far below
        if determinant <= 1e-5 * self.count * self.squares {
            return (d, self.values / self.count - d * self.codes / self.count); // one code for all: the offset follows
        }
        let refined = (self.count * self.products - self.codes * self.values) / determinant;
        let offset = (self.values - refined * self.codes) / self.count;
        if below_zero && offset > 0.0 {
            return (if self.squares > 0.0 { self.products / self.squares } else { d }, 0.0);
        }
        (refined, offset)
    }
}

fn fit_affine<const N: usize>(values: &[f32; N], weights: impl Weights, d: f32, m: f32, highest: f32) -> AffineFit {
    let inverse = inverse(d);
    let mut sums = [[0.0f32; 8]; 5];
    for (values, weights) in values.as_chunks::<8>().0.iter().zip(weights.eights()) {
        for lane in 0..8 {
            let (value, weight) = (values[lane], weights[lane]);
            let code = nearest(((value - m) * inverse).clamp(0.0, highest));
            let difference = value - (d * code + m);
            sums[0][lane] += weight * difference * difference;
            sums[1][lane] += weight * code;
            sums[2][lane] += weight * code * code;
            sums[3][lane] += weight * value * code;
            sums[4][lane] += weight * value;
        }
    }
    let [error, codes, squares, products, values] = sums.map(|lanes| lanes.iter().sum());
    AffineFit { error, codes, squares, products, values, count: weights.total(N), at: d }
}

/// The codes of the values under scale d and offset m.
pub(super) fn affine_codes<const N: usize>(values: &[f32; N], d: f32, m: f32, highest: f32) -> [u8; N] {
    let inverse = inverse(d);
    values.map(|value| nearest(((value - m) * inverse).clamp(0.0, highest)) as u8)
}

/// 1 / d, and 0 for 0.
pub(super) fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The value with the greatest magnitude, with its sign; the first of equal ones.
pub(super) fn signed_extreme(values: &[f32]) -> f32 {
    values.iter().copied().fold(0.0f32, |extreme, value| if value.abs() > extreme.abs() { value } else { extreme })
}
