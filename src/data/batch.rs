//! Packed rows as the arrays of a ragged batch.

use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::cache::{Cache, Sequence};
use super::pack::pack;
use crate::error::{Error, Result};

/// A target that is not trained on.
const UNTRAINED: i32 = -100;

/// The packed rows of a dataset, or of its held-out part.
#[derive(Clone, Debug)]
pub struct Part {
    cache: Arc<Cache>,
    /// Row → its groups → indices of their sequences.
    rows: Vec<Vec<Vec<u32>>>,
    units: usize,
    tokens: u64,
    room: u32,
    /// Sequences leave out what they share with the first of their unit.
    share: bool,
}

/// Where the arrays of a batch are written; lengths as [`Part::sizes`] says.
pub struct Arrays<'a> {
    /// Token ids, [tokens].
    pub tokens: &'a mut [i32],
    /// The token that follows, or −100 where it isn't trained on or the sequence ends, [tokens].
    pub targets: &'a mut [i32],
    /// Positions within the sequence, [tokens].
    pub positions: &'a mut [i32],
    /// Where sequences begin, and the end, [sequences + 1].
    pub cu_seqlens: &'a mut [i32],
    /// Equal for sequences that belong together, [sequences].
    pub group: &'a mut [i32],
    /// The task of each sequence, [sequences].
    pub task: &'a mut [i32],
}

impl Part {
    /// Splits a dataset into what is trained on and what is held out, and packs both into rows of `room` tokens.
    ///
    /// About `held_out` of the units are held out, chosen by `seed` and their content, so that equal rows are on the same
    /// side. Units that follow one another in the files belong together as long as they have at most `together`
    /// sequences; 1 leaves every unit alone. Rows of sequences that belong together may be longer than `room`. With `share`,
    /// what the sequences of a unit have in common at their beginning stands in the first one alone.
    pub fn split(
        cache: &Arc<Cache>,
        room: u32,
        seed: u64,
        held_out: f64,
        together: usize,
        share: bool,
    ) -> (Self, Option<Self>) {
        let mut units: Vec<(u64, Vec<u32>)> = Vec::new(); // content, sequences
        for (index, sequence) in (0_u32..).zip(cache.sequences()) {
            match units.get_mut(sequence.unit as usize) {
                Some((_, sequences)) => sequences.push(index),
                None => units.push((sequence.content, vec![index])),
            }
        }
        let rank = |content: u64| {
            let hash = blake3::hash(&[seed.to_le_bytes(), content.to_le_bytes()].concat());
            u64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap_or_default())
        };
        let mut ranks: Vec<u64> = units.iter().map(|(content, _)| rank(*content)).collect();
        ranks.sort_unstable();
        let count = if held_out > 0.0 { ((units.len() as f64 * held_out).round() as usize).max(1) } else { 0 };
        let below = ranks.get(count).copied().unwrap_or(u64::MAX);
        let (held, kept): (Vec<_>, Vec<_>) =
            units.into_iter().partition(|(content, _)| count > 0 && rank(*content) < below);
        let part = |units: Vec<(u64, Vec<u32>)>| {
            Self::packed(cache, units.into_iter().map(|(_, unit)| unit).collect(), room, seed, together, share)
        };
        let evaluation = if held.is_empty() { None } else { Some(part(held)) };
        (part(kept), evaluation)
    }

    fn packed(cache: &Arc<Cache>, units: Vec<Vec<u32>>, room: u32, seed: u64, together: usize, share: bool) -> Self {
        let count = units.len();
        let groups = grouped(units, together);
        let length = |index: &u32| own(&cache.sequences()[*index as usize], share);
        let lengths: Vec<u32> = groups.iter().map(|sequences| sequences.iter().map(length).sum()).collect();
        let rows = pack(&lengths, room, seed)
            .into_iter()
            .map(|row| row.into_iter().map(|group| groups[group as usize].clone()).collect())
            .collect();
        let tokens = lengths.iter().map(|&length| u64::from(length)).sum();
        Self { cache: cache.clone(), rows, units: count, tokens, room, share }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// How many examples there are.
    pub fn units(&self) -> usize {
        self.units
    }

    /// Tokens in all rows.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The share of the rows' room that holds tokens.
    pub fn fill(&self) -> f64 {
        let room = self.rows.len() as f64 * f64::from(self.room);
        if room > 0.0 { self.tokens as f64 / room } else { 0.0 }
    }

    /// The rows in the order of the `pass`-th pass; it depends on `seed` and `pass` alone.
    pub fn order(&self, seed: u64, pass: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        let mut dice = ChaCha8Rng::seed_from_u64(seed);
        dice.set_stream(pass + 1); // stream 0 has shuffled the units
        order.shuffle(&mut dice);
        order
    }

    /// The lengths of the sequences in `rows`, in order.
    pub fn lengths(&self, rows: &[usize]) -> Result<Vec<u32>> {
        let mut lengths = Vec::new();
        for &row in rows {
            lengths.extend(self.row(row)?.map(|index| own(&self.cache.sequences()[index as usize], self.share)));
        }
        Ok(lengths)
    }

    /// How many tokens each of the sequences in `rows` leaves out, in order.
    pub fn shared(&self, rows: &[usize]) -> Result<Vec<u32>> {
        let mut counts = Vec::new();
        for &row in rows {
            let sequence = |index| &self.cache.sequences()[index as usize];
            counts.extend(self.row(row)?.map(|index| sequence(index).length - own(sequence(index), self.share)));
        }
        Ok(counts)
    }

    /// How many targets of `rows` are trained on.
    pub fn trained(&self, rows: &[usize]) -> Result<usize> {
        let mut count = 0;
        for &row in rows {
            for index in self.row(row)? {
                let tokens = self.cache.tokens(&self.cache.sequences()[index as usize]);
                count += tokens.skip(1).filter(|&(_, trained)| trained).count();
            }
        }
        Ok(count)
    }

    /// Tokens and sequences in `rows` together.
    pub fn sizes(&self, rows: &[usize]) -> Result<(usize, usize)> {
        let mut sizes = (0, 0);
        for &row in rows {
            for index in self.row(row)? {
                sizes.0 += own(&self.cache.sequences()[index as usize], self.share) as usize;
                sizes.1 += 1;
            }
        }
        Ok(sizes)
    }

    /// Writes `rows`, one after the other.
    ///
    /// # Errors
    /// A row that doesn't exist, or arrays of other lengths than [`Part::sizes`] says.
    pub fn write(&self, rows: &[usize], out: &mut Arrays<'_>) -> Result<()> {
        let (tokens, sequences) = self.sizes(rows)?;
        for (name, length, expected) in [
            ("tokens", out.tokens.len(), tokens),
            ("targets", out.targets.len(), tokens),
            ("positions", out.positions.len(), tokens),
            ("cu_seqlens", out.cu_seqlens.len(), sequences + 1),
            ("group", out.group.len(), sequences),
            ("task", out.task.len(), sequences),
        ] {
            if length != expected {
                return Err(Error::failure(format!("{name}: expected {expected} elements, got {length}")));
            }
        }
        let (mut at, mut number) = (0, 0);
        out.cu_seqlens[0] = 0;
        for (group, &(row, place)) in self.groups(rows)?.iter().enumerate() {
            for &index in &self.rows[row][place] {
                let sequence = &self.cache.sequences()[index as usize];
                let start = at;
                let shared = (sequence.length - own(sequence, self.share)) as usize;
                for (position, (id, trained)) in self.cache.tokens(sequence).enumerate().skip(shared) {
                    out.tokens[at] = id.cast_signed();
                    out.positions[at] = i32::try_from(position).unwrap_or(i32::MAX);
                    out.targets[at] = UNTRAINED;
                    if trained && at > start {
                        out.targets[at - 1] = id.cast_signed();
                    }
                    at += 1;
                }
                out.group[number] = i32::try_from(group).unwrap_or(i32::MAX); // fewer than tokens, of which there are 2^31
                out.task[number] = sequence.task.cast_signed();
                number += 1;
                out.cu_seqlens[number] = i32::try_from(at)
                    .map_err(|_| Error::input("expected a batch of fewer than 2^31 tokens, got more"))?;
            }
        }
        Ok(())
    }

    /// The groups in `rows`: row, and place in it.
    fn groups(&self, rows: &[usize]) -> Result<Vec<(usize, usize)>> {
        let mut found = Vec::new();
        for &row in rows {
            found.extend((0..self.known(row)?.len()).map(|place| (row, place)));
        }
        Ok(found)
    }

    /// The indices of a row's sequences.
    fn row(&self, row: usize) -> Result<impl Iterator<Item = u32> + '_> {
        Ok(self.known(row)?.iter().flatten().copied())
    }

    fn known(&self, row: usize) -> Result<&[Vec<u32>]> {
        let missing = || Error::failure(format!("expected a row below {}, got {row}", self.rows.len()));
        self.rows.get(row).map(Vec::as_slice).ok_or_else(missing)
    }
}

/// How many tokens a sequence has in a row.
fn own(sequence: &Sequence, share: bool) -> u32 {
    if share { sequence.length.saturating_sub(sequence.shared) } else { sequence.length }
}

/// Units one after another as groups of at most `together` sequences, in the order of the files.
///
/// Where there are several units, a group that takes more than one has more than one.
fn grouped(units: Vec<Vec<u32>>, together: usize) -> Vec<Vec<u32>> {
    let mut groups: Vec<Vec<Vec<u32>>> = Vec::new();
    for unit in units {
        match groups.last_mut() {
            Some(last) if last.iter().map(Vec::len).sum::<usize>() + unit.len() <= together => last.push(unit),
            _ => groups.push(vec![unit]),
        }
    }
    if let [.., before, last] = groups.as_mut_slice()
        && last.len() == 1
        && before.len() > 2
    {
        last.extend(before.pop());
        last.reverse();
    }
    groups.into_iter().map(|group| group.concat()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_grouped_in_the_order_of_the_files() {
        let pairs = |count: u32| (0..count).map(|unit| vec![2 * unit, 2 * unit + 1]).collect::<Vec<_>>();
        assert_eq!(grouped(pairs(3), 1), pairs(3));
        assert_eq!(grouped(pairs(1), 8), pairs(1));
        assert_eq!(grouped(pairs(7), 8), [(0..8).collect::<Vec<_>>(), (8..14).collect()]);
        assert_eq!(grouped(pairs(5), 8), [(0..6).collect::<Vec<_>>(), (6..10).collect()], "nobody is left alone");
        let alone: Vec<Vec<u32>> = (0..9).map(|unit| vec![unit]).collect();
        assert_eq!(grouped(alone, 8), [(0..7).collect::<Vec<_>>(), vec![7, 8]]);
    }
}
