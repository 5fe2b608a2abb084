//! Tokens that probably come next, looked up in what a sequence has already: prompts are quoted, code repeats itself.
//!
//! ```text
//! … a b c d e … a b c        the last tokens stood before:  draft d e …
//! ```
//! The model computes a draft's tokens in one step with the one before them. Then the request's own sampler chooses a token
//! from each row of logits, one draw a token, as it would without drafts; as long as what it chooses is what was drafted,
//! the next row is the right one. So the answer is the same, token by token and for every seed, at any temperature, under
//! any adapter and any format; what differs is how many tokens a step brings.
//!
//! Source: Saxena, Prompt Lookup Decoding, 2023; Leviathan et al., Fast Inference from Transformers via Speculative
//! Decoding, 2023, arXiv 2211.17192 (a draft that is certain of itself is accepted with the model's probability of it).

/// Most and fewest tokens that must have stood before.
const MATCH: std::ops::RangeInclusive<usize> = 2..=4;

/// Up to `most` tokens that followed when the last ones stood before; of several places, the last.
pub fn look_up(tokens: &[u32], most: usize) -> &[u32] {
    for length in MATCH.rev() {
        let Some(start) = tokens.len().checked_sub(length) else { continue };
        let (before, last) = (&tokens[..tokens.len() - 1], &tokens[start..]);
        if let Some(place) = before.windows(length).rposition(|window| window == last) {
            let next = place + length;
            return &tokens[next..tokens.len().min(next + most)];
        }
    }
    &[]
}

/// How far a sequence's drafts are trusted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trust {
    /// Steps to go without a draft.
    pause: u32,
    /// Drafts in a row of which nothing was right.
    wrong: u32,
    /// Tokens of a draft, once one was right.
    length: usize,
}

impl Trust {
    /// Most tokens of the next draft, at most `most`. Called once a step.
    pub fn most(&mut self, most: usize) -> usize {
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        self.length.clamp(2, most.max(2)).min(most)
    }

    /// Of so many drafted tokens, so many were right.
    pub fn learn(&mut self, drafted: usize, right: usize) {
        if right == 0 {
            // twice as long each time, so that drafts that don't help cost little
            self.wrong = (self.wrong + 1).min(5);
            self.pause = (1 << self.wrong) - 1;
            self.length = 2;
        } else {
            self.wrong = 0;
            self.length = if right == drafted { 2 * drafted } else { right + 1 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_before_is_drafted() {
        assert_eq!(look_up(&[1, 2, 3, 4, 9, 1, 2], 2), [3, 4]);
        assert_eq!(look_up(&[1, 2, 3, 4, 9, 1, 2], 9), [3, 4, 9, 1, 2]);
        // The longer match goes before the later one.
        assert_eq!(look_up(&[7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], 1), [5]);
        assert_eq!(look_up(&[1, 2, 5, 8, 1, 2, 6, 1, 2], 1), [6]);
        // It may run into itself.
        assert_eq!(look_up(&[4, 4, 4], 3), [4]);
        assert!(look_up(&[1, 2, 3], 4).is_empty() && look_up(&[], 4).is_empty() && look_up(&[1], 4).is_empty());
    }

    #[test]
    fn trust_grows_with_success_and_pauses_without() {
        let mut trust = Trust::default();
        let mut lengths = Vec::new();
        for _ in 0..4 {
            let most = trust.most(12);
            lengths.push(most);
            trust.learn(most, most);
        }
        assert_eq!(lengths, [2, 4, 8, 12]);
        let mut tried = 0;
        for _ in 0..100 {
            if trust.most(12) > 0 {
                tried += 1;
                trust.learn(2, 0);
            }
        }
        assert!((5..9).contains(&tried), "{tried}");
        assert_eq!(trust.most(0), 0);
    }
}
