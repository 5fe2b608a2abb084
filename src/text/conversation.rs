//! What is encoded: messages, tools, and what else a template may look at.

use std::str::FromStr;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A conversation in the form of Hugging Face's and OpenAI's chat messages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Objects with `role` and `content`, and what else the template knows (`tool_calls`, `reasoning_content`, …).
    pub messages: Vec<Value>,
    /// A list of JSON schemas of functions.
    pub tools: Option<Value>,
    /// More variables for the template, such as `enable_thinking`.
    pub extra: Map<String, Value>,
}

impl Conversation {
    /// A conversation of messages only.
    pub fn new(messages: Vec<Value>) -> Self {
        Self { messages, ..Self::default() }
    }

    /// The role of the message at `index`; empty where there is none.
    pub fn role(&self, index: usize) -> &str {
        self.messages.get(index).and_then(|message| message.get("role")).and_then(Value::as_str).unwrap_or_default()
    }

    /// Indices of the assistant's messages that begin a turn: all of them.
    pub(super) fn assistant_turns(&self) -> impl DoubleEndedIterator<Item = usize> + '_ {
        (0..self.messages.len()).filter(|&index| self.role(index) == "assistant")
    }
}

/// Which tokens of a conversation are trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrainOn {
    /// What the assistant says, in every turn, with the token that ends the turn.
    #[default]
    Assistant,
    /// The same for the last of the assistant's turns only.
    Last,
    /// Every token.
    All,
}

impl TrainOn {
    /// The command line's words.
    pub const WORDS: [&'static str; 3] = ["assistant", "last", "all"];
}

impl FromStr for TrainOn {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        match word {
            "assistant" => Ok(Self::Assistant),
            "last" => Ok(Self::Last),
            "all" => Ok(Self::All),
            other => Err(Error::input(format!("train on: expected one of {}, got {other:?}", Self::WORDS.join(", ")))),
        }
    }
}
