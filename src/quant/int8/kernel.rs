//! A tile of 16 rows with all rows of x, on each kind of processor, equal to the bit.

#[cfg(target_arch = "x86_64")]
mod x86;

use super::{IntegerForm, Rounded, STEP, TILE};
use crate::quant::scales::wide;
use crate::team::{Shared, Team};

/// Which instructions are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// What every processor has; the reference.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

/// x as the kernels take it, for matrices of one format.
pub(super) struct Inputs<'a> {
    /// a `[count, columns]`.
    codes: &'a [i8],
    /// s `[count, columns / 32]`.
    scales: &'a [f32],
    /// −z Σ a `[count, columns / group]`.
    starts: Vec<i32>,
    /// s Σ a `[count, columns / group]`; empty without offsets.
    sums: Vec<f32>,
}

impl<'a> Inputs<'a> {
    pub(super) fn new(team: &Team, rounded: &'a Rounded, integers: &IntegerForm) -> Self {
        let (parts, groups) = (integers.group / 16, integers.groups());
        let count = rounded.sums.len() / parts;
        let mut starts = vec![0; count];
        let mut sums = vec![0.0; if integers.offsets { count } else { 0 }];
        let (all_starts, all_sums) = (Shared::new(&mut starts), Shared::new(&mut sums));
        let run = count.div_ceil(team.tasks(count, 1 << 13));
        team.each(count.div_ceil(run.max(1)), &|task| {
            let places = task * run..count.min((task + 1) * run);
            // SAFETY: each place is one task's.
            let starts = unsafe { all_starts.part(places.clone()) };
            let found = rounded.sums[places.start * parts..].chunks_exact(parts).map(|sums| sums.iter().sum::<i32>());
            starts.iter_mut().zip(found).for_each(|(start, sum)| *start = sum);
            if integers.offsets {
                // SAFETY: as above.
                let sums = unsafe { all_sums.part(places.clone()) };
                for ((weighted, sum), place) in sums.iter_mut().zip(&*starts).zip(places) {
                    *weighted = rounded.scales[place / groups] * *sum as f32;
                }
            }
            starts.iter_mut().for_each(|start| *start *= -i32::from(integers.zero));
        });
        Self { codes: &rounded.codes, scales: &rounded.scales, starts, sums }
    }
}

impl Path {
    /// All that this machine has, the best last.
    pub fn all() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                found.push(Self::Avx2);
                let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
                if wide && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512vnni") {
                    found.push(Self::Vnni);
                }
            }
        }
        found
    }

    /// The best that this machine has.
    pub fn best() -> Self {
        static BEST: std::sync::OnceLock<Path> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Self::all().pop().unwrap_or(Self::Portable))
    }

    /// Calls `write` with each row of x and its 16 products.
    pub(super) fn product(
        self,
        integers: &IntegerForm,
        tile: &[u8],
        inputs: &Inputs<'_>,
        columns: usize,
        mut write: impl FnMut(usize, &[f32; TILE]),
    ) {
        let (count, steps) = (inputs.codes.len() / columns, columns / STEP);
        let groups = integers.groups();
        assert!(tile.len() == steps * integers.step_bytes() && inputs.scales.len() == count * steps);
        assert!(inputs.codes.len() == count * columns && inputs.starts.len() == count * steps * groups);
        assert!(!integers.offsets || inputs.sums.len() == inputs.starts.len());
        let mut first = 0;
        while first < count {
            let most = if self == Self::Portable { 1 } else { count - first };
            let mut found = [[0.0; TILE]; 8];
            let rows = match most {
                0 | 1 => 1,
                2..=4 => most,
                _ => most.min(8),
            };
            // where there are fewer rows than a kernel takes, the last one fills the rest
            let row = |t: usize| first + t.min(rows - 1);
            match self {
                Self::Portable => portable(integers, tile, inputs, columns, first, &mut found[0]),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the machine has the features (`all`), lengths were checked, rows are below `count`.
                Self::Avx2 | Self::Vnni => unsafe {
                    let vnni = self == Self::Vnni;
                    match rows {
                        1 => x86::rows::<1>(vnni, integers, tile, inputs, columns, row, &mut found),
                        2..=4 => x86::rows::<4>(vnni, integers, tile, inputs, columns, row, &mut found),
                        _ => x86::rows::<8>(vnni, integers, tile, inputs, columns, row, &mut found),
                    }
                },
            }
            found[..rows].iter().enumerate().for_each(|(t, found)| write(first + t, found));
            first += rows;
        }
    }
}

fn portable(integers: &IntegerForm, tile: &[u8], inputs: &Inputs<'_>, columns: usize, t: usize, out: &mut [f32; TILE]) {
    let (groups, head) = (integers.groups(), integers.head_bytes());
    let number = |step: &[u8], index: usize| {
        if integers.half {
            wide(u16::from_le_bytes([step[2 * index], step[2 * index + 1]]))
        } else {
            f32::from_le_bytes([step[4 * index], step[4 * index + 1], step[4 * index + 2], step[4 * index + 3]])
        }
    };
    for (index, step) in tile.chunks_exact(integers.step_bytes()).enumerate() {
        let x = &inputs.codes[t * columns + index * STEP..][..STEP];
        let scale = inputs.scales[t * (columns / STEP) + index];
        for group in 0..groups {
            let at = (t * (columns / STEP) + index) * groups + group;
            for (r, out) in out.iter_mut().enumerate() {
                let mut sum = inputs.starts[at];
                for k in group * integers.group..(group + 1) * integers.group {
                    let code = if integers.narrow {
                        step[head + k % 16 / 4 * 64 + r * 4 + k % 4] >> (k / 16 * 4) & 0x0f
                    } else {
                        step[head + k / 4 * 64 + r * 4 + k % 4]
                    };
                    sum += i32::from(code) * i32::from(x[k]);
                }
                *out = (number(step, group * TILE + r) * scale).mul_add(sum as f32, *out);
                if integers.offsets {
                    *out = number(step, (groups + group) * TILE + r).mul_add(inputs.sums[at], *out);
                }
            }
        }
    }
}

/// 32 values in 8 bits: a, s, and Σ a over each half.
#[inline]
pub(super) fn round(x: &[f32; STEP]) -> ([i8; STEP], f32, [i32; 2]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has the feature.
        return unsafe { x86::round(x) };
    }
    round_portable(x)
}

/// 127 / `largest`, and `largest` / 127; the first is 0 where there is nothing to round.
#[inline]
fn scales(largest: f32, nan: bool) -> (f32, f32) {
    match largest {
        _ if nan => (0.0, f32::NAN),
        f32::INFINITY => (0.0, f32::NAN),
        // what is smaller than any activation that matters is 0; its inverse would be infinite
        _ if largest <= 1e-30 => (0.0, 0.0),
        _ => (127.0 / largest, largest / 127.0),
    }
}

pub(super) fn round_portable(x: &[f32; STEP]) -> ([i8; STEP], f32, [i32; 2]) {
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let (inverse, scale) = scales(largest, x.iter().any(|x| x.is_nan()));
    if inverse == 0.0 {
        return ([0; STEP], scale, [0; 2]);
    }
    let codes = x.map(|x| (x * inverse).round_ties_even() as i8);
    let (low, high) = codes.split_at(STEP / 2);
    let sum = |codes: &[i8]| codes.iter().map(|&code| i32::from(code)).sum();
    (codes, scale, [sum(low), sum(high)])
}
