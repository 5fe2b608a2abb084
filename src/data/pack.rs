//! Packing: which sequences share a row of a batch.
//!
//! Row by row over a window: the longest sequence that is left begins a row, and the longest that still fits follows, but
//! two that fill the row to the last token go before one that doesn't. Rows have no padding and no leaks (attention knows
//! the boundaries), so a row is only a portion of work of about equal size.
//! Source: Gupta and Ho, A new heuristic algorithm for the one-dimensional bin-packing problem, 1999 (minimum bin slack,
//! here with two sequences ahead); for language models Ding et al., Fewer Truncations Improve Language Modeling, 2024,
//! arXiv 2404.10830.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Sequences that are packed together; enough that the rows are full, few enough that neighbours vary from seed to seed.
const WINDOW: usize = 1 << 14;

/// Packs units of `lengths` tokens into rows of at most `room`: the units' indices, row by row.
///
/// Every unit is in exactly one row; one that is longer than `room` has a row for itself. The units are shuffled by
/// `seed` before they are cut into windows; the result depends on nothing else.
pub fn pack(lengths: &[u32], room: u32, seed: u64) -> Vec<Vec<u32>> {
    let mut order: Vec<u32> = (0..u32::try_from(lengths.len()).unwrap_or(u32::MAX)).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    order.chunks(WINDOW).flat_map(|window| pack_window(window, lengths, room)).collect()
}

fn pack_window(window: &[u32], lengths: &[u32], room: u32) -> Vec<Vec<u32>> {
    let mut left = Left::default();
    for &unit in window {
        left.entry(lengths[unit as usize]).or_default().push(unit); // equally long ones stay shuffled
    }
    let mut rows: Vec<Vec<u32>> = Vec::new();
    while let Some((&longest, _)) = left.last_key_value() {
        let mut row = Vec::new();
        let (mut next, mut free) = (Some(longest), room);
        while let Some(length) = next {
            row.extend(take(&mut left, length));
            free = free.saturating_sub(length);
            next = following(&left, free);
        }
        rows.push(row);
    }
    rows
}

/// What is not yet in a row: units by their length.
type Left = BTreeMap<u32, Vec<u32>>;

fn take(left: &mut Left, length: u32) -> Option<u32> {
    let units = left.get_mut(&length)?;
    let unit = units.pop();
    if units.is_empty() {
        left.remove(&length);
    }
    unit
}

/// The length that a row with so much room left goes on with; `None` when nothing fits.
fn following(left: &Left, free: u32) -> Option<u32> {
    let (&longest, _) = left.range(..=free).next_back()?;
    if longest == free || longest < free.div_ceil(2) {
        return Some(longest); // it fills the row, or no two do
    }
    let mut lengths = left.range(..free);
    let (mut short, mut long) = (lengths.next(), lengths.next_back());
    while let (Some((&a, _)), Some((&b, _))) = (short, long) {
        match a.cmp(&(free - b)) {
            Ordering::Equal => return Some(b),
            Ordering::Less => short = lengths.next(),
            Ordering::Greater => long = lengths.next_back(),
        }
    }
    let halves = left.get(&(free / 2)).is_some_and(|units| free.is_multiple_of(2) && units.len() > 1);
    Some(if halves { free / 2 } else { longest })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fill(lengths: &[u32], room: u32, rows: &[Vec<u32>]) -> f64 {
        f64::from(lengths.iter().sum::<u32>()) / (rows.len() as f64 * f64::from(room))
    }

    #[test]
    fn chats_fill_their_rows() {
        // lognormal: median 180, sigma 0.7, and what a template writes, capped at 1,024; by Box and Muller's transform
        use rand::Rng;
        let mut dice = ChaCha8Rng::seed_from_u64(7);
        let mut normal = || {
            let (u, v): (f64, f64) = (dice.random_range(f64::EPSILON..1.0), dice.random());
            (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
        };
        let lengths: Vec<u32> =
            (0..50_000).map(|_| (35.0 + 180.0 * (0.7 * normal()).exp()).min(1024.0) as u32).collect();
        for room in [1024, 4096] {
            let rows = pack(&lengths, room, 0);
            assert!(fill(&lengths, room, &rows) >= 0.997, "{room}: {}", fill(&lengths, room, &rows));
        }
    }

    proptest! {
        #[test]
        fn every_unit_once_and_no_row_too_full(lengths in prop::collection::vec(1_u32..120, 0..300), room in 50_u32..150, seed: u64) {
            let rows = pack(&lengths, room, seed);
            let mut seen: Vec<u32> = rows.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len() as u32).collect::<Vec<_>>());
            for row in &rows {
                let used: u32 = row.iter().map(|&unit| lengths[unit as usize]).sum();
                prop_assert!(used <= room || row.len() == 1);
            }
            prop_assert_eq!(&rows, &pack(&lengths, room, seed));
        }

        // A row ends when nothing fits any more, so there are never two rows that would fit into one.
        #[test]
        fn no_two_rows_fit_into_one(lengths in prop::collection::vec(1_u32..60, 1..200), seed: u64) {
            let used: Vec<u32> = pack(&lengths, 64, seed)
                .iter()
                .map(|row| row.iter().map(|&unit| lengths[unit as usize]).sum())
                .collect();
            for (index, a) in used.iter().enumerate() {
                for b in &used[index + 1..] {
                    prop_assert!(a + b > 64);
                }
            }
        }
    }
}
