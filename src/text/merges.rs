//! Byte-pair merging: of all neighbours in a word that make a token, those of the lowest rank become one, the leftmost
//! first, until none do.
//!
//! Source: Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016, arXiv 1508.07909.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A word of up to so many tokens is searched through for each merge; in a longer one a heap knows the next.
const FEW: usize = 48;
/// No token, and no neighbour.
pub(super) const NONE: u32 = u32::MAX;
/// No pair.
const NO_PAIR: u64 = u64::MAX;

/// Pairs of tokens that merge, and the tokens of single bytes.
pub(super) struct Merges {
    /// The token of each byte, where it has one.
    bytes: [u32; 256],
    /// An open hash table of pairs (left · 2³² + right) and what they become (rank · 2³² + token).
    table: Box<[(u64, u64)]>,
}

/// What merging needs for its work, kept from word to word.
#[derive(Default)]
pub(super) struct Scratch {
    ids: Vec<u32>,
    /// For each token what it becomes with the one on its right.
    pairs: Vec<u64>,
    heap: BinaryHeap<Reverse<(u64, u32)>>,
    /// The neighbours of each token.
    around: Vec<(u32, u32)>,
}

impl Scratch {
    /// One token, as the outcome of merging.
    pub fn alone(&mut self, id: u32) -> &[u32] {
        self.ids.clear();
        self.ids.push(id);
        &self.ids
    }
}

impl Merges {
    /// `merges` has left, right and what they become, in the order of their rank; of equal pairs the last one counts.
    pub fn new(bytes: [u32; 256], merges: &[(u32, u32, u32)]) -> Self {
        let mut made =
            Self { bytes, table: vec![(NO_PAIR, NO_PAIR); (merges.len() * 3 / 2 + 1).next_power_of_two()].into() };
        for (rank, &(left, right, token)) in (0_u64..).zip(merges) {
            let at = made.slot(left, right);
            made.table[at] = (key(left, right), rank << 32 | u64::from(token));
        }
        made
    }

    /// Where the pair is in the table, or would be.
    fn slot(&self, left: u32, right: u32) -> usize {
        let mask = self.table.len() - 1;
        // Fibonacci hashing: the upper half of the product is mixed best
        let mut at = (key(left, right).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & mask;
        while self.table[at].0 != key(left, right) && self.table[at].0 != NO_PAIR {
            at = (at + 1) & mask;
        }
        at
    }

    fn pair(&self, left: u32, right: u32) -> u64 {
        self.table[self.slot(left, right)].1
    }

    /// The tokens of a word; a byte without a token is as if it weren't there.
    pub fn tokens<'a>(&self, word: &[u8], scratch: &'a mut Scratch) -> &'a [u32] {
        scratch.ids.clear();
        scratch.ids.extend(word.iter().map(|&byte| self.bytes[usize::from(byte)]).filter(|&id| id != NONE));
        scratch.pairs.clear();
        scratch.pairs.extend(scratch.ids.windows(2).map(|pair| self.pair(pair[0], pair[1])));
        if scratch.ids.len() <= FEW {
            self.merge_few(scratch);
        } else {
            self.merge_many(scratch);
        }
        &scratch.ids
    }

    fn merge_few(&self, Scratch { ids, pairs, .. }: &mut Scratch) {
        while let Some((at, &best)) = pairs.iter().enumerate().min_by_key(|&(_, &pair)| pair) // the first of equal ones
            && best != NO_PAIR
        {
            ids[at] = best as u32; // its lower half
            ids.remove(at + 1);
            pairs.remove(at);
            if at > 0 {
                pairs[at - 1] = self.pair(ids[at - 1], ids[at]);
            }
            if at < pairs.len() {
                pairs[at] = self.pair(ids[at], ids[at + 1]);
            }
        }
    }

    fn merge_many(&self, Scratch { ids, pairs, heap, around }: &mut Scratch) {
        let count = ids.len() as u32; // a text has fewer than 2³² bytes
        around.clear();
        around.extend((0..count).map(|at| (at.wrapping_sub(1), if at + 1 == count { NONE } else { at + 1 })));
        pairs.push(NO_PAIR);
        heap.clear();
        heap.extend(
            (0..count).zip(&*pairs).filter(|&(_, &pair)| pair != NO_PAIR).map(|(at, &pair)| Reverse((pair, at))),
        );
        while let Some(Reverse((pair, at))) = heap.pop() {
            let index = at as usize;
            if pairs[index] != pair {
                continue; // one of the two has merged with its other neighbour
            }
            let (before, right) = around[index];
            let after = around[right as usize].1;
            ids[index] = pair as u32;
            pairs[right as usize] = NO_PAIR;
            ids[right as usize] = NONE;
            around[index].1 = after;
            if after != NONE {
                around[after as usize].0 = at;
            }
            let mut renew = |left: u32, right: u32| {
                let joined = self.pair(ids[left as usize], ids[right as usize]);
                pairs[left as usize] = joined;
                if joined != NO_PAIR {
                    heap.push(Reverse((joined, left)));
                }
            };
            if before != NONE {
                renew(before, at);
            }
            if after == NONE {
                pairs[index] = NO_PAIR;
            } else {
                renew(at, after);
            }
        }
        ids.retain(|&id| id != NONE);
    }
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}
