//! The same with the tiles of AMX: 16 rows of x with 16 rows of W at a time.
#![allow(clippy::needless_range_loop)] // a row's number picks from several arrays at once

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;
use std::array::from_fn;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use bytemuck::Zeroable;

use super::super::{HIGH, IntegerForm, STEP, TILE};
use super::Inputs;
use super::x86::{by_form, four_codes, nested_top, sixteen_numbers, wide_table};
use crate::quant::amx::{configure, release};
use crate::quant::matmul::Line;

/// Rows of x from which on tiles pay.
pub(super) const MANY: usize = 32;

/// Panels of x, and tiles of W, that are multiplied together.
const PAIR: usize = 2;
/// Rows of x whose sums stay in registers while groups are added up, with two tiles.
const SOME: usize = 8;
/// Groups that are multiplied before they are added up: with those of the next chunk they fit into the first cache.
const CHUNK: usize = 2;
/// Bytes of codes that are unpacked for several panels at once: the second cache has room for them.
const UNPACKED: usize = 1 << 19;

/// What 16 rows of x give with 16 rows of W, `[panel][tile]`.
#[repr(C, align(64))]
struct Squares<T>([[[[T; TILE]; HIGH]; PAIR]; PAIR]);

/// Calls `write` with each row of x, each tile, and the 16 products.
///
/// # Safety
/// The machine has AMX, the tiles are whole, and the inputs have the lengths that `Path::product` checks.
pub(super) unsafe fn product(
    integers: &IntegerForm,
    tiles: &[u8],
    inputs: &Inputs<'_>,
    steps: usize,
    mut write: impl FnMut(usize, usize, &[f32; TILE]),
) {
    thread_local! {
        static ROOM: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    let (groups, count) = (integers.groups(), inputs.rounded.count);
    let tile_bytes = integers.tile_bytes(steps);
    let (codes_size, size) = (steps * 8, steps * (8 + groups * integers.kinds()));
    let mut found = Squares([[[[0.0; TILE]; HIGH]; PAIR]; PAIR]);
    // a row's results lie side by side, those of rows far apart: two panels meet many tiles before the next two do
    let block = if count > PAIR * HIGH { (UNPACKED / (64 * size)).next_multiple_of(PAIR) } else { PAIR };
    ROOM.with_borrow_mut(|room| {
        room.resize(block * size, Line::zeroed());
        let bytes = (STEP / groups) as u16;
        // sums, groups of x, and groups of W, each of four or two tiles
        let (sums, x, w) = ((64, 16), (bytes, 16), (64, (bytes / 4) as u8));
        // SAFETY: the caller's promise.
        unsafe { configure([sums, sums, sums, sums, x, x, w, w]) };
        for (number, tiles) in tiles.chunks(block * tile_bytes).enumerate() {
            for (tile, room) in tiles.chunks_exact(tile_bytes).zip(room.chunks_exact_mut(size)) {
                let (codes, numbers) = room.split_at_mut(codes_size);
                // SAFETY: the caller's promise; there is room for what is unpacked.
                unsafe { by_form!(integers, unpack, [], (integers, tile, steps, PAIR * tile_bytes, codes, numbers)) };
            }
            let count_tiles = tiles.len() / tile_bytes;
            for first in (0..count).step_by(PAIR * HIGH) {
                let rows = first..count.min(first + PAIR * HIGH);
                for tile in (0..count_tiles).step_by(PAIR) {
                    let room = &room[tile * size..(tile + PAIR) * size];
                    // SAFETY: as above.
                    unsafe {
                        match (groups, integers.offsets) {
                            (1, false) => squares::<1, false>(room, inputs, steps, &rows, &mut found),
                            (1, true) => squares::<1, true>(room, inputs, steps, &rows, &mut found),
                            (_, false) => squares::<2, false>(room, inputs, steps, &rows, &mut found),
                            (_, true) => squares::<2, true>(room, inputs, steps, &rows, &mut found),
                        }
                    }
                    for (t, row) in rows.clone().enumerate() {
                        for n in 0..PAIR.min(count_tiles - tile) {
                            write(row, number * block + tile + n, &found.0[t / HIGH][n][t % HIGH]);
                        }
                    }
                }
            }
        }
        // SAFETY: the machine has AMX.
        unsafe { release() };
    });
}

/// All codes of 16 rows of W `[steps, 8, 16, 4]` in bytes, and their scales and offsets `[steps, groups, kinds, 16]`.
///
/// # Safety
/// The machine has AVX-512, the tile is one of so many steps, and there is room.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn unpack<const BITS: usize, const GROUPS: usize, const NESTED: bool, const TABLE: bool>(
    integers: &IntegerForm,
    tile: &[u8],
    steps: usize,
    ahead: usize,
    codes: &mut [Line],
    numbers: &mut [Line],
) {
    let (nest, kinds, head) = (integers.nest(), integers.kinds(), integers.head_bytes());
    let base = const { IntegerForm::base(BITS) };
    let table = wide_table(integers);
    let mut tops = [_mm512_setzero_ps(); 2];
    for step in 0..steps {
        // SAFETY: the tile has this step, and `codes` and `numbers` have room for it.
        unsafe {
            let block = tile.as_ptr().add(step / nest * integers.tile_bytes(nest));
            let start = block.add(integers.top_bytes() + step % nest * integers.step_bytes());
            for line in (0..integers.step_bytes()).step_by(64) {
                _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(ahead + line).cast());
            }
            if NESTED {
                for (kind, top) in tops.iter_mut().enumerate().take(kinds) {
                    *top = nested_top(block, kind);
                }
            }
            for group in 0..GROUPS {
                for (kind, top) in tops.iter().enumerate().take(kinds) {
                    let number = sixteen_numbers::<NESTED>(start, kind * GROUPS + group, *top);
                    let to = &raw mut numbers[(step * GROUPS + group) * kinds + kind];
                    _mm512_store_ps(to.cast(), number);
                }
            }
            for load in 0..base {
                let loaded = _mm512_loadu_si512(start.add(head + 64 * load).cast());
                for part in 0..8 / base {
                    let four = part * base + load;
                    let found = four_codes::<BITS, TABLE>(loaded, start.add(head), part, four, table);
                    _mm512_store_si512((&raw mut codes[step * 8 + four]).cast(), found);
                }
            }
        }
    }
}

/// The products of some rows of x, of up to two panels, with two tiles of W.
///
/// While the sums of a chunk of groups are scaled and added up, a few rows after another, the next chunk is multiplied.
///
/// # Safety
/// The machine has AMX and is configured for these groups; `room` has the tiles' codes and numbers, lengths are those of
/// `product`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn squares<const GROUPS: usize, const OFFSETS: bool>(
    room: &[Line],
    inputs: &Inputs<'_>,
    steps: usize,
    rows: &Range<usize>,
    out: &mut Squares<f32>,
) {
    const { assert!(GROUPS == 1 || GROUPS == 2) };
    let (rounded, all) = (inputs.rounded, steps * GROUPS);
    let kinds = 1 + usize::from(OFFSETS);
    let (size, first, runs) = (steps * (8 + GROUPS * kinds), rows.start / HIGH, rows.len().div_ceil(SOME));
    // where there is only one more panel, it takes the other's place, too
    let second = if rows.len() > HIGH { steps * HIGH * STEP } else { 0 };
    let mut whole = [const { MaybeUninit::<Squares<i32>>::uninit() }; 2 * CHUNK];
    let whole = whole.as_mut_ptr().cast::<Squares<i32>>();
    // SAFETY: the inputs have `steps` steps of these panels, W as many of each tile; what is read was stored.
    unsafe {
        let product = |index: usize| {
            let (step, group) = (index / GROUPS, index % GROUPS);
            let x = rounded.codes.as_ptr().add((first * steps + step) * HIGH * 8).cast::<u8>();
            let x = x.add(group * (STEP / GROUPS));
            let w = room.as_ptr().add(step * 8 + group * (8 / GROUPS));
            let to = whole.add(index % (2 * CHUNK));
            multiply([x, x.add(second)], [w, w.add(size)], to);
        };
        (0..all.min(CHUNK)).for_each(product);
        for start in (0..all).step_by(CHUNK) {
            let next = (start + CHUNK).min(all)..(start + 2 * CHUNK).min(all);
            let mut ahead = next.start;
            for run in 0..runs {
                let (panel, t) = (run * SOME / HIGH, run * SOME % HIGH);
                let out = out.0[panel].as_mut_ptr();
                let place = |n: usize, i: usize| (&raw mut (*out.add(n))[t + i]).cast::<f32>();
                let mut sums = [[_mm512_setzero_ps(); SOME]; PAIR];
                if start > 0 {
                    sums = from_fn(|n| from_fn(|i| _mm512_load_ps(place(n, i))));
                }
                for index in start..next.start {
                    let number = |n: usize, kind: usize| {
                        _mm512_load_ps(room.as_ptr().add(n * size + steps * 8 + index * kinds + kind).cast())
                    };
                    let scales: [_; PAIR] = from_fn(|n| number(n, 0));
                    let offsets: [_; PAIR] = from_fn(|n| number(n, kinds - 1));
                    let whole = (*whole.add(index % (2 * CHUNK))).0[panel].as_ptr();
                    for i in 0..SOME {
                        let at = ((first + panel) * all + index) * HIGH + t + i;
                        let scale =
                            rounded.scales.as_ptr().add(((first + panel) * steps + index / GROUPS) * HIGH + t + i);
                        for n in 0..PAIR {
                            let mut found = _mm512_load_si512((&raw const (*whole.add(n))[t + i]).cast());
                            if !OFFSETS {
                                found = _mm512_add_epi32(found, _mm512_set1_epi32(*inputs.starts.as_ptr().add(at)));
                            }
                            let scale = _mm512_mul_ps(scales[n], _mm512_set1_ps(*scale));
                            sums[n][i] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(found), sums[n][i]);
                            if OFFSETS {
                                let sum = _mm512_set1_ps(*inputs.sums.as_ptr().add(at));
                                sums[n][i] = _mm512_fmadd_ps(offsets[n], sum, sums[n][i]);
                            }
                        }
                    }
                }
                for (n, sums) in sums.iter().enumerate() {
                    sums.iter().enumerate().for_each(|(i, &sum)| _mm512_store_ps(place(n, i), sum));
                }
                while (ahead - next.start) * runs < next.len() * (run + 1) {
                    product(ahead);
                    ahead += 1;
                }
            }
        }
    }
}

/// Sums of products of a group of both panels with both tiles, to `[panel][tile]`.
///
/// # Safety
/// The machine has AMX and is configured; a group of as many rows is at each place.
#[inline(always)]
unsafe fn multiply(x: [*const u8; PAIR], w: [*const Line; PAIR], to: *mut Squares<i32>) {
    // SAFETY: the caller's promise; `to` has room for four times 1,024 bytes.
    unsafe {
        std::arch::asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tileloadd tmm4, [{x0} + {row}]",
            "tileloadd tmm6, [{w0} + {line}]",
            "tdpbsud tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {line}]",
            "tdpbsud tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{x1} + {row}]",
            "tdpbsud tmm2, tmm5, tmm6",
            "tdpbsud tmm3, tmm5, tmm7",
            "tilestored [{to} + {line}], tmm0",
            "tilestored [{to} + {line} + 1024], tmm1",
            "tilestored [{to} + {line} + 2048], tmm2",
            "tilestored [{to} + {line} + 3072], tmm3",
            x0 = in(reg) x[0], x1 = in(reg) x[1], row = in(reg) STEP,
            w0 = in(reg) w[0], w1 = in(reg) w[1], line = in(reg) 64usize, to = in(reg) to,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
