//! Whether what runs and one more will have room until all of them end.
//!
//! The peak of S-LoRA, in pages: when sequence i takes its last step, those that outlive it have grown by as many steps.
//!
//! ```text
//! need = shared + max_i Σ_{j ends no earlier than i} pages_j(steps of i)
//! pages_j(s) = ⌈(tokens_j + min(more_j, rate_j · s)) / block_tokens⌉ − shared_j
//! ```
//! It is exact where each sequence gets one token a step from now on. A prompt that has to wait for its chunks may start
//! later, and drafts may bring several tokens a step: then it is an upper bound, since the slowest ending and the fastest
//! growth are taken. Pages that several hold are counted once, and as if they were held to the end.
//!
//! Source: Sheng et al., S-LoRA: Serving Thousands of Concurrent LoRA Adapters, 2023, arXiv 2311.03285.

/// A sequence, as far as its pages are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Tokens that it has pages for now, or is about to.
    pub tokens: usize,
    /// Tokens that it may still need room for.
    pub more: usize,
    /// Steps that may pass at most before it starts to grow.
    pub delay: usize,
    /// Tokens by which it may grow in a step.
    pub rate: usize,
    /// Pages that it holds together with others.
    pub shared: usize,
}

/// Most pages that all of them hold at the same time; `shared` is the number of pages that several of them hold.
pub fn peak(loads: &[Load], shared: usize, block_tokens: usize) -> usize {
    let ends = |load: &Load| load.more + load.delay;
    let at = |steps: usize| -> usize {
        let alive = loads.iter().filter(|load| ends(load) >= steps);
        let pages = |load: &Load| {
            let grown = load.tokens + load.more.min(load.rate.saturating_mul(steps));
            grown.div_ceil(block_tokens).saturating_sub(load.shared)
        };
        alive.map(pages).sum()
    };
    shared + loads.iter().map(|load| at(ends(load))).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn load(tokens: usize, more: usize) -> Load {
        Load { tokens, more, delay: 0, rate: 1, shared: 0 }
    }

    #[test]
    fn the_formula_of_the_paper() {
        // Sorted by what is left: 10 and 4; max(10 · 1 + 5, 4 · 2 + 5 + 7) = 20.
        assert_eq!(peak(&[load(5, 10), load(7, 4)], 0, 1), 20);
        assert_eq!(peak(&[], 0, 1), 0);
    }

    proptest! {
        /// Without delays it is what counting step by step comes to; with them, and with drafts, no course exceeds it.
        #[test]
        fn no_course_of_events_needs_more(
            loads in prop::collection::vec((1usize..40, 0usize..30, 0usize..6, 1usize..4), 1..9),
            block_tokens in 1usize..6,
            seed in any::<u64>(),
        ) {
            let exact: Vec<Load> = loads.iter().map(|&(tokens, more, _, _)| load(tokens, more)).collect();
            let pages = |tokens: usize| tokens.div_ceil(block_tokens);
            let counted = (0..40).map(|step| {
                exact.iter().filter(|l| l.more >= step).map(|l| pages(l.tokens + step)).sum::<usize>()
            });
            prop_assert_eq!(peak(&exact, 0, block_tokens), counted.max().unwrap());

            let late: Vec<Load> =
                loads.iter().map(|&(tokens, more, delay, rate)| Load { delay, rate, ..load(tokens, more) }).collect();
            let bound = peak(&late, 0, block_tokens);
            // Each starts when it likes and grows as it likes, at least by one token a step.
            let mut random = seed;
            let mut draw = |below: usize| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 33) as usize % below.max(1)
            };
            let starts: Vec<usize> = late.iter().map(|l| draw(l.delay + 1)).collect();
            let mut grown: Vec<Option<usize>> = vec![Some(0); late.len()];
            for step in 0..50 {
                let used: usize = late.iter().zip(&grown).filter_map(|(l, g)| g.map(|g| pages(l.tokens + g))).sum();
                prop_assert!(used <= bound, "{} pages in step {}, expected at most {}", used, step, bound);
                for ((l, grown), &start) in late.iter().zip(&mut grown).zip(&starts) {
                    *grown = match *grown {
                        Some(now) if step < start => Some(now),
                        Some(now) if now < l.more => Some((now + 1 + draw(l.rate)).min(l.more)),
                        _ => None,
                    };
                }
            }
        }
    }
}
