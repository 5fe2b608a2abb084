//! How a request wants its tokens chosen, and the bounds that keep the choice meaningful.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Most stop strings a request may have.
pub const MAX_STOPS: usize = 16;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;
/// Most entries of a logit bias.
pub const MAX_BIASES: usize = 1024;
/// Most alternatives reported with each token.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// A request's sampling parameters. The default is the model's own distribution, unchanged.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// Most tokens to generate; the rest of the context when not given.
    pub max_tokens: Option<usize>,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps the k likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the likeliest tokens that together reach this probability.
    pub top_p: f32,
    /// Keeps tokens at least this share as likely as the likeliest.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the answer (Keskar et al., CTRL, 2019).
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the answer.
    pub presence_penalty: f32,
    /// Subtracted from a logit once for each time its token is in the answer.
    pub frequency_penalty: f32,
    /// Same seed, same logits: same tokens. Drawn at random when not given.
    pub seed: Option<u64>,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Reports each token's log-probability under the model and those of this many alternatives.
    pub logprobs: Option<usize>,
    /// Goes on after an end token.
    pub ignore_end: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            max_tokens: None,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            stop: Vec::new(),
            logit_bias: Vec::new(),
            logprobs: None,
            ignore_end: false,
        }
    }
}

impl Sampling {
    /// Parses the JSON form; unknown keys are errors.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|error| Error::input(format!("sampling: {error}")))
    }

    /// Checks every bound; `vocabulary` is the number of tokens.
    pub fn check(&self, vocabulary: usize) -> Result<()> {
        within("temperature", self.temperature, 0.0, 100.0)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        if self.max_tokens == Some(0) {
            return Err(Error::input("max_tokens: expected at least 1, got 0"));
        }
        if self.stop.len() > MAX_STOPS {
            return Err(Error::input(format!("stop: expected at most {MAX_STOPS} strings, got {}", self.stop.len())));
        }
        if let Some(long) = self.stop.iter().find(|stop| stop.len() > MAX_STOP_BYTES) {
            let message =
                format!("stop: expected strings of at most {MAX_STOP_BYTES} bytes, got one of {}", long.len());
            return Err(Error::input(message));
        }
        if self.logit_bias.len() > MAX_BIASES {
            let message = format!("logit_bias: expected at most {MAX_BIASES} tokens, got {}", self.logit_bias.len());
            return Err(Error::input(message));
        }
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocabulary {
                return Err(Error::input(format!("logit_bias: expected token ids below {vocabulary}, got {token}")));
            }
            within("logit_bias", bias, -100.0, 100.0)?;
        }
        match self.logprobs {
            Some(count) if count > MAX_TOP_LOGPROBS => {
                Err(Error::input(format!("top_logprobs: expected at most {MAX_TOP_LOGPROBS}, got {count}")))
            }
            _ => Ok(()),
        }
    }
}

fn within(name: &str, value: f32, low: f32, high: f32) -> Result<()> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::input(format!("{name}: expected a number from {low} to {high}, got {value}")))
}
