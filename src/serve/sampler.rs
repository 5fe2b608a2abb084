//! One request's sampler: from a row of logits to a token.
//!
//! In this order: logit bias, penalties, what a format forbids, temperature, top-k, top-p, min-p; then one draw from the request's own random
//! stream, by inverting the cumulative distribution in the order of token ids. Nothing depends on the rest of the batch,
//! and a request consumes exactly one draw a token, so that the same seed and logits give the same tokens, alone or in
//! a crowd, preempted or not. Log-probabilities are those of the model, before any of this.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::constraint::Constraint;
use super::sampling::Sampling;
use crate::decoder::math::dispatched;
#[cfg(target_arch = "x86_64")]
use crate::quant::matmul::Path;
use crate::{Error, Result};

/// A chosen token and, if asked for, log-probabilities under the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The token's id.
    pub token: u32,
    /// Its log-probability under the model.
    pub logprob: Option<f32>,
    /// The likeliest tokens with their log-probabilities, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// The state of one request's sampling.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    constraint: Option<Constraint>,
    prompt: HashSet<u32>,
    counts: HashMap<u32, u32>,
}

impl Sampler {
    /// A sampler for an answer to `prompt`.
    pub fn new(sampling: Sampling, prompt: &[u32], constraint: Option<Constraint>) -> Self {
        let random = match sampling.seed {
            Some(seed) => ChaCha8Rng::seed_from_u64(seed),
            None => ChaCha8Rng::seed_from_u64(rand::rng().random()),
        };
        #[allow(clippy::float_cmp)] // 1 is the exact value that means "off"
        let penalised = sampling.repetition_penalty != 1.0;
        let prompt = if penalised { prompt.iter().copied().collect() } else { HashSet::new() };
        Self { sampling, random, constraint, prompt, counts: HashMap::new() }
    }

    /// A sampler for an answer to `prompt` of which some tokens are written already.
    pub fn going_on(sampling: Sampling, (prompt, answer): (&[u32], &[u32]), constraint: Option<Constraint>) -> Self {
        let mut sampler = Self::new(sampling, prompt, constraint);
        for &token in answer {
            *sampler.counts.entry(token).or_default() += 1;
        }
        sampler
    }

    /// The parameters.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Chooses the next token and remembers it. Fails when the logits are not numbers.
    pub fn choose(&mut self, logits: &[f32]) -> Result<Choice> {
        check(logits)?;
        let token = if self.sampling.temperature == 0.0 {
            let mut edited = Vec::new();
            likeliest(self.edited(logits, &mut edited)?)
        } else {
            let kept = self.distribution(logits)?;
            draw(&kept, self.random.random())
        };
        self.accept(token)?;
        let mut choice = Choice { token, logprob: None, top: Vec::new() };
        if let Some(count) = self.sampling.logprobs {
            let normaliser = log_sum_exp(logits);
            let logprob = |id: u32| (f64::from(logits[id as usize]) - normaliser) as f32;
            choice.logprob = Some(logprob(token));
            let mut best: Vec<(f64, u32)> = (0u32..).zip(logits).map(|(id, &logit)| (f64::from(logit), id)).collect();
            keep_largest(&mut best, count);
            choice.top = best.into_iter().map(|(_, id)| (id, logprob(id))).collect();
        }
        Ok(choice)
    }

    /// Notes that `token` is part of the answer, for the penalties and the format.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        *self.counts.entry(token).or_default() += 1;
        self.constraint.as_mut().map_or(Ok(()), |constraint| constraint.accept(token))
    }

    /// The tokens that may be drawn with their probabilities, in the order of ids; they sum to 1.
    pub fn probabilities(&mut self, logits: &[f32]) -> Result<Vec<(u32, f64)>> {
        check(logits)?;
        if self.sampling.temperature == 0.0 {
            let mut edited = Vec::new();
            return Ok(vec![(likeliest(self.edited(logits, &mut edited)?), 1.0)]);
        }
        let mut kept = self.distribution(logits)?;
        let total: f64 = kept.iter().map(|&(_, weight)| weight).sum();
        for (_, weight) in &mut kept {
            *weight /= total;
        }
        Ok(kept)
    }

    /// The logits after bias, penalties and format; copied only when there are any.
    fn edited<'a>(&mut self, logits: &'a [f32], copy: &'a mut Vec<f32>) -> Result<&'a [f32]> {
        let s = &self.sampling;
        #[allow(clippy::float_cmp)] // the exact values that mean "off"
        let repeated = s.repetition_penalty != 1.0;
        let counted = s.presence_penalty != 0.0 || s.frequency_penalty != 0.0;
        if s.logit_bias.is_empty() && !repeated && !counted && self.constraint.is_none() {
            return Ok(logits);
        }
        copy.extend_from_slice(logits);
        for &(token, bias) in &s.logit_bias {
            if let Some(logit) = copy.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if repeated {
            let unseen = self.counts.keys().filter(|token| !self.prompt.contains(token));
            for &token in self.prompt.iter().chain(unseen) {
                if let Some(logit) = copy.get_mut(token as usize) {
                    *logit = if *logit > 0.0 { *logit / s.repetition_penalty } else { *logit * s.repetition_penalty };
                }
            }
        }
        if counted {
            for (&token, &count) in &self.counts {
                if let Some(logit) = copy.get_mut(token as usize) {
                    *logit -= s.presence_penalty + s.frequency_penalty * count as f32;
                }
            }
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.forbid(copy)?;
        }
        Ok(copy)
    }

    /// The tokens that are kept and their weights relative to the likeliest (which has 1), in the order of ids.
    fn distribution(&mut self, logits: &[f32]) -> Result<Vec<(u32, f64)>> {
        let mut copy = Vec::new();
        let logits = self.edited(logits, &mut copy)?;
        let s = &self.sampling;
        let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let temperature = f64::from(s.temperature);
        // The largest is subtracted before dividing: no temperature, however small, overflows.
        let weight = |logit: f32| ((f64::from(logit) - largest) / temperature).exp();
        let mut kept: Vec<(f64, u32)> = (0u32..).zip(logits).map(|(id, &logit)| (weight(logit), id)).collect();
        if s.top_k > 0 && s.top_k < kept.len() {
            keep_largest(&mut kept, s.top_k);
        }
        if s.top_p < 1.0 {
            keep_mass(&mut kept, f64::from(s.top_p));
        }
        if s.min_p > 0.0 {
            // The likeliest has weight 1.
            kept.retain(|&(weight, _)| weight >= f64::from(s.min_p));
        }
        kept.sort_unstable_by_key(|&(_, id)| id);
        Ok(kept.into_iter().map(|(weight, id)| (id, weight)).collect())
    }
}

fn check(logits: &[f32]) -> Result<()> {
    let mut found = (0.0, false);
    survey(logits, &mut found);
    if !found.1 && found.0 < f32::INFINITY && found.0 > f32::NEG_INFINITY {
        return Ok(());
    }
    Err(Error::failure("the model's logits are not finite numbers")
        .hint("the weights or an adapter hold NaN or infinite values"))
}

dispatched! {
    /// The largest of the logits that are numbers, and whether there are others.
    survey(logits: &[f32], found: &mut (f32, bool)) {
        let (mut largest, mut others) = ([f32::NEG_INFINITY; 64], [0u32; 64]);
        let (whole, rest) = logits.as_chunks::<64>();
        for logits in whole {
            for lane in 0..64 {
                largest[lane] = if logits[lane] > largest[lane] { logits[lane] } else { largest[lane] };
                others[lane] |= u32::from(logits[lane].is_nan());
            }
        }
        found.0 = largest.iter().chain(rest).fold(f32::NEG_INFINITY, |largest, &logit| largest.max(logit));
        found.1 = others.iter().any(|&others| others > 0) || rest.iter().any(|logit| logit.is_nan());
    }
}

dispatched! {
    /// The first place of a number, or 0.
    position(logits: &[f32], number: f32, found: &mut usize) {
        // without a way out of a chunk, all of it is looked at together
        let here = |chunk: &[f32]| chunk.iter().fold(0, |here, &logit| here | u32::from(logit == number)) > 0;
        let begin = 256 * logits.chunks(256).position(here).unwrap_or(0);
        *found = begin + logits[begin..].iter().position(|&logit| logit == number).unwrap_or(0);
    }
}

/// Larger weights first, and the smaller id among equals.
fn descending(a: &(f64, u32), b: &(f64, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The id of the largest logit, the smallest id among equals.
fn likeliest(logits: &[f32]) -> u32 {
    let (mut found, mut place) = ((0.0, false), 0);
    survey(logits, &mut found);
    position(logits, found.0, &mut place);
    place as u32
}

/// Keeps the `count` largest, sorted.
fn keep_largest(kept: &mut Vec<(f64, u32)>, count: usize) {
    if count < kept.len() {
        if count > 0 {
            kept.select_nth_unstable_by(count - 1, descending);
        }
        kept.truncate(count);
    }
    kept.sort_unstable_by(descending);
}

/// Keeps the largest that together reach `share` of the total, at least one. Sorts only as much as needed.
fn keep_mass(kept: &mut Vec<(f64, u32)>, share: f64) {
    let goal = share * kept.iter().map(|&(weight, _)| weight).sum::<f64>();
    let mut sorted = 64;
    loop {
        if sorted < kept.len() {
            kept.select_nth_unstable_by(sorted - 1, descending);
        }
        let end = sorted.min(kept.len());
        kept[..end].sort_unstable_by(descending);
        let mut mass = 0.0;
        for index in 0..end {
            mass += kept[index].0;
            if mass >= goal {
                kept.truncate(index + 1);
                return;
            }
        }
        if end == kept.len() {
            return;
        }
        sorted *= 4;
    }
}

/// The token at `point` (0 to 1) of the cumulative distribution.
fn draw(kept: &[(u32, f64)], point: f64) -> u32 {
    let goal = point * kept.iter().map(|&(_, weight)| weight).sum::<f64>();
    let mut mass = 0.0;
    let mut last = 0;
    for &(id, weight) in kept {
        if weight > 0.0 {
            mass += weight;
            last = id;
            if mass > goal {
                break;
            }
        }
    }
    last
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    largest + logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sampler(change: impl FnOnce(&mut Sampling)) -> Sampler {
        let mut sampling = Sampling { seed: Some(1), ..Sampling::default() };
        change(&mut sampling);
        Sampler::new(sampling, &[2, 3], None)
    }

    #[test]
    fn the_draws_follow_the_distribution() {
        let logits = [0.0f32, 1.0, -1.0, 2.0, 0.5];
        let mut sampler = sampler(|s| s.temperature = 0.7);
        let expected = sampler.probabilities(&logits).unwrap();
        let mut counts = [0u32; 5];
        let draws = 20_000;
        for _ in 0..draws {
            counts[sampler.choose(&logits).unwrap().token as usize] += 1;
        }
        for (id, probability) in expected {
            let seen = f64::from(counts[id as usize]) / f64::from(draws);
            // Five standard deviations.
            assert!(
                (seen - probability).abs() < 5.0 * (probability / f64::from(draws)).sqrt(),
                "{id}: {seen} {probability}"
            );
        }
    }

    #[test]
    fn a_seed_repeats_itself_and_seeds_differ() {
        let logits: Vec<f32> = (0..97).map(|i| (i as f32 * 0.7).sin()).collect();
        let answer = |seed| {
            let mut sampler = sampler(|s| s.seed = Some(seed));
            (0..20).map(|_| sampler.choose(&logits).unwrap().token).collect::<Vec<_>>()
        };
        assert_eq!(answer(7), answer(7));
        assert_ne!(answer(7), answer(8));
    }

    #[test]
    fn penalties_and_bias_change_what_is_likeliest() {
        let logits = [1.0f32, 0.9, 3.0, -0.1];
        let greedy = |change: fn(&mut Sampling)| {
            let mut sampler = sampler(|s| {
                s.temperature = 0.0;
                change(s);
            });
            (0..3).map(|_| sampler.choose(&logits).unwrap().token).collect::<Vec<_>>()
        };
        assert_eq!(greedy(|_| {}), [2, 2, 2]);
        // The prompt holds 2 and 3: 3 / 4 < 0.9; then 1 / 4, and 0.9 is the largest.
        assert_eq!(greedy(|s| s.repetition_penalty = 4.0), [0, 1, 2]);
        assert_eq!(greedy(|s| s.presence_penalty = 1.9), [2, 2, 2]);
        assert_eq!(greedy(|s| s.frequency_penalty = 1.5), [2, 2, 0]);
        assert_eq!(greedy(|s| s.logit_bias = vec![(2, -100.0)]), [0, 0, 0]);
    }

    #[test]
    fn logits_that_are_no_numbers_are_an_error() {
        for logits in [[0.0, f32::NAN], [f32::INFINITY, 0.0], [f32::NEG_INFINITY; 2]] {
            assert!(sampler(|_| {}).choose(&logits).is_err());
        }
        assert_eq!(sampler(|_| {}).choose(&[f32::NEG_INFINITY, -3e38]).unwrap().token, 1);
    }

    proptest! {
        /// The first of the largest is found wherever it is, and what is not a number, too.
        #[test]
        fn every_place_is_looked_at(
            // few values, so that there are equals
            logits in prop::collection::vec((-9i8..9).prop_map(f32::from), 1..700),
            place: prop::sample::Index,
        ) {
            let mut first = 0;
            for (id, &logit) in logits.iter().enumerate() {
                if logit > logits[first] {
                    first = id;
                }
            }
            let mut sampler = sampler(|s| s.temperature = 0.0);
            prop_assert_eq!(sampler.choose(&logits).unwrap().token, first as u32);
            let place = place.index(logits.len());
            for (value, fails) in [(10.0, false), (f32::NAN, true), (f32::INFINITY, true)] {
                let mut logits = logits.clone();
                logits[place] = value;
                match sampler.choose(&logits) {
                    Ok(choice) => prop_assert!(!fails && choice.token == place as u32),
                    Err(_) => prop_assert!(fails),
                }
            }
        }

        /// Top-k, top-p and min-p keep what their definitions say, on any logits.
        #[test]
        fn kept_tokens_are_those_of_the_definitions(
            logits in prop::collection::vec(-8.0f32..8.0, 1..300),
            top_k in 0usize..40,
            top_p in 0.0f32..=1.0,
            min_p in 0.0f32..0.9,
            temperature in 0.05f32..3.0,
        ) {
            let mut sampler = sampler(|s| (s.top_k, s.top_p, s.min_p, s.temperature) = (top_k, top_p, min_p, temperature));
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
            let best = logits[order[0] as usize];
            let weight = |id: u32| ((f64::from(logits[id as usize]) - f64::from(best)) / f64::from(temperature)).exp();
            if top_k > 0 {
                order.truncate(top_k);
            }
            let total: f64 = order.iter().map(|&id| weight(id)).sum();
            let mut mass = 0.0;
            let mut expected = Vec::new();
            for id in order {
                expected.push(id);
                mass += weight(id);
                if mass >= f64::from(top_p) * total && top_p < 1.0 {
                    break;
                }
            }
            let margin = |id: &u32| (weight(*id) - f64::from(min_p)).abs() < 1e-5;
            prop_assume!(!expected.iter().any(margin));
            expected.retain(|&id| weight(id) >= f64::from(min_p));
            expected.sort_unstable();
            let kept = sampler.probabilities(&logits).unwrap();
            prop_assert_eq!(kept.iter().map(|&(id, _)| id).collect::<Vec<_>>(), expected);
            prop_assert!((kept.iter().map(|&(_, p)| p).sum::<f64>() - 1.0).abs() < 1e-9);
        }

        #[test]
        fn logprobs_are_those_of_the_model_whatever_the_sampling(
            logits in prop::collection::vec(-8.0f32..8.0, 3..50), temperature in 0.0f32..3.0, top in 0usize..5,
        ) {
            let mut sampler = sampler(|s| (s.temperature, s.logprobs, s.logit_bias) = (temperature, Some(top), vec![(1, 3.0)]));
            let choice = sampler.choose(&logits).unwrap();
            let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
            let expected = f64::from(logits[choice.token as usize]) - total.ln();
            prop_assert!((f64::from(choice.logprob.unwrap()) - expected).abs() < 1e-4);
            prop_assert_eq!(choice.top.len(), top.min(logits.len()));
            prop_assert!(choice.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        }
    }
}
