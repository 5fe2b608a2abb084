//! From conversations and text to tokens, and back.

use std::sync::OnceLock;

use serde_json::Value;

use super::calls::{self, Syntax, Tools};
use super::constraint::{Constraint, Constraints, Format, prepared};
use super::request::Decoder;
use crate::text::{Conversation, StreamDecoder, Template, Tokenizer, encode_prompt};
use crate::{Error, Result};

/// What serving needs to know of a model's language.
pub trait Language: Send + Sync {
    /// The tokens that ask for the assistant's next message.
    fn chat(&self, conversation: &Conversation) -> Result<Vec<u32>>;
    /// The tokens of a raw prompt, special tokens included: its writer owns all of it but the token that opens a text.
    fn text(&self, text: &str) -> Result<Vec<u32>>;
    /// A decoder for one answer; `calls`: shows what marks calls, too.
    fn decoder(&self, calls: bool) -> Box<dyn Decoder>;
    /// One token as text, special tokens included.
    fn piece(&self, id: u32) -> String;
    /// What keeps an answer in a format.
    fn constraint(&self, format: &Format) -> Result<Constraint>;
    /// The chat template's text.
    fn template(&self) -> Option<&str>;
    /// How calls of tools are written, where that is known.
    fn syntax(&self) -> Option<Syntax>;
    /// What makes an answer call, with arguments that follow their schemas; or follow the schema `otherwise` itself.
    fn calling(&self, tools: &Tools, otherwise: Option<&Value>) -> Result<Constraint>;
}

/// A tokenizer and, for models that chat, a template.
pub struct Text {
    tokenizer: Tokenizer,
    template: Option<Template>,
    syntax: Option<Syntax>,
    /// Made when the first request asks for a format.
    constraints: OnceLock<Result<Constraints>>,
}

impl Text {
    /// A model's tokenizer, and its chat template if it has one.
    pub fn new(tokenizer: Tokenizer, template: Option<Template>) -> Self {
        let source = template.as_ref().map(|template| template.tool_use_source().unwrap_or(template.source()));
        Self { syntax: source.and_then(Syntax::of), tokenizer, template, constraints: OnceLock::new() }
    }

    /// The token that marks calls, where it is a special one.
    fn marker(&self) -> Option<u32> {
        self.tokenizer.id_of(self.syntax?.marker()).filter(|&id| self.tokenizer.is_special(id))
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

    fn decoder(&self, calls: bool) -> Box<dyn Decoder> {
        let decoder = StreamDecoder::new(self.tokenizer.clone());
        Box::new(match self.marker().filter(|_| calls) {
            Some(id) => decoder.showing(id),
            None => decoder,
        })
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

    fn template(&self) -> Option<&str> {
        self.template.as_ref().map(Template::source)
    }

    fn syntax(&self) -> Option<Syntax> {
        self.syntax
    }

    fn calling(&self, tools: &Tools, otherwise: Option<&Value>) -> Result<Constraint> {
        let Some(syntax) = self.syntax else {
            return Err(Error::input("tools: expected a model whose template knows calls, got another"));
        };
        self.constraint(&Format::Calls(calls::grammar(syntax, tools, self.marker(), otherwise, prepared)))
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
