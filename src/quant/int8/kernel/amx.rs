//! The same with the tiles of AMX: 16 rows of x with 16 rows of W at a time.
//!
//! Rust has no stable functions for these instructions, so they stand here as they are.
#![allow(clippy::needless_range_loop)] // a row's number picks from several arrays at once

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;
use std::cell::RefCell;

use bytemuck::Zeroable;

use super::super::{HIGH, IntegerForm, STEP, TILE};
use super::Inputs;
use super::x86::{by_form, four_codes, nested_top, sixteen_numbers, wide_table};
use crate::quant::matmul::Line;

/// Rows of x from which on tiles pay.
pub(super) const MANY: usize = 32;

/// Whether the processor has tiles of bytes, and the system lets this process use them.
pub(super) fn usable() -> bool {
    const TILES: u32 = 1 << 24;
    const BYTES: u32 = 1 << 25;
    let features = __cpuid_count(7, 0).edx;
    let both = TILES | BYTES;
    features & both == both && granted()
}

/// Asks the system for the registers, which are large; each process has to.
#[cfg(target_os = "linux")]
fn granted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn granted() -> bool {
    false
}

/// Shapes of the eight tiles, as `ldtilecfg` takes them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Two panels of x with two tiles of W, as they are multiplied together.
const PAIRS: usize = 4;

/// Of each pair, what 16 rows of x give with 16 rows of W.
#[repr(C, align(64))]
struct Square<T>([[[T; TILE]; HIGH]; PAIRS]);

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
        static CODES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
        static NUMBERS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    let (groups, count) = (integers.groups(), inputs.rounded.count);
    let tile_bytes = integers.tile_bytes(steps);
    let (codes_size, numbers_size) = (steps * 8, steps * groups * integers.kinds());
    let mut found = Square([[[0.0; TILE]; HIGH]; PAIRS]);
    CODES.with_borrow_mut(|codes| {
        NUMBERS.with_borrow_mut(|numbers| {
            codes.resize(2 * codes_size, Line::zeroed());
            numbers.resize(2 * numbers_size, Line::zeroed());
            // SAFETY: the caller's promise.
            unsafe { configure(groups) };
            for (two, tiles) in tiles.chunks(2 * tile_bytes).enumerate() {
                for (index, tile) in tiles.chunks_exact(tile_bytes).enumerate() {
                    let codes = &mut codes[index * codes_size..][..codes_size];
                    let numbers = &mut numbers[index * numbers_size..][..numbers_size];
                    // SAFETY: the caller's promise; there is room for what is unpacked.
                    unsafe { by_form!(integers, unpack, [], (integers, tile, steps, codes, numbers)) };
                }
                for first in (0..count).step_by(2 * HIGH) {
                    // where there is only one more panel, or one more tile, it takes the other's place, too
                    let panels = [first / HIGH, (first / HIGH + 1).min((count - 1) / HIGH)];
                    let tiles = 2.min(tiles.len() / tile_bytes);
                    // SAFETY: as above.
                    unsafe {
                        match (groups, integers.offsets) {
                            (1, false) => square::<1, false>(codes, numbers, inputs, steps, panels, &mut found),
                            (1, true) => square::<1, true>(codes, numbers, inputs, steps, panels, &mut found),
                            (_, false) => square::<2, false>(codes, numbers, inputs, steps, panels, &mut found),
                            (_, true) => square::<2, true>(codes, numbers, inputs, steps, panels, &mut found),
                        }
                    }
                    for (t, row) in (first..count.min(first + 2 * HIGH)).enumerate() {
                        for tile in 0..tiles {
                            write(row, 2 * two + tile, &found.0[t / HIGH * 2 + tile][t % HIGH]);
                        }
                    }
                }
            }
            // SAFETY: the machine has AMX.
            unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) };
        });
    });
}

/// Tiles 0 to 3 are sums, 4 and 5 groups of x, 6 and 7 groups of W.
///
/// # Safety
/// The machine has AMX.
unsafe fn configure(groups: usize) {
    let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let bytes = (STEP / groups) as u16;
    for (tile, row_bytes, rows) in [(0, 64, 16), (2, 64, 16), (4, bytes, 16), (6, 64, (bytes / 4) as u8)] {
        for tile in tile..tile + 2 {
            (shapes.row_bytes[tile], shapes.rows[tile]) = (row_bytes, rows);
        }
    }
    // SAFETY: the caller's promise; the 64 bytes are there and say what the manual wants of them.
    unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) };
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

/// The products of two panels of x with two tiles of W, `[panel][tile]`.
///
/// While groups are multiplied, the sums of those before are scaled and added up.
///
/// # Safety
/// The machine has AMX and is configured for these groups; lengths are those of `product`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn square<const GROUPS: usize, const OFFSETS: bool>(
    codes: &[Line],
    numbers: &[Line],
    inputs: &Inputs<'_>,
    steps: usize,
    panels: [usize; 2],
    out: &mut Square<f32>,
) {
    const { assert!(GROUPS == 1 || GROUPS == 2) };
    let kinds = 1 + usize::from(OFFSETS);
    let rounded = inputs.rounded;
    let mut whole = [const { Square([[[0; TILE]; HIGH]; PAIRS]) }; 2];
    let whole = whole.as_mut_ptr();
    *out = Square([[[0.0; TILE]; HIGH]; PAIRS]);
    // SAFETY: the inputs have `steps` steps of these panels, W as many of both tiles.
    unsafe {
        let x = panels.map(|panel| rounded.codes.as_ptr().add(panel * steps * HIGH * 8).cast::<u8>());
        let scales = panels.map(|panel| rounded.scales.as_ptr().add(panel * steps * HIGH));
        let starts = panels.map(|panel| inputs.starts.as_ptr().add(panel * steps * GROUPS * HIGH));
        let sums = panels.map(|panel| inputs.sums.as_ptr().wrapping_add(panel * steps * GROUPS * HIGH));
        let w = [codes.as_ptr(), codes.as_ptr().add(steps * 8)];
        let numbers = [numbers.as_ptr(), numbers.as_ptr().add(steps * GROUPS * kinds)];
        for index in 0..=steps * GROUPS {
            if index < steps * GROUPS {
                let (step, group) = (index / GROUPS, index % GROUPS);
                let x = x.map(|x| x.add(step * HIGH * STEP + group * (STEP / GROUPS)));
                let w = w.map(|w| w.add(step * 8 + group * (8 / GROUPS)));
                multiply(x, w, whole.add(index % 2));
            }
            let Some(index) = index.checked_sub(1) else { continue };
            for pair in 0..PAIRS {
                let (panel, tile) = (pair / 2, pair % 2);
                let number = numbers[tile].add(index * kinds).cast::<f32>();
                let (scale, offset) = (_mm512_load_ps(number), _mm512_load_ps(number.add((kinds - 1) * TILE)));
                for t in 0..HIGH {
                    let at = index * HIGH + t;
                    let mut found = _mm512_load_si512((&raw const (*whole.add(index % 2)).0[pair][t]).cast());
                    if !OFFSETS {
                        found = _mm512_add_epi32(found, _mm512_set1_epi32(*starts[panel].add(at)));
                    }
                    let of_x = _mm512_set1_ps(*scales[panel].add(index / GROUPS * HIGH + t));
                    let out = (&raw mut out.0[pair][t]).cast::<f32>();
                    let scale = _mm512_mul_ps(scale, of_x);
                    let mut sum = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(found), _mm512_load_ps(out));
                    if OFFSETS {
                        sum = _mm512_fmadd_ps(offset, _mm512_set1_ps(*sums[panel].add(at)), sum);
                    }
                    _mm512_store_ps(out, sum);
                }
            }
        }
    }
}

/// Sums of products of a group of both panels with both tiles, to `[panel][tile]`.
///
/// # Safety
/// The machine has AMX and is configured; a group of 16 rows is at each place.
#[inline]
unsafe fn multiply(x: [*const u8; 2], w: [*const Line; 2], to: *mut Square<i32>) {
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
