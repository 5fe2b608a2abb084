//! How the cache keeps the numbers of a head: as they are, in bfloat16, or in 8 bits.
//!
//! In 8 bits, a head of D numbers is a record of D codes and a float32 scale for each block of 32 of them (the last may be
//! shorter), the codes first:
//!
//! ```text
//! scale = max |x| / 127,   code = round(x / scale),   x ≈ scale · code
//! ```
//! A record depends on its own numbers alone, so a row is still the same bits in any company.

use bytemuck::Pod;

use super::math;

/// Numbers of a head that share a scale.
pub const BLOCK: usize = 32;

/// An element of a page.
pub trait Kept: Pod + Send + Sync {
    /// Elements that a head of so many numbers takes.
    fn room(count: usize) -> usize;
    /// Writes a head's numbers to its place of [`Kept::room`] elements.
    fn keep(numbers: &[f32], place: &mut [Self]);
    /// The numbers of the first `count` heads of `dim`, one slice each; `room` has `dim` numbers for each, and is used
    /// where they are not there already. Where they are, those of the other heads may follow.
    fn widen<'a, 'b>(
        heads: &'b [&'a [Self]],
        count: usize,
        dim: usize,
        room: &'a mut [f32],
        numbers: &'b mut [&'a [f32]],
    ) -> &'b [&'a [f32]];
}

impl Kept for f32 {
    fn room(count: usize) -> usize {
        count
    }
    fn keep(numbers: &[f32], place: &mut [Self]) {
        place.copy_from_slice(numbers);
    }
    fn widen<'a, 'b>(
        heads: &'b [&'a [Self]],
        _count: usize,
        _dim: usize,
        _room: &'a mut [f32],
        _numbers: &'b mut [&'a [f32]],
    ) -> &'b [&'a [f32]] {
        heads
    }
}

impl Kept for half::bf16 {
    fn room(count: usize) -> usize {
        count
    }
    fn keep(numbers: &[f32], place: &mut [Self]) {
        place.iter_mut().zip(numbers).for_each(|(place, &number)| *place = Self::from_f32(number));
    }
    fn widen<'a, 'b>(
        heads: &'b [&'a [Self]],
        count: usize,
        dim: usize,
        room: &'a mut [f32],
        numbers: &'b mut [&'a [f32]],
    ) -> &'b [&'a [f32]] {
        let numbers = &mut numbers[..count];
        for ((head, room), numbers) in heads.iter().zip(room.chunks_exact_mut(dim)).zip(&mut *numbers) {
            room.iter_mut().zip(*head).for_each(|(room, kept)| *room = f32::from_bits(u32::from(kept.to_bits()) << 16));
            *numbers = room;
        }
        numbers
    }
}

impl Kept for u8 {
    fn room(count: usize) -> usize {
        count + 4 * count.div_ceil(BLOCK)
    }
    fn keep(numbers: &[f32], place: &mut [Self]) {
        math::encode(numbers, place);
    }
    fn widen<'a, 'b>(
        heads: &'b [&'a [Self]],
        count: usize,
        dim: usize,
        room: &'a mut [f32],
        numbers: &'b mut [&'a [f32]],
    ) -> &'b [&'a [f32]] {
        let (room, numbers) = (&mut room[..count * dim], &mut numbers[..count]);
        math::decode(&heads[..count], dim, room);
        for (numbers, room) in numbers.iter_mut().zip(room.chunks_exact(dim)) {
            *numbers = room;
        }
        numbers
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_number_is_off_by_more_than_half_a_code(
            numbers in prop::collection::vec(-1e3f32..1e3, 1..80),
            power in -20i32..20,
        ) {
            let numbers: Vec<f32> = numbers.iter().map(|number| number * 2f32.powi(power)).collect();
            let mut place = vec![0; u8::room(numbers.len())];
            u8::keep(&numbers, &mut place);
            let (mut room, mut found) = (vec![0.0; numbers.len()], [&[][..]]);
            u8::widen(&[&place], 1, numbers.len(), &mut room, &mut found);
            for (numbers, found) in numbers.chunks(BLOCK).zip(found[0].chunks(BLOCK)) {
                let largest = numbers.iter().fold(0.0f32, |largest, number| largest.max(number.abs()));
                for (number, found) in numbers.iter().zip(found) {
                    prop_assert!((number - found).abs() <= largest / 127.0 * 0.5001, "{number} {found}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut place = vec![0; u8::room(34)];
            let mut numbers = [1.0; 34];
            numbers[33] = bad;
            u8::keep(&numbers, &mut place);
            let (mut room, mut found) = ([0.0; 34], [&[][..]]);
            u8::widen(&[&place], 1, 34, &mut room, &mut found);
            assert!(found[0][..32].iter().all(|&number| (number - 1.0f32).abs() < 1e-6) && found[0][33].is_nan());
        }
        let mut place = vec![7; u8::room(3)];
        u8::keep(&[0.0, -0.0, 0.0], &mut place);
        assert!(place.iter().all(|&byte| byte == 0));
    }
}
