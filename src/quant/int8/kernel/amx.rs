//! The same with the tiles of AMX: 16 rows of x with 16 rows of W at a time.
//!
//! Rust has no stable functions for these instructions, so they stand here as they are.

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;
use std::cell::RefCell;

use bytemuck::Zeroable;

use super::super::{HIGH, IntegerForm, STEP, TILE};
use super::Inputs;
use super::x86::{by_form, four_codes, nested_top, sixteen_numbers, wide_table};
use crate::quant::matmul::Line;

/// Rows of x from which on tiles pay.
pub(super) const MANY: usize = 8;

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

/// Sums of products of bytes `[16 rows of x][16 rows of W]`.
#[repr(C, align(64))]
struct Sums([[i32; TILE]; HIGH]);

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
    let mut found = [[0.0; TILE]; HIGH];
    CODES.with_borrow_mut(|codes| {
        NUMBERS.with_borrow_mut(|numbers| {
            codes.resize(steps * 8, Line::zeroed());
            numbers.resize(steps * groups * integers.kinds(), Line::zeroed());
            // SAFETY: the caller's promise; room was made for what is unpacked.
            unsafe {
                configure(groups);
                for (tile, bytes) in tiles.chunks_exact(integers.tile_bytes(steps)).enumerate() {
                    by_form!(integers, unpack, [], (integers, bytes, steps, codes, numbers));
                    for first in (0..count).step_by(HIGH) {
                        let panel = first / HIGH;
                        match (groups, integers.offsets) {
                            (1, false) => high::<1, false>(codes, numbers, inputs, steps, panel, &mut found),
                            (1, true) => high::<1, true>(codes, numbers, inputs, steps, panel, &mut found),
                            (_, false) => high::<2, false>(codes, numbers, inputs, steps, panel, &mut found),
                            (_, true) => high::<2, true>(codes, numbers, inputs, steps, panel, &mut found),
                        }
                        found.iter().take(count - first).enumerate().for_each(|(t, found)| {
                            write(first + t, tile, found);
                        });
                    }
                }
                std::arch::asm!("tilerelease", options(nostack, nomem));
            }
        });
    });
}

/// Tiles 0 and 1 are sums, 2 and 3 groups of x, 4 and 5 groups of W.
///
/// # Safety
/// The machine has AMX.
unsafe fn configure(groups: usize) {
    let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let bytes = (STEP / groups) as u16;
    for (tile, row_bytes, rows) in [(0, 64, 16), (2, bytes, 16), (4, 64, (bytes / 4) as u8)] {
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

/// The products of a panel of 16 rows of x with 16 rows of W.
///
/// # Safety
/// The machine has AMX and is configured for these groups; lengths are those of `product`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn high<const GROUPS: usize, const OFFSETS: bool>(
    codes: &[Line],
    numbers: &[Line],
    inputs: &Inputs<'_>,
    steps: usize,
    panel: usize,
    out: &mut [[f32; TILE]; HIGH],
) {
    const { assert!(GROUPS == 1 || GROUPS == 2) };
    let (place, kinds) = (panel * steps, 1 + usize::from(OFFSETS));
    let mut whole = [Sums([[0; TILE]; HIGH]), Sums([[0; TILE]; HIGH])];
    let mut sums = [_mm512_setzero_ps(); HIGH];
    // SAFETY: the inputs have `steps` steps of this panel, W as many.
    unsafe {
        let x = inputs.rounded.codes.as_ptr().add(place * HIGH * 8).cast::<u8>();
        let scales = inputs.rounded.scales.as_ptr().add(place * HIGH);
        let starts = inputs.starts.as_ptr().add(place * GROUPS * HIGH);
        let x_sums = inputs.sums.as_ptr().wrapping_add(place * GROUPS * HIGH);
        for step in 0..steps {
            let scales = scales.add(step * HIGH);
            for group in 0..GROUPS {
                let index = step * GROUPS + group;
                let x = x.add(step * HIGH * STEP + group * (STEP / GROUPS));
                let w = codes.as_ptr().add(step * 8 + group * (8 / GROUPS));
                let to = &raw mut whole[index % 2];
                std::arch::asm!(
                    "tilezero tmm0",
                    "tileloadd tmm2, [{x} + {x_row}]",
                    "tileloadd tmm4, [{w} + {line}]",
                    "tdpbsud tmm0, tmm2, tmm4",
                    "tilestored [{to} + {line}], tmm0",
                    x = in(reg) x, x_row = in(reg) STEP, w = in(reg) w, to = in(reg) to, line = in(reg) 64usize,
                    out("tmm0") _, out("tmm2") _, out("tmm4") _, options(nostack),
                );
                let number = numbers.as_ptr().add(index * kinds).cast::<f32>();
                let scale = _mm512_load_ps(number);
                for t in 0..HIGH {
                    let mut found = _mm512_load_si512((&raw const whole[index % 2].0[t]).cast());
                    if !OFFSETS {
                        found = _mm512_add_epi32(found, _mm512_set1_epi32(*starts.add(index * HIGH + t)));
                    }
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*scales.add(t)));
                    sums[t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(found), sums[t]);
                }
                if OFFSETS {
                    let offset = _mm512_load_ps(number.add(TILE));
                    for t in 0..HIGH {
                        let sum = _mm512_set1_ps(*x_sums.add(index * HIGH + t));
                        sums[t] = _mm512_fmadd_ps(offset, sum, sums[t]);
                    }
                }
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            _mm512_storeu_ps(out.as_mut_ptr(), sum);
        }
    }
}
