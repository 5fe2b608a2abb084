//! The search for a block's scale: the least squared error over a few starting points, each refined by least squares.
//!
//! The first starting point is that of llama.cpp's reference quantizer, codes are the nearest ones under the scale as it
//! will be stored, and the best candidate is taken: so no block is worse than the reference's.
//!
//! The shape of each loop is chosen so that it vectorizes on the baseline of the architecture; sums over a block are taken
//! in one fixed order.

use half::f16;

/// Values in a block of the formats that search.
const BLOCK: usize = 32;

/// Adding and subtracting 1.5 · 2²³ rounds to the nearest integer, ties to even, where |x| < 2²².
const ROUND: f32 = 12_582_912.0;

fn nearest(value: f32) -> f32 {
    (value + ROUND) - ROUND
}

/// The scale d and codes q in `lowest..=highest` with w ≈ d q.
///
/// `extreme` is the value that `lowest` encodes at the first starting point; the others give it the codes
/// `lowest + shift` for each of `shifts` (beyond `lowest` it is clipped, so that the others have finer steps).
pub(super) fn symmetric(
    values: &[f32; BLOCK],
    extreme: f32,
    lowest: i8,
    highest: i8,
    shifts: &[f32],
) -> (f16, [i8; BLOCK]) {
    let (lowest, highest) = (f32::from(lowest), f32::from(highest));
    let mut best = (f32::INFINITY, f16::ZERO);
    let mut consider = |d: f32| -> f32 {
        let stored = f16::from_f32(d);
        let fit = fit_symmetric(values, stored.to_f32(), lowest, highest);
        if fit.error < best.0 {
            best = (fit.error, stored);
        }
        fit.refined
    };
    if extreme != 0.0 {
        let mut refined = consider(extreme / lowest);
        for _ in 0..2 {
            refined = consider(refined);
        }
        for shift in shifts {
            let refined = consider(extreme / (lowest + shift));
            consider(refined);
        }
    }
    let inverse = inverse(best.1.to_f32());
    (best.1, values.map(|value| nearest((value * inverse).clamp(lowest, highest)) as i8))
}

struct Fit {
    error: f32,
    /// The best scale for these codes.
    refined: f32,
}

fn fit_symmetric(values: &[f32; BLOCK], d: f32, lowest: f32, highest: f32) -> Fit {
    let inverse = inverse(d);
    let (mut error, mut products, mut squares) = ([0.0f32; 8], [0.0f32; 8], [0.0f32; 8]);
    for values in values.as_chunks::<8>().0 {
        for lane in 0..8 {
            let code = nearest((values[lane] * inverse).clamp(lowest, highest));
            let difference = values[lane] - d * code;
            error[lane] += difference * difference;
            products[lane] += values[lane] * code;
            squares[lane] += code * code;
        }
    }
    let squares: f32 = squares.iter().sum();
    let refined = if squares > 0.0 { products.iter().sum::<f32>() / squares } else { 0.0 };
    Fit { error: error.iter().sum(), refined }
}

/// The scale d, offset m and codes q in `0..=highest` with w ≈ d q + m.
///
/// The first starting point spans from the least to the greatest value; the others leave out a share of the span at both
/// ends, or only at one.
pub(super) fn affine(values: &[f32; BLOCK], highest: u8) -> (f16, f16, [u8; BLOCK]) {
    let highest = f32::from(highest);
    let least = values.iter().copied().fold(f32::INFINITY, f32::min);
    let span = values.iter().copied().fold(f32::NEG_INFINITY, f32::max) - least;
    let mut best = (f32::INFINITY, f16::ZERO, f16::from_f32(least));
    let mut consider = |d: f32, m: f32| -> (f32, f32) {
        let stored = (f16::from_f32(d), f16::from_f32(m));
        let (error, refined) = fit_affine(values, stored.0.to_f32(), stored.1.to_f32(), highest);
        if error < best.0 {
            best = (error, stored.0, stored.1);
        }
        refined
    };
    let mut refined = consider(span / highest, least);
    for _ in 0..2 {
        refined = consider(refined.0, refined.1);
    }
    for (below, above) in [(0.03, 0.03), (0.07, 0.07), (0.06, 0.0), (0.0, 0.06)] {
        let mut refined = consider(span * (1.0 - below - above) / highest, least + span * below);
        for _ in 0..2 {
            refined = consider(refined.0, refined.1);
        }
    }
    let (d, m) = (best.1.to_f32(), best.2.to_f32());
    let inverse = inverse(d);
    (best.1, best.2, values.map(|value| nearest(((value - m) * inverse).clamp(0.0, highest)) as u8))
}

/// The squared error under (d, m), and the best (d, m) for the codes found there.
fn fit_affine(values: &[f32; BLOCK], d: f32, m: f32, highest: f32) -> (f32, (f32, f32)) {
    let inverse = inverse(d);
    let mut sums = [[0.0f32; 8]; 4]; // of squared errors, codes, squared codes, offsets from m times codes
    let mut offsets = [0.0f32; 8];
    for values in values.as_chunks::<8>().0 {
        for lane in 0..8 {
            let value = values[lane];
            let code = nearest(((value - m) * inverse).clamp(0.0, highest));
            let difference = value - (d * code + m);
            sums[0][lane] += difference * difference;
            sums[1][lane] += code;
            sums[2][lane] += code * code;
            sums[3][lane] += (value - m) * code;
            offsets[lane] += value - m;
        }
    }
    let [error, codes, squares, products] = sums.map(|lanes| lanes.iter().sum::<f32>());
    let offset = offsets.iter().sum::<f32>();
    let count = BLOCK as f32;
    let determinant = count * squares - codes * codes;
    if determinant <= 0.0 {
        return (error, (d, m + offset / count)); // one code for all: only the offset can follow
    }
    let refined = (count * products - codes * offset) / determinant;
    (error, (refined, m + (offset - refined * codes) / count))
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The value with the greatest magnitude, with its sign; the first of equal ones.
pub(super) fn signed_extreme(values: &[f32; BLOCK]) -> f32 {
    values.iter().copied().fold(0.0f32, |extreme, value| if value.abs() > extreme.abs() { value } else { extreme })
}
