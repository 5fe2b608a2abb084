//! The tiles of AMX: whether they may be used, and how they are shaped.
//!
//! Rust has no stable functions for these instructions, so they stand where they are used, as they are.

use std::arch::x86_64::__cpuid_count;

/// Bits of the processor's seventh leaf, edx: tiles multiply halves (bfloat16).
pub(super) const HALVES: u32 = 1 << 22;
/// Tiles multiply bytes.
pub(super) const BYTES: u32 = 1 << 25;

/// Whether the processor has tiles that multiply what is asked for, and the system lets this process use them.
pub(super) fn usable(numbers: u32) -> bool {
    const TILES: u32 = 1 << 24;
    let both = TILES | numbers;
    __cpuid_count(7, 0).edx & both == both && granted()
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

/// Gives the eight tiles their shapes, (bytes of a row, rows), until [`release`].
///
/// # Safety
/// The machine has AMX ([`usable`]); a row has at most 64 bytes, a tile at most 16 rows.
pub(super) unsafe fn configure(tiles: [(u16, u8); 8]) {
    let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for (tile, (row_bytes, rows)) in tiles.into_iter().enumerate() {
        (shapes.row_bytes[tile], shapes.rows[tile]) = (row_bytes, rows);
    }
    // SAFETY: the caller's promise; the 64 bytes are there and say what the manual wants of them.
    unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) };
}

/// Lets the registers go: switching between threads is cheaper without them.
///
/// # Safety
/// The machine has AMX.
pub(crate) unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) };
}
