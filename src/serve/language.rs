//! From conversations and text to tokens, and back.

use std::sync::OnceLock;

use super::constraint::{Constraint, Constraints, Format};
use super::request::Decoder;
use crate::text::{Conversation, StreamDecoder, Template, Tokenizer, encode_prompt};
use crate::{Error, Result};

/// What serving needs to know of a model's language.
pub trait Language: Send + Sync {
    /// The tokens that ask for the assistant's next message.
    fn chat(&self, conversation: &Conversation) -> Result<Vec<u32>>;
    /// The tokens of a raw prompt, special tokens included: its writer owns all of it but the token that opens a text.
    fn text(&self, text: &str) -> Result<Vec<u32>>;
    /// A decoder for one answer.
    fn decoder(&self) -> Box<dyn Decoder>;
    /// One token as text, special tokens included.
    fn piece(&self, id: u32) -> String;
    /// What keeps an answer in a format.
    fn constraint(&self, format: &Format) -> Result<Constraint>;
}

/// A tokenizer and, for models that chat, a template.
pub struct Text {
    tokenizer: Tokenizer,
    template: Option<Template>,
    /// Made when the first request asks for a format.
    constraints: OnceLock<Result<Constraints>>,
}

impl Text {
    /// A model's tokenizer, and its chat template if it has one.
    pub fn new(tokenizer: Tokenizer, template: Option<Template>) -> Self {
        Self { tokenizer, template, constraints: OnceLock::new() }
    }
}

impl Language for Text {
    fn chat(&self, conversation: &Conversation) -> Result<Vec<u32>> {
        let Some(template) = &self.template else {
            return Err(Error::input("messages: expected a model with a chat template, got one without")
                .hint("use /v1/completions"));
        };
        encode_prompt(template, &self.tokenizer, conversation)
    }

    fn text(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode_prompt(text)
    }

    fn decoder(&self) -> Box<dyn Decoder> {
        Box::new(StreamDecoder::new(self.tokenizer.clone()))
    }

    fn piece(&self, id: u32) -> String {
        self.tokenizer.decode(&[id], false)
    }

    fn constraint(&self, format: &Format) -> Result<Constraint> {
        match self.constraints.get_or_init(|| Constraints::new(&self.tokenizer)) {
            Ok(constraints) => constraints.constraint(format),
            Err(error) => Err(error.clone()),
        }
    }
}

impl Decoder for StreamDecoder {
    fn push(&mut self, id: u32) -> String {
        Self::push(self, id)
    }

    fn finish(&mut self) -> String {
        Self::finish(self)
    }
}
