//! Packing: which sequences share a row of a batch.
//!
//! Best fit decreasing over a window: the longest sequence first, each into the fullest row that still has room. Rows have
//! no padding and no leaks (attention knows the boundaries), so a row is only a portion of work of about equal size.
//! Source: Johnson, Near-optimal bin packing algorithms, 1973; for language models Ding et al., Fewer Truncations
//! Improve Language Modeling, 2024, arXiv 2404.10830.

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
    let length = |unit: u32| lengths[unit as usize];
    let mut longest_first = window.to_vec();
    longest_first.sort_by_key(|&unit| std::cmp::Reverse(length(unit))); // stable: ties stay shuffled
    let mut rows: Vec<Vec<u32>> = Vec::new();
    let mut with_room: BTreeMap<u32, Vec<usize>> = BTreeMap::new(); // free tokens → rows
    for unit in longest_first {
        let needed = length(unit);
        let fullest = with_room.range(needed..).next().map(|(&free, _)| free);
        let (row, free) = match fullest.and_then(|free| Some((with_room.get_mut(&free)?.pop()?, free))) {
            Some((row, free)) => {
                if with_room.get(&free).is_some_and(Vec::is_empty) {
                    with_room.remove(&free);
                }
                (row, free)
            }
            None => {
                rows.push(Vec::new());
                (rows.len() - 1, room)
            }
        };
        rows[row].push(unit);
        let left = free.saturating_sub(needed);
        if left > 0 {
            with_room.entry(left).or_default().push(row);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fill(lengths: &[u32], room: u32, rows: &[Vec<u32>]) -> f64 {
        f64::from(lengths.iter().sum::<u32>()) / (rows.len() as f64 * f64::from(room))
    }

    #[test]
    fn chat_lengths_fill_99_percent() {
        // lognormal: median 180, sigma 0.7, capped at 1,024; by Box and Muller's transform
        use rand::Rng;
        let mut dice = ChaCha8Rng::seed_from_u64(7);
        let mut normal = || {
            let (u, v): (f64, f64) = (dice.random_range(f64::EPSILON..1.0), dice.random());
            (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
        };
        let lengths: Vec<u32> =
            (0..50_000).map(|_| (180.0 * (0.7 * normal()).exp()).clamp(1.0, 1024.0) as u32).collect();
        let rows = pack(&lengths, 4096, 0);
        assert!(fill(&lengths, 4096, &rows) >= 0.99, "{}", fill(&lengths, 4096, &rows));
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

        // Best fit decreasing never leaves two rows that would fit into one.
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
