//! What happens to a row between the products, compiled for the machine that runs it.

use super::kept::BLOCK;
#[cfg(target_arch = "x86_64")]
use crate::quant::matmul::Path;

/// Compiles a function for each kind of processor as well, and calls the best; the arithmetic is the same.
macro_rules! dispatched {
    ($(#[$doc:meta])* $name:ident($($arg:ident: $kind:ty),*) $body:block) => {
        $(#[$doc])*
        pub(super) fn $name($($arg: $kind),*) {
            #[inline(always)]
            fn body($($arg: $kind),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $kind),*) {
                    body($($arg),*);
                }
                if Path::best() == Path::Avx512 {
                    // SAFETY: the machine has the features, as the path says.
                    return unsafe { avx512($($arg),*) };
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $kind),*) {
                    body($($arg),*);
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the machine has the features, as was just asked.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*);
        }
    };
}

pub(crate) use dispatched;

dispatched! {
    /// y = weight ⊙ x / √(mean(x²) + ε) for each row of x `[T, d]`.
    rms_norm(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32]) {
        for (x, y) in x.chunks_exact(weight.len().max(1)).zip(y.chunks_exact_mut(weight.len().max(1))) {
            let scale = inverse_root(x, epsilon);
            for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                *y = weight * (x * scale);
            }
        }
    }
}

dispatched! {
    /// The same for each head of one row, in place.
    norm_heads(heads: &mut [f32], weight: &[f32], epsilon: f32) {
        for head in heads.chunks_exact_mut(weight.len().max(1)) {
            let scale = inverse_root(head, epsilon);
            for (x, weight) in head.iter_mut().zip(weight) {
                *x = weight * (*x * scale);
            }
        }
    }
}

dispatched! {
    /// Codes of 8 bits and their scales, as [`super::kept`] describes them.
    encode(numbers: &[f32], place: &mut [u8]) {
        let (codes, scales) = place.split_at_mut(numbers.len());
        let blocks = numbers.chunks(BLOCK).zip(codes.chunks_mut(BLOCK));
        for ((numbers, codes), place) in blocks.zip(scales.as_chunks_mut::<4>().0) {
            let mut bits = 0;
            for number in numbers {
                // as whole numbers, so that what is infinite or none is the largest
                bits = bits.max(number.to_bits() & 0x7fff_ffff);
            }
            let largest = f32::from_bits(bits);
            let scale = if largest < f32::INFINITY { largest / 127.0 } else { f32::NAN };
            let divisor = if scale == 0.0 { 1.0 } else { scale };
            for (code, number) in codes.iter_mut().zip(numbers) {
                *code = (number / divisor).round_ties_even() as i8 as u8;
            }
            *place = scale.to_le_bytes();
        }
    }
}

dispatched! {
    /// The numbers of such records, one after the other.
    decode(records: &[&[u8]], dim: usize, numbers: &mut [f32]) {
        for (record, numbers) in records.iter().zip(numbers.chunks_exact_mut(dim)) {
            let (codes, scales) = record.split_at(dim);
            let blocks = numbers.chunks_mut(BLOCK).zip(codes.chunks(BLOCK));
            for ((numbers, codes), scale) in blocks.zip(scales.as_chunks::<4>().0) {
                let scale = f32::from_le_bytes(*scale);
                for (number, code) in numbers.iter_mut().zip(codes) {
                    *number = scale * f32::from(*code as i8);
                }
            }
        }
    }
}

#[inline(always)]
pub(crate) fn inverse_root(x: &[f32], epsilon: f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (whole, rest) = x.as_chunks::<16>();
    for x in whole {
        for lane in 0..16 {
            lanes[lane] += x[lane] * x[lane];
        }
    }
    let sum = lanes.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
    1.0 / (sum / x.len() as f32 + epsilon).sqrt()
}

dispatched! {
    /// Rotary embedding of each head of one row, by halves.
    rotate(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
        for head in heads.chunks_exact_mut(head_dim.max(1)) {
            let (a, b) = head.split_at_mut(head_dim / 2);
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

dispatched! {
    /// silu(gate) ⊙ up for one row, gate and up side by side.
    swiglu(gate_up: &[f32], y: &mut [f32]) {
        let (gate, up) = gate_up.split_at(gate_up.len() / 2);
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

dispatched! {
    /// Scores of one query to shares that add up to 1, in place.
    softmax(scores: &mut [f32]) {
        let mut largest = [f32::NEG_INFINITY; 16]; // NaN is passed over here, and comes back by its exponential
        let (whole, rest) = scores.as_chunks::<16>();
        for scores in whole {
            for lane in 0..16 {
                largest[lane] = if scores[lane] > largest[lane] { scores[lane] } else { largest[lane] };
            }
        }
        let largest = largest.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
        let mut lanes = [0.0f32; 16];
        let (whole, rest) = scores.as_chunks_mut::<16>();
        for scores in whole {
            for lane in 0..16 {
                scores[lane] = exp(scores[lane] - largest);
                lanes[lane] += scores[lane];
            }
        }
        let mut sum = lanes.iter().sum::<f32>();
        // all lanes at once; what is in those without a score is not looked at
        let mut last = [0.0f32; 16];
        last[..rest.len()].copy_from_slice(rest);
        last.iter_mut().for_each(|score| *score = exp(*score - largest));
        for (score, last) in rest.iter_mut().zip(last) {
            *score = last;
            sum += last;
        }
        let inverse = 1.0 / sum;
        scores.iter_mut().for_each(|score| *score *= inverse);
    }
}

/// eˣ within 2 units in the last place, without branches, so that it vectorizes; 0 below −87.3, ∞ never below 88.3.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2; eʳ by its Taylor polynomial of degree 7, 2ⁿ by the exponent's bits in two halves.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(-104.0, 89.0);
    // adding 1.5 · 2²³ rounds to a whole number, which then stands in the low bits; casts would not vectorize
    let shifted = x.mul_add(std::f32::consts::LOG2_E, 12_582_912.0);
    let (n, whole) = (shifted - 12_582_912.0, shifted.to_bits() as i32 - 12_582_912f32.to_bits() as i32);
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x)); // ln 2 in two parts, the first exact in few bits
    let mut sum: f32 = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum.mul_add(r, factor);
    }
    // |n| ≤ 151, so both halves are exponents of normal numbers
    let half = whole >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    sum * power(half) * power(whole.wrapping_sub(half))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_within_two_units() {
        for step in -1_040_000..890_000 {
            let x = step as f32 * 1e-4;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            // below the normal numbers a unit is 2⁻¹⁴⁹
            let unit = (expected * f64::from(f32::EPSILON)).max(2f64.powi(-149));
            assert!(
                (found - expected).abs() <= 2.0 * unit || expected > f64::from(f32::MAX),
                "{x}: {found} {expected}"
            );
        }
        assert_eq!(exp(f32::NEG_INFINITY), exp(-104.0));
        assert!(exp(f32::NAN).is_nan());
    }
}
