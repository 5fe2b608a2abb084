//! A tile of 16 rows with all rows of x, on each kind of processor, equal to the bit.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::{HIGH, IntegerForm, PLANE, ROWS, Rounded, STEP, TILE};
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
    /// Tiles of AMX for many rows, VNNI for few.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

/// x as the kernels take it, for matrices of one format; in panels, as [`Rounded`] is.
pub(super) struct Inputs<'a> {
    rounded: &'a Rounded,
    /// −z Σ a `[panels, steps, groups, high]`.
    starts: Vec<i32>,
    /// s Σ a `[panels, steps, groups, high]`; empty without offsets.
    sums: Vec<f32>,
}

impl<'a> Inputs<'a> {
    pub(super) fn new(team: &Team, rounded: &'a Rounded, integers: &IntegerForm) -> Self {
        let high = rounded.high;
        let size = integers.groups() * high;
        let places = rounded.scales.len() / high;
        let mut starts = vec![0; places * size];
        let mut sums = vec![0.0; if integers.offsets { places * size } else { 0 }];
        let (all_starts, all_sums) = (Shared::new(&mut starts), Shared::new(&mut sums));
        let run = places.div_ceil(team.tasks(places * size, 1 << 13));
        team.each(places.div_ceil(run.max(1)), &|task| {
            for place in task * run..places.min((task + 1) * run) {
                let halves = &rounded.sums[place * 2 * high..][..2 * high];
                // SAFETY: each place is one task's.
                let starts = unsafe { all_starts.part(place * size..(place + 1) * size) };
                if size == high {
                    starts.iter_mut().enumerate().for_each(|(t, start)| *start = halves[t] + halves[high + t]);
                } else {
                    starts.copy_from_slice(halves);
                }
                if integers.offsets {
                    let scales = &rounded.scales[place * high..][..high];
                    // SAFETY: as above.
                    let sums = unsafe { all_sums.part(place * size..(place + 1) * size) };
                    for ((sum, start), scale) in sums.iter_mut().zip(&*starts).zip(scales.iter().cycle()) {
                        *sum = scale * *start as f32;
                    }
                }
                starts.iter_mut().for_each(|start| *start *= -i32::from(integers.zero));
            }
        });
        Self { rounded, starts, sums }
    }
}

/// Room for the products of a panel with two tiles `[tile][row]`.
type Found = [[f32; TILE]; 2 * ROWS];

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
                    if crate::quant::amx::usable(crate::quant::amx::BYTES) {
                        found.push(Self::Amx);
                    }
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

    /// Tiles that are best multiplied together with several rows.
    fn tiles(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Vnni | Self::Amx => 2,
            _ => 1,
        }
    }

    /// Rows of x that are best put together where there are so many.
    pub(super) fn rows(self, count: usize) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx if count >= amx::MANY => HIGH,
            _ => ROWS,
        }
    }

    /// Calls `write` with each row of x, each of some tiles that stand one after another, and the 16 products.
    pub(super) fn product(
        self,
        integers: &IntegerForm,
        tiles: &[u8],
        inputs: &Inputs<'_>,
        steps: usize,
        mut write: impl FnMut(usize, usize, &[f32; TILE]),
    ) {
        let (groups, tile_bytes) = (integers.groups(), integers.tile_bytes(steps));
        let rounded = inputs.rounded;
        let panels = rounded.count.div_ceil(rounded.high);
        let places = panels * steps * rounded.high;
        assert!(tiles.len().is_multiple_of(tile_bytes));
        assert!(rounded.high == self.rows(rounded.count));
        assert!(rounded.scales.len() == places && rounded.codes.len() == places * 8);
        assert!(inputs.starts.len() == places * groups);
        assert!(!integers.offsets || inputs.sums.len() == inputs.starts.len());
        #[cfg(target_arch = "x86_64")]
        if rounded.high == HIGH {
            // SAFETY: the machine has the features (`all`), and lengths were checked.
            return unsafe { amx::product(integers, tiles, inputs, steps, write) };
        }
        // one row with several tiles would read from several places of memory at once
        let at_once = if rounded.count == 1 { 1 } else { self.tiles() };
        let mut found: Found = [[0.0; TILE]; 2 * ROWS];
        let mut first = 0;
        for tiles in tiles.chunks(at_once * tile_bytes) {
            let many = if tiles.len() == tile_bytes { 1 } else { at_once };
            for panel in 0..panels {
                let rows = panel * ROWS..rounded.count.min((panel + 1) * ROWS);
                match self {
                    Self::Portable => rows.clone().zip(&mut found).for_each(|(row, found)| {
                        portable(integers, tiles, inputs, steps, row, found);
                    }),
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: the machine has the features (`all`), lengths were checked, the panel is one of them.
                    Self::Avx2 | Self::Vnni | Self::Amx => unsafe {
                        x86::panel(self != Self::Avx2, integers, tiles, inputs, steps, panel, rows.len(), &mut found);
                    },
                }
                for (tile, found) in found.chunks_exact(ROWS).take(many).enumerate() {
                    rows.clone().zip(found).for_each(|(row, found)| write(row, first + tile, found));
                }
            }
            first += many;
        }
    }
}

fn portable(integers: &IntegerForm, tile: &[u8], inputs: &Inputs<'_>, steps: usize, row: usize, out: &mut [f32; TILE]) {
    let (groups, base) = (integers.groups(), IntegerForm::base(integers.bits));
    let half = |bytes: &[u8], index: usize| wide(u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]));
    let (panel, t) = (row / ROWS, row % ROWS);
    *out = [0.0; TILE];
    for index in 0..steps {
        let nest = &tile[index / integers.nest() * integers.tile_bytes(integers.nest())..];
        let (top, nest) = nest.split_at(integers.top_bytes());
        let step = &nest[index % integers.nest() * integers.step_bytes()..][..integers.step_bytes()];
        let (head, body) = step.split_at(integers.head_bytes());
        // a scale (0) or an offset (1) of a group of row r
        let number = |kind: usize, group: usize, r: usize| {
            let index = (kind * groups + group) * TILE + r;
            if integers.nested {
                half(top, kind * TILE + r) * f32::from(head[index].cast_signed()) // exact: 11 bits and 8
            } else {
                half(head, index)
            }
        };
        let place = panel * steps + index;
        let scale = inputs.rounded.scales[place * ROWS + t];
        let x = |k: usize| inputs.rounded.codes[(place * 8 + k / 4) * ROWS + t][k % 4];
        for group in 0..groups {
            let at = (place * groups + group) * ROWS + t;
            for (r, out) in out.iter_mut().enumerate() {
                let mut sum = inputs.starts[at];
                for k in group * integers.group..(group + 1) * integers.group {
                    let place = k / 4 * TILE * 4 + r * 4 + k % 4;
                    let low = body[place % (base * PLANE)] >> (place / (base * PLANE) * base) & (0xff >> (8 - base));
                    let bit = |bit: usize| (body[bit * PLANE + place / 8] >> (place % 8) & 1) << bit;
                    let code = (base..integers.bits).fold(low, |code, plane| code | bit(plane));
                    let code = integers.table.map_or(code, |table| table[usize::from(code)]);
                    sum += i32::from(code) * i32::from(x(k));
                }
                *out = (number(0, group, r) * scale).mul_add(sum as f32, *out);
                if integers.offsets {
                    *out = number(1, group, r).mul_add(inputs.sums[at], *out);
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
