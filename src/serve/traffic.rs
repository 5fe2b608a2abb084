//! Who asks whom for how much: answers and tokens by key and model, and the time between an answer's tokens.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, PoisonError, RwLock};

use super::metrics::{Durations, Number};

/// Pairs of key and model that are counted apart; the rest is counted together.
const MOST: usize = 2_000;

/// The numbers of one pair.
#[derive(Debug, Default)]
pub struct Counts {
    /// Answers asked for.
    pub requests: Number,
    /// Tokens of prompts.
    pub prompt_tokens: Number,
    /// Tokens of answers.
    pub generated_tokens: Number,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Traffic {
    counts: RwLock<BTreeMap<(String, String), Arc<Counts>>>,
    /// The time between two pieces of an answer.
    pub between_tokens: Durations,
    /// Requests that a key's limits refused.
    pub limited: Number,
}

impl Traffic {
    /// The numbers of a key and a model.
    pub fn of(&self, key: &str, model: &str) -> Arc<Counts> {
        let pair = (key.to_owned(), model.to_owned());
        if let Some(found) = self.counts.read().unwrap_or_else(PoisonError::into_inner).get(&pair) {
            return Arc::clone(found);
        }
        let mut counts = self.counts.write().unwrap_or_else(PoisonError::into_inner);
        let pair = if counts.len() < MOST { pair } else { ("other".to_owned(), "other".to_owned()) };
        Arc::clone(counts.entry(pair).or_default())
    }

    /// Answers and tokens of a model, whoever asked: (requests, prompt tokens, generated tokens).
    pub fn model(&self, model: &str) -> (u64, u64, u64) {
        let counts = self.counts.read().unwrap_or_else(PoisonError::into_inner);
        counts.iter().filter(|((_, name), _)| name == model).fold((0, 0, 0), |sum, (_, counts)| {
            let (requests, prompt) = (sum.0 + counts.requests.get(), sum.1 + counts.prompt_tokens.get());
            (requests, prompt, sum.2 + counts.generated_tokens.get())
        })
    }

    /// Prometheus' text format.
    pub fn prometheus(&self) -> String {
        type Part = (&'static str, &'static str, fn(&Counts) -> &Number);
        const PARTS: [Part; 3] = [
            ("ftkit_model_requests_total", "answers asked for, by key and model", |counts| &counts.requests),
            ("ftkit_model_prompt_tokens_total", "tokens of prompts, by key and model", |counts| &counts.prompt_tokens),
            ("ftkit_model_generated_tokens_total", "tokens of answers, by key and model", |counts| {
                &counts.generated_tokens
            }),
        ];
        let mut text = String::new();
        let counts = self.counts.read().unwrap_or_else(PoisonError::into_inner);
        for (name, help, number) in PARTS {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
            for ((key, model), counts) in counts.iter() {
                let (key, model) = (escaped(key), escaped(model));
                let _ = writeln!(text, "{name}{{key=\"{key}\",model=\"{model}\"}} {}", number(counts).get());
            }
        }
        let name = "ftkit_requests_limited_total";
        let _ = writeln!(text, "# HELP {name} requests that a key's limits refused\n# TYPE {name} counter");
        let _ = writeln!(text, "{name} {}", self.limited.get());
        self.between_tokens.write(&mut text, "ftkit_inter_token_seconds", "time between two pieces of an answer");
        text
    }
}

/// A label's value, as the format wants it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_by_pair_and_labels_are_escaped() {
        let traffic = Traffic::default();
        traffic.of("a", "m\"\n").generated_tokens.add(3);
        traffic.of("b", "m\"\n").generated_tokens.add(4);
        let text = traffic.prometheus();
        assert!(text.contains("ftkit_model_generated_tokens_total{key=\"a\",model=\"m\\\"\\n\"} 3\n"), "{text}");
        assert_eq!(traffic.model("m\"\n").2, 7);
        for number in 0..MOST + 5 {
            traffic.of("k", &number.to_string()).requests.add(1);
        }
        assert_eq!(traffic.of("other", "other").requests.get(), 7);
    }
}
