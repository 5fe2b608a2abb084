//! Calls of tools: how a model's template writes them, what an answer is held to, and how calls are read from it.

mod grammar;
mod reader;
mod scan;

use serde_json::Value;

pub use grammar::grammar;
pub use reader::{Piece, Reader};

/// How a model writes a call, which its template shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syntax {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen 2.5, Qwen 3.
    Hermes,
    /// `{"name": …, "parameters": {…}}` at the beginning of the answer, or behind `<|python_tag|>`: Llama 3.
    Llama,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`: Mistral.
    Mistral,
}

impl Syntax {
    /// The syntax that a template's text speaks of, if it is one of these.
    pub fn of(template: &str) -> Option<Self> {
        let has = |part: &str| template.contains(part);
        if has("[TOOL_CALLS]") {
            // the newer `[TOOL_CALLS]name[ARGS]{…}` is another
            (!has("[ARGS]")).then_some(Self::Mistral)
        } else if has("<tool_call>") {
            // others write XML between the same tags
            (!has("<arg_key>") && !has("<function=")).then_some(Self::Hermes)
        } else {
            let llama = has("{\"name\": function name, \"parameters\":") || has("<|python_tag|>");
            llama.then_some(Self::Llama)
        }
    }

    /// What stands before calls.
    pub fn marker(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Llama => "<|python_tag|>",
            Self::Mistral => "[TOOL_CALLS]",
        }
    }

    /// The field that holds a call's arguments.
    fn arguments(self) -> &'static str {
        if self == Self::Llama { "parameters" } else { "arguments" }
    }
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name: without quotes, backslashes and control characters.
    pub name: String,
    /// The JSON schema of its arguments, an object.
    pub parameters: Value,
}

/// Whether the model must call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// As it likes.
    Auto,
    /// At least one function.
    Required,
    /// This one.
    Named(String),
}

/// The functions of a request, and what it wants of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Tools {
    /// All of them; not empty.
    pub list: Vec<Tool>,
    /// Whether the model must call.
    pub choice: Choice,
    /// Whether there may be more than one call.
    pub parallel: bool,
}
