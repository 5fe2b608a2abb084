//! Two levels of scales: groups of a block have small integers as scales, the block has the number they are multiples of.
//!
//! Each group's own best scale comes first; the block's follows from the greatest; then, twice over, each group's integer is
//! chosen among the neighbours of the rounded one, and the block's number is fitted to all codes at once by least squares.
//! A step is only kept when the error falls.

use half::f16;

use super::search::{self, Codes, half, inverse, nearest};
use super::weights::Weights;

/// Values in a block.
const BLOCK: usize = 256;

/// Codes, scales and the block's number of x = (d s) q.
pub(super) struct Symmetric<const GROUPS: usize> {
    /// The block's number.
    pub d: f16,
    /// The groups' integers.
    pub scales: [i8; GROUPS],
    /// The codes.
    pub codes: [i8; BLOCK],
}

/// The best x ≈ (d s) q with s in `lowest_scale..=-lowest_scale - 1`; `ends` are the outermost codes.
pub(super) fn symmetric<C: Codes, const GROUPS: usize, const SIZE: usize>(
    values: &[f32; BLOCK],
    weights: impl Weights,
    lowest_scale: f32,
    ends: (f32, f32),
) -> Symmetric<GROUPS> {
    let groups = values.as_chunks::<SIZE>().0;
    let weights: [_; GROUPS] = std::array::from_fn(|group| weights.part(group * SIZE, SIZE));
    let wanted: [f32; GROUPS] = std::array::from_fn(|group| {
        let extreme = search::signed_extreme(&groups[group]);
        let starts = [ends.0, ends.0 * 0.9, ends.0 * 1.08, ends.1, ends.1 * 1.08].map(|end| extreme / end);
        search::symmetric::<C, _, _>(&groups[group], weights[group], starts, |d| d)
    });
    let mut best = (f32::INFINITY, 0.0, [0.0; GROUPS]);
    let mut d = half(search::signed_extreme(&wanted) / lowest_scale);
    for _ in 0..3 {
        let inverse = inverse(d);
        let (mut error, mut products, mut squares) = (0.0, 0.0, 0.0);
        let scales: [f32; GROUPS] = std::array::from_fn(|group| {
            let middle = nearest((wanted[group] * inverse).clamp(lowest_scale, -lowest_scale - 1.0));
            let tried = [middle, middle - 1.0, middle + 1.0]
                .map(|scale| scale.clamp(lowest_scale, -lowest_scale - 1.0))
                .map(|scale| (scale, search::fit::<C, SIZE>(&groups[group], weights[group], d * scale)));
            let [first, others @ ..] = tried;
            let (scale, fit) = others.into_iter().fold(first, |a, b| if b.1.error < a.1.error { b } else { a });
            error += fit.error;
            products += scale * fit.products;
            squares += scale * scale * fit.squares;
            scale
        });
        if error < best.0 {
            best = (error, d, scales);
        }
        if squares > 0.0 {
            d = half(products / squares);
        }
    }
    let (_, d, scales) = best;
    let mut codes = [0; BLOCK];
    for ((codes, values), scale) in codes.as_chunks_mut::<SIZE>().0.iter_mut().zip(groups).zip(scales) {
        *codes = search::codes::<C, SIZE>(values, d * scale);
    }
    Symmetric { d: f16::from_f32(d), scales: scales.map(|scale| scale as i8), codes }
}

/// Codes, scales, offsets and the block's numbers of x = (d s) q − (d' m).
pub(super) struct Affine<const GROUPS: usize> {
    /// The number of which scales are multiples.
    pub d: f16,
    /// The number of which offsets are multiples.
    pub d_offset: f16,
    /// The groups' scales.
    pub scales: [u8; GROUPS],
    /// The groups' offsets.
    pub offsets: [u8; GROUPS],
    /// The codes.
    pub codes: [u8; BLOCK],
}

/// The sums of a group's candidate that decide between candidates and refit the block's numbers.
#[derive(Clone, Copy)]
struct Sums {
    error: f32,
    codes: f32,
    squares: f32,
    products: f32,
}

/// The best x ≈ (d s) q − (d' m) with s and m in `0..=highest_scale` and q in `0..=highest`.
pub(super) fn affine<const GROUPS: usize, const SIZE: usize>(
    values: &[f32; BLOCK],
    weights: impl Weights,
    highest_scale: f32,
    highest: f32,
) -> Affine<GROUPS> {
    let groups = values.as_chunks::<SIZE>().0;
    let weights: [_; GROUPS] = std::array::from_fn(|group| weights.part(group * SIZE, SIZE));
    let wanted: [(f32, f32); GROUPS] = std::array::from_fn(|group| {
        let (d, m) = search::affine(&groups[group], weights[group], highest, true, |d| d);
        (d.max(0.0), (-m).max(0.0))
    });
    let totals: [f32; GROUPS] = std::array::from_fn(|group| total(&groups[group], weights[group]));
    let greatest = wanted.iter().fold((0.0f32, 0.0f32), |most, group| (most.0.max(group.0), most.1.max(group.1)));
    let (mut d, mut d_offset) = (half(greatest.0 / highest_scale), half(greatest.1 / highest_scale));
    let mut best = (f32::INFINITY, (0.0, 0.0), [(0.0, 0.0); GROUPS]);
    for _ in 0..3 {
        let (inverse, inverse_offset) = (inverse(d), inverse(d_offset));
        // the normal equations of x ≈ d (s q) − d' m over the whole block
        let (mut error, mut ss, mut sm, mut mm, mut xs, mut xm) = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
        let chosen: [(f32, f32); GROUPS] = std::array::from_fn(|group| {
            let scale = nearest((wanted[group].0 * inverse).min(highest_scale));
            let offset = nearest((wanted[group].1 * inverse_offset).min(highest_scale));
            let mut best: Option<((f32, f32), Sums)> = None;
            for (step, offset_step) in STEPS {
                let tried =
                    ((scale + step).clamp(0.0, highest_scale), (offset + offset_step).clamp(0.0, highest_scale));
                let sums = sums(&groups[group], weights[group], d * tried.0, d_offset * tried.1, highest);
                if best.is_none_or(|(_, other)| sums.error < other.error) {
                    best = Some((tried, sums));
                }
            }
            let Some(((scale, offset), sums)) = best else { return (scale, offset) };
            error += sums.error;
            ss += scale * scale * sums.squares;
            sm += scale * offset * sums.codes;
            mm += offset * offset * weights[group].total(SIZE);
            xs += scale * sums.products;
            xm += offset * totals[group];
            (scale, offset)
        });
        if error < best.0 {
            best = (error, (d, d_offset), chosen);
        }
        let determinant = ss * mm - sm * sm;
        if determinant > 0.0 {
            // d ss − d' sm = xs and d sm − d' mm = xm
            d = half(((xs * mm - xm * sm) / determinant).max(0.0));
            d_offset = half(((xs * sm - xm * ss) / determinant).max(0.0));
        } else if ss > 0.0 {
            d = half((xs / ss).max(0.0));
        }
    }
    let (_, (d, d_offset), chosen) = best;
    let mut codes = [0; BLOCK];
    for ((codes, values), (scale, offset)) in codes.as_chunks_mut::<SIZE>().0.iter_mut().zip(groups).zip(chosen) {
        *codes = search::affine_codes(values, d * scale, -(d_offset * offset), highest);
    }
    Affine {
        d: f16::from_f32(d),
        d_offset: f16::from_f32(d_offset),
        scales: chosen.map(|(scale, _)| scale as u8),
        offsets: chosen.map(|(_, offset)| offset as u8),
        codes,
    }
}

/// The neighbours of a rounded (scale, offset) that are tried.
const STEPS: [(f32, f32); 9] =
    [(0.0, 0.0), (0.0, -1.0), (0.0, 1.0), (-1.0, 0.0), (1.0, 0.0), (-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)];

/// Σ w x.
fn total<const SIZE: usize>(values: &[f32; SIZE], weights: impl Weights) -> f32 {
    values.iter().zip(weights.eights().flatten()).map(|(value, weight)| weight * value).sum()
}

fn sums<const SIZE: usize>(values: &[f32; SIZE], weights: impl Weights, d: f32, offset: f32, highest: f32) -> Sums {
    let inverse = inverse(d);
    let mut sums = [[0.0f32; 8]; 4];
    for (values, weights) in values.as_chunks::<8>().0.iter().zip(weights.eights()) {
        for lane in 0..8 {
            let (value, weight) = (values[lane], weights[lane]);
            let code = nearest(((value + offset) * inverse).clamp(0.0, highest));
            let difference = value - (d * code - offset);
            sums[0][lane] += weight * difference * difference;
            sums[1][lane] += weight * code;
            sums[2][lane] += weight * code * code;
            sums[3][lane] += weight * value * code;
        }
    }
    let [error, codes, squares, products] = sums.map(|lanes| lanes.iter().sum());
    Sums { error, codes, squares, products }
}
