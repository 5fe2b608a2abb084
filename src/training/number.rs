//! What a step's tensors hold: float32, or bfloat16 that is computed with as float32 and rounded once.

#[cfg(target_arch = "x86_64")]
use crate::quant::matmul::Path;

use half::bf16;

use crate::decoder::attention::Value;
use crate::decoder::math::dispatched;

/// A number of a tensor.
pub trait Number: Value {
    /// Whether it is bfloat16.
    const HALF: bool;
    /// Memory that [`Number::read`] and [`Number::write`] of so many numbers take; the longest first.
    fn room(count: usize) -> Vec<f32>;
    /// The numbers as float32, in `room` where they are others.
    fn read<'a>(values: &'a [Self], room: &'a mut [f32]) -> &'a [f32];
    /// Has the numbers written by `fill`, which finds whatever was there or in `room`.
    fn write(values: &mut [Self], room: &mut [f32], fill: impl FnOnce(&mut [f32]));
    /// Rounds to what these numbers can be.
    fn round(wide: &mut [f32]);
    /// Rows of `width` numbers, one every `stride`: where they begin as float32, and their stride there.
    fn rows(values: &[Self], stride: usize, width: usize, rows: usize, room: &mut [f32]) -> (*const f32, usize);
}

impl Number for f32 {
    const HALF: bool = false;
    fn room(_count: usize) -> Vec<f32> {
        Vec::new()
    }
    fn read<'a>(values: &'a [Self], _room: &'a mut [f32]) -> &'a [f32] {
        values
    }
    fn write(values: &mut [Self], _room: &mut [f32], fill: impl FnOnce(&mut [f32])) {
        fill(values);
    }
    fn round(_wide: &mut [f32]) {}
    fn rows(values: &[Self], stride: usize, _width: usize, _rows: usize, _room: &mut [f32]) -> (*const f32, usize) {
        (values.as_ptr(), stride)
    }
}

impl Number for bf16 {
    const HALF: bool = true;
    fn room(count: usize) -> Vec<f32> {
        vec![0.0; count]
    }
    fn read<'a>(values: &'a [Self], room: &'a mut [f32]) -> &'a [f32] {
        let room = &mut room[..values.len()];
        widen(values, room);
        room
    }
    fn write(values: &mut [Self], room: &mut [f32], fill: impl FnOnce(&mut [f32])) {
        let room = &mut room[..values.len()];
        fill(room);
        narrow(room, values);
    }
    fn round(wide: &mut [f32]) {
        round(wide);
    }
    fn rows(values: &[Self], stride: usize, width: usize, rows: usize, room: &mut [f32]) -> (*const f32, usize) {
        for (row, room) in room.chunks_exact_mut(width).take(rows).enumerate() {
            widen(&values[row * stride..][..width], room);
        }
        (room.as_ptr(), width)
    }
}

dispatched! {
    /// As float32, exactly.
    widen(values: &[bf16], wide: &mut [f32]) {
        wide.iter_mut().zip(values).for_each(|(wide, value)| *wide = value.wide());
    }
}

/// The bits of the nearest, halfway to even; what isn't a number stays none.
#[inline(always)]
fn nearest(wide: f32) -> u32 {
    let bits = wide.to_bits();
    if wide.is_nan() { bits >> 16 | 0x40 } else { (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16 }
}

dispatched! {
    /// To the nearest.
    narrow(wide: &[f32], values: &mut [bf16]) {
        values.iter_mut().zip(wide).for_each(|(value, wide)| *value = bf16::from_bits(nearest(*wide) as u16));
    }
}

dispatched! {
    /// To the nearest, as float32.
    round(wide: &mut [f32]) {
        wide.iter_mut().for_each(|wide| *wide = f32::from_bits(nearest(*wide) << 16));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_as_the_library_does() {
        let edges = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-45, f32::NAN];
        let some = (0..1 << 16).map(|i: u32| f32::from_bits(i.wrapping_mul(0x9e37_79b1)));
        let halfway = (0..64).map(|i: u32| f32::from_bits(0x3f80_8000 + (i << 16) + i % 3 - 1));
        let wide: Vec<f32> = edges.into_iter().chain(some).chain(halfway).collect();
        let mut found = vec![bf16::ZERO; wide.len()];
        narrow(&wide, &mut found);
        for (wide, found) in wide.iter().zip(&found) {
            assert_eq!(found.to_bits(), bf16::from_f32(*wide).to_bits(), "{wide:e}");
        }
        let mut back = vec![0.0; found.len()];
        widen(&found, &mut back);
        assert!(
            found
                .iter()
                .zip(&back)
                .all(|(found, back)| found.to_f32().to_bits() == back.to_bits() || found.is_nan() && back.is_nan())
        );
    }
}
