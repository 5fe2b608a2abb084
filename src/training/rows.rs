//! What happens to a row between products, in one pass, compiled for the machine that runs it.

#[cfg(target_arch = "x86_64")]
use crate::quant::matmul::Path;

use std::ops::Range;

use crate::decoder::math::{dispatched, exp, inverse_root};

dispatched! {
    /// Scores p of a block to exponentials, of those in `own`, and 0 of the others before `end`; what a row has summed up
    /// so far is scaled to the larger of its largest score and theirs.
    shares(p: &mut [f32], own: Range<usize>, end: usize, largest: &mut f32, total: &mut f32, sums: &mut [f32]) {
        let end = end.next_multiple_of(16).min(p.len());
        if own.is_empty() {
            p[..end].fill(0.0);
            return;
        }
        p[..own.start].fill(f32::NEG_INFINITY);
        p[own.end..end.max(own.end)].fill(f32::NEG_INFINITY);
        let (whole, _) = p[..end].as_chunks_mut::<16>();
        let mut most = [f32::NEG_INFINITY; 16];
        for p in &*whole {
            for lane in 0..16 {
                most[lane] = if p[lane] > most[lane] { p[lane] } else { most[lane] };
            }
        }
        let most = most.iter().copied().fold(*largest, f32::max);
        if most > *largest {
            let factor = exp(*largest - most);
            *total *= factor;
            sums.iter_mut().for_each(|sum| *sum *= factor);
            *largest = most;
        }
        let mut lanes = [0.0f32; 16];
        for p in whole {
            for lane in 0..16 {
                p[lane] = if p[lane] == f32::NEG_INFINITY { 0.0 } else { exp(p[lane] - most) };
                lanes[lane] += p[lane];
            }
        }
        *total += lanes.iter().sum::<f32>();
    }
}

dispatched! {
    /// Scores p and products e of a row with a block to p and e of the file's equations; 0 outside of `own`.
    slopes(p: &mut [f32], e: &mut [f32], own: Range<usize>, m: f32, delta: f32, scale: f32) {
        for (place, (p, e)) in p.iter_mut().zip(e).enumerate() {
            let share = if place >= own.start && place < own.end { exp(*p - m) } else { 0.0 };
            let slope = if place >= own.start && place < own.end { scale * share * (*e - delta) } else { 0.0 };
            (*p, *e) = (share, slope);
        }
    }
}

dispatched! {
    /// x times a factor.
    weigh(x: &mut [f32], factor: f32) {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

dispatched! {
    /// n = x r,  r = 1 / √(mean(x²) + ε), for each row of x `[rows, width]`; r is kept.
    normalize(x: &[f32], width: usize, epsilon: f32, n: &mut [f32], roots: &mut [f32]) {
        for ((x, n), root) in x.chunks_exact(width.max(1)).zip(n.chunks_exact_mut(width.max(1))).zip(roots) {
            *root = inverse_root(x, epsilon);
            for (n, x) in n.iter_mut().zip(x) {
                *n = x * *root;
            }
        }
    }
}

dispatched! {
    /// weight ⊙ x for each row of x.
    weigh_rows(weight: &[f32], x: &mut [f32]) {
        for x in x.chunks_exact_mut(weight.len().max(1)) {
            x.iter_mut().zip(weight).for_each(|(x, weight)| *x *= weight);
        }
    }
}

dispatched! {
    /// dx = r (g − n mean(g n)) with g = weight ⊙ dy and n = x r, for each row.
    rms_norm_back(dy: &[f32], x: &[f32], weight: &[f32], roots: &[f32], dx: &mut [f32]) {
        let width = weight.len().max(1);
        let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width)).zip(roots);
        for (((dy, x), dx), &root) in rows {
            let mut lanes = [0.0f32; 16];
            let ((dys, dy_rest), (xs, x_rest)) = (dy.as_chunks::<16>(), x.as_chunks::<16>());
            let (weights, weight_rest) = weight.as_chunks::<16>();
            for ((dy, x), weight) in dys.iter().zip(xs).zip(weights) {
                for lane in 0..16 {
                    lanes[lane] += weight[lane] * dy[lane] * x[lane];
                }
            }
            let rest: f32 = dy_rest.iter().zip(x_rest).zip(weight_rest).map(|((dy, x), weight)| weight * dy * x).sum();
            let along = (lanes.iter().sum::<f32>() + rest) * root * root / width as f32;
            for (((dx, dy), x), weight) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                *dx = root * (weight * dy - x * along);
            }
        }
    }
}

dispatched! {
    /// silu(gate) ⊙ up.
    swiglu(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

dispatched! {
    /// With σ = 1 / (1 + exp(−gate)): dgate = dy up σ (1 + gate (1 − σ)), dup = dy gate σ.
    swiglu_back(dy: &[f32], gate: &[f32], up: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        for ((((dgate, dup), dy), gate), up) in dgate.iter_mut().zip(dup).zip(dy).zip(gate).zip(up) {
            let share = 1.0 / (1.0 + exp(-gate));
            *dgate = dy * up * share * (1.0 + gate * (1.0 - share));
            *dup = dy * gate * share;
        }
    }
}

dispatched! {
    /// Each head of each token [a, b] to [a cos − b sin, b cos + a sin]; the other way round with `back`.
    rotate(x: &[f32], heads: usize, cos: &[f32], sin: &[f32], back: bool, half: usize, y: &mut [f32]) {
        if heads * half == 0 {
            return;
        }
        let width = 2 * heads * half;
        let tokens = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
        for ((x, y), (cos, sin)) in tokens.zip(cos.chunks_exact(half).zip(sin.chunks_exact(half))) {
            for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
                let ((a, b), (left, right)) = (x.split_at(half), y.split_at_mut(half));
                for i in 0..half {
                    let sin = if back { -sin[i] } else { sin[i] };
                    left[i] = a[i] * cos[i] - b[i] * sin;
                    right[i] = b[i] * cos[i] + a[i] * sin;
                }
            }
        }
    }
}

dispatched! {
    /// The largest of a row, and log Σ exp(x − largest): sums of 1,024 in float32, those in float64.
    log_total(x: &[f32], found: &mut (f32, f32)) {
        let mut most = [f32::NEG_INFINITY; 16];
        let (whole, rest) = x.as_chunks::<16>();
        for x in whole {
            for lane in 0..16 {
                most[lane] = if x[lane] > most[lane] { x[lane] } else { most[lane] };
            }
        }
        let most = most.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
        let mut total: f64 = rest.iter().map(|x| f64::from(exp(x - most))).sum();
        for part in whole.chunks(64) {
            let mut lanes = [0.0f32; 16];
            for x in part {
                for lane in 0..16 {
                    lanes[lane] += exp(x[lane] - most);
                }
            }
            total += f64::from(lanes.iter().sum::<f32>());
        }
        *found = (most, total.ln() as f32);
    }
}

dispatched! {
    /// The shares of a row, by what [`log_total`] found.
    softmax(x: &[f32], total: (f32, f32), y: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = exp((x - total.0) - total.1));
    }
}
