//! From examples to sequences: tokens, which of them are trained on, and what is done with those that are too long.

use std::str::FromStr;

use super::schema::Example;
use crate::error::{Error, Result};
use crate::text::{Conversation, Specials, Template, Tokenizer, TrainOn, encode_conversation, encode_prompt};

/// What becomes of a row that is longer than a sequence may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LongRows {
    /// Cut after its last whole turn that fits.
    #[default]
    Truncate,
    /// Cut into several sequences.
    Split,
}

impl FromStr for LongRows {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        match word {
            "truncate" => Ok(Self::Truncate),
            "split" => Ok(Self::Split),
            other => Err(Error::input(format!("long rows: expected truncate or split, got {other:?}"))),
        }
    }
}

/// How examples become tokens.
#[derive(Clone)]
pub struct Encoder {
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    /// The model's chat template, where it has one.
    pub template: Option<Template>,
    /// Which tokens are trained on.
    pub train_on: TrainOn,
    /// The longest sequence.
    pub max_tokens: usize,
    /// What becomes of longer ones.
    pub long_rows: LongRows,
}

/// The task of an answer that is not wanted: the rejected one of a pair, or one that is labelled so.
const UNWANTED: u32 = 1;

/// Tokens that attend to each other, and which of them are trained on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tokens {
    /// The ids.
    pub ids: Vec<u32>,
    /// As long as `ids`.
    pub trained: Vec<bool>,
    /// Where it may be cut.
    pub turn_ends: Vec<usize>,
    /// Its task: 1 for an answer that is not wanted, and for a rationale.
    pub task: u32,
    /// How many tokens it has in common with the first of its unit, all before the first that predicts one it learns.
    pub shared: u32,
}

/// What an example became.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Sequences by unit: those of a unit stay in one row of a batch. Empty when nothing is left to train on.
    pub units: Vec<Vec<Tokens>>,
    /// The example's length before it was cut.
    pub length: usize,
    /// Turns were lost.
    pub truncated: bool,
    /// It became several units.
    pub split: bool,
    /// It is a pair of a chosen and a rejected answer.
    pub pair: bool,
    /// It is an answer and its rationale.
    pub explained: bool,
    /// Whether its answer is wanted, where the row says so.
    pub wanted: Option<bool>,
    /// What the row calls its task, where that is asked for.
    pub task: Option<String>,
}

impl Encoder {
    /// Tokens of an example.
    ///
    /// # Errors
    /// What the template or the loss mask has against it.
    pub(super) fn encode(&self, example: &Example) -> Result<Outcome> {
        let wanted = if let Example::Labelled { wanted, .. } = example { Some(*wanted) } else { None };
        let pair = matches!(example, Example::Preference { .. });
        let explained = matches!(example, Example::Tasks(_));
        let whole = wanted.is_some() || pair || explained;
        let outcome = self.cut(self.sequences(example)?, matches!(example, Example::Text(_)), whole);
        Ok(Outcome { wanted, pair, explained, ..outcome })
    }

    fn sequences(&self, example: &Example) -> Result<Vec<Tokens>> {
        Ok(match example {
            Example::Conversation { messages, prompt, tools } => {
                vec![self.conversation(messages, *prompt, tools.as_ref())?]
            }
            Example::Completion { prompt, completion } if self.template.is_some() => {
                let turn = |role: &str, text: &str| serde_json::json!({ "role": role, "content": text });
                vec![self.conversation(&[turn("user", prompt), turn("assistant", completion)], 1, None)?]
            }
            Example::Completion { prompt, completion } => vec![self.completion(prompt, completion)?],
            Example::Text(text) => vec![self.completion("", text)?],
            Example::Preference { chosen, rejected, tools } => {
                let rejected = self.answer(rejected, tools.as_ref())?;
                vec![self.answer(chosen, tools.as_ref())?, Tokens { task: UNWANTED, ..rejected }]
            }
            Example::Tasks(examples) => {
                let mut all = Vec::new();
                for (task, example) in (0..).zip(examples) {
                    all.extend(self.sequences(example)?.into_iter().map(|sequence| Tokens { task, ..sequence }));
                }
                all
            }
            Example::Labelled { answer, wanted } => {
                let mut sequences = self.sequences(answer)?;
                sequences.iter_mut().for_each(|sequence| sequence.task = if *wanted { 0 } else { UNWANTED });
                sequences
            }
        })
    }

    /// A conversation; what stands in its first `prompt` messages isn't trained on.
    fn conversation(
        &self,
        messages: &[serde_json::Value],
        prompt: usize,
        tools: Option<&serde_json::Value>,
    ) -> Result<Tokens> {
        let mut tokens = self.encoded(messages, tools, self.train_on)?;
        let asked = &messages[..prompt.min(messages.len())];
        if self.train_on == TrainOn::Assistant && asked.iter().any(|message| message["role"] == "assistant") {
            let given = encode_prompt(self.template()?, &self.tokenizer, &talk(asked, tools))?.len();
            tokens.trained.iter_mut().take(given).for_each(|trained| *trained = false);
        }
        Ok(tokens)
    }

    /// A conversation whose last answer is trained on.
    fn answer(&self, messages: &[serde_json::Value], tools: Option<&serde_json::Value>) -> Result<Tokens> {
        self.encoded(messages, tools, TrainOn::Last)
    }

    fn encoded(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
        train_on: TrainOn,
    ) -> Result<Tokens> {
        let encoded = encode_conversation(self.template()?, &self.tokenizer, &talk(messages, tools), train_on)?;
        Ok(Tokens { ids: encoded.ids, trained: encoded.trained, turn_ends: encoded.turn_ends, ..Tokens::default() })
    }

    /// A text that goes on: the end-of-sequence token is trained, so that the model learns to stop.
    fn completion(&self, prompt: &str, completion: &str) -> Result<Tokens> {
        let end = self.tokenizer.eos().ok_or_else(|| {
            Error::input(
                "the tokenizer has no end-of-sequence token, so a model trained on plain text would never stop",
            )
        })?;
        let mut ids: Vec<u32> = self.tokenizer.opening().into_iter().collect();
        if !prompt.is_empty() {
            ids.extend(self.tokenizer.encode(prompt, Specials::Literal)?);
        }
        let first = if self.train_on == TrainOn::All { 0 } else { ids.len() };
        ids.extend(self.tokenizer.encode(completion, Specials::Literal)?);
        ids.push(end);
        let trained = (0..ids.len()).map(|index| index >= first).collect();
        Ok(Tokens { turn_ends: vec![ids.len()], trained, ids, ..Tokens::default() })
    }

    fn template(&self) -> Result<&Template> {
        self.template.as_ref().ok_or_else(|| {
            Error::input("the model has no chat template, so conversations cannot become text")
                .hint("use rows of prompt and completion, or of text; or a model with a chat template")
        })
    }

    /// Cuts what is too long, and drops what has nothing left to train on.
    ///
    /// `anywhere`: it need not be cut after a turn. `whole`: it must not become several units.
    fn cut(&self, sequences: Vec<Tokens>, anywhere: bool, whole: bool) -> Outcome {
        let length = sequences.iter().map(|sequence| sequence.ids.len()).max().unwrap_or(0);
        let mut outcome = Outcome { length, ..Outcome::default() };
        let units = if length <= self.max_tokens {
            vec![sequences]
        } else if self.long_rows == LongRows::Split && !whole {
            outcome.split = true;
            sequences.iter().flat_map(|whole| whole.pieces(self.max_tokens)).map(|piece| vec![piece]).collect()
        } else {
            outcome.truncated = true;
            vec![sequences.into_iter().map(|sequence| sequence.truncated(self.max_tokens, anywhere)).collect()]
        };
        let units = units.into_iter().map(|unit| if whole { with_shared(unit) } else { unit });
        outcome.units = units.filter(|unit| unit.iter().all(|sequence| sequence.targets() > 0)).collect();
        outcome
    }
}

impl Tokens {
    /// How many tokens are learnt; the first one is nobody's target.
    pub fn targets(&self) -> u64 {
        self.trained.iter().skip(1).filter(|&&trained| trained).count() as u64
    }

    fn truncated(mut self, room: usize, anywhere: bool) -> Self {
        let fits = |end: &&usize| **end <= room;
        let end = if anywhere { room } else { self.turn_ends.iter().rev().find(fits).copied().unwrap_or(0) };
        self.ids.truncate(end);
        self.trained.truncate(end);
        self
    }

    fn pieces(&self, room: usize) -> impl Iterator<Item = Self> {
        let parts = self.ids.chunks(room).zip(self.trained.chunks(room));
        parts.map(|(ids, trained)| Self {
            ids: ids.to_vec(),
            trained: trained.to_vec(),
            turn_ends: Vec::new(),
            task: self.task,
            shared: 0,
        })
    }
}

/// The sequences of a unit, each with the number of tokens that it has in common with the first.
fn with_shared(mut unit: Vec<Tokens>) -> Vec<Tokens> {
    if let Some((first, others)) = unit.split_first_mut() {
        for other in others {
            let alike = first.ids.iter().zip(&other.ids).take_while(|(a, b)| a == b).count();
            let learnt = other.trained.iter().skip(1).position(|&trained| trained).unwrap_or(0);
            other.shared = u32::try_from(alike.min(learnt)).unwrap_or(0);
        }
    }
    unit
}

fn talk(messages: &[serde_json::Value], tools: Option<&serde_json::Value>) -> Conversation {
    Conversation { messages: messages.to_vec(), tools: tools.cloned(), ..Conversation::default() }
}
