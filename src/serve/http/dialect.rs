//! What the APIs have in common: an answer's parts, as each API puts them in its own words.

use std::sync::Arc;

use axum::body::Bytes;
use serde_json::Value;

use super::errors::ApiError;
use crate::serve::calls::{Piece, Reader};
use crate::serve::{Delta, FinishReason, Language, Sources, Token, Usage};

/// What an API needs to know to answer.
pub(super) struct Context {
    /// 32 hexadecimal digits of the answer's own.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The name of the model that answers.
    pub model: String,
    /// What that model is made of, where it is known.
    pub fingerprint: Option<String>,
    /// Number of choices.
    pub choices: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// What the choices were written under.
    pub sources: Sources,
    /// The model's language.
    pub language: Arc<dyn Language>,
}

/// Makes the dialect that answers a request; it knows what of the request the answer depends on.
pub(super) type Maker = Box<dyn FnOnce(Context) -> Box<dyn Dialect> + Send>;

/// Why a choice ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Ending {
    /// The model ended it.
    #[default]
    Stop,
    /// This stop string.
    StopString(String),
    /// It has as many tokens as may be.
    Length,
    /// The model waits for what its calls return.
    Calls,
}

/// A call of a function.
#[derive(Clone, Debug, Default)]
pub(super) struct Call {
    /// Nine letters and digits, as Mistral's templates want it.
    pub id: String,
    /// The function.
    pub name: String,
    /// JSON, as the model wrote it.
    pub arguments: String,
}

impl Call {
    /// The arguments as an object; where the model wrote none, its text under the name `invalid`.
    pub fn input(&self, invalid: &str) -> Value {
        match serde_json::from_str(&self.arguments) {
            Ok(arguments @ Value::Object(_)) => arguments,
            _ => Value::Object([(invalid.to_owned(), self.arguments.as_str().into())].into_iter().collect()),
        }
    }
}

/// A whole choice.
#[derive(Clone, Debug, Default)]
pub(super) struct Answered {
    /// Its text.
    pub text: String,
    /// Its tokens, those of calls included.
    pub tokens: Vec<Token>,
    /// Its calls.
    pub calls: Vec<Call>,
    /// Why it ended.
    pub ending: Ending,
}

/// One part of a choice.
pub(super) enum Part {
    /// Text, and the tokens that are visible with it; one of them may be empty.
    Text(Delta),
    /// A call begins, of this number; its arguments are empty yet.
    Call(usize, Call),
    /// More of the arguments of the call of this number.
    Arguments(usize, String),
}

/// One API's words for an answer. Streams are written as lines.
pub(super) trait Dialect: Send {
    /// The whole answer.
    fn whole(&mut self, answers: Vec<Answered>, usage: Usage) -> Value;
    /// What comes before everything.
    fn begin(&mut self, lines: &mut Vec<Bytes>);
    /// A part of a choice.
    fn part(&mut self, choice: usize, part: Part, lines: &mut Vec<Bytes>);
    /// The end of a choice.
    fn end(&mut self, choice: usize, ending: &Ending, usage: Usage, lines: &mut Vec<Bytes>);
    /// The end of all.
    fn done(&mut self, usage: Usage, lines: &mut Vec<Bytes>);
    /// An error when the status was sent long ago.
    fn failed(&mut self, error: &ApiError, lines: &mut Vec<Bytes>);
    /// The type of a stream.
    fn content_type(&self) -> &'static str {
        "text/event-stream; charset=utf-8"
    }
}

/// JSON that is one line to everybody: some clients end lines at Unicode's separators, too, which may only be in strings.
pub(super) fn line(value: &Value) -> String {
    let mut text = value.to_string();
    for (separator, escaped) in [('\u{85}', "\\u0085"), ('\u{2028}', "\\u2028"), ('\u{2029}', "\\u2029")] {
        if text.contains(separator) {
            text = text.replace(separator, escaped);
        }
    }
    text
}

/// A server-sent event without a name.
pub(super) fn data(value: &Value) -> Bytes {
    format!("data: {}\n\n", line(value)).into()
}

/// A server-sent event whose name is its type.
pub(super) fn event(value: &Value) -> Bytes {
    format!("event: {}\ndata: {}\n\n", value["type"].as_str().unwrap_or_default(), line(value)).into()
}

/// Turns what the engine says of one choice into parts.
pub(super) struct Parts {
    reader: Option<Reader>,
    stops: Arc<[String]>,
}

impl Parts {
    /// Parts of a choice that may end at one of `stops`, with a reader of calls if there may be any.
    pub fn new(reader: Option<Reader>, stops: Arc<[String]>) -> Self {
        Self { reader, stops }
    }

    /// The parts of more text.
    pub fn push(&mut self, delta: Delta) -> Vec<Part> {
        match &mut self.reader {
            None => vec![Part::Text(delta)],
            Some(reader) => {
                let pieces = reader.push(&delta.text);
                parts(pieces, delta.tokens)
            }
        }
    }

    /// The parts of the last text, and why the choice ended.
    pub fn finish(&mut self, delta: Delta, reason: FinishReason) -> (Vec<Part>, Ending) {
        let mut all = self.push(delta);
        if let Some(reader) = &mut self.reader {
            all.extend(parts(reader.finish(), Vec::new()));
        }
        let called = self.reader.as_ref().is_some_and(|reader| reader.calls() > 0);
        let ending = match reason {
            FinishReason::Length => Ending::Length,
            _ if called => Ending::Calls,
            FinishReason::Stop => Ending::Stop,
            FinishReason::StopString(number) => Ending::StopString(self.stops.get(number).cloned().unwrap_or_default()),
        };
        (all, ending)
    }
}

/// Tokens go with the first of the pieces, and by themselves where there is none.
fn parts(pieces: Vec<Piece>, tokens: Vec<Token>) -> Vec<Part> {
    let mut parts = Vec::with_capacity(pieces.len() + 1);
    let mut pieces = pieces.into_iter().peekable();
    let text = match pieces.peek_mut() {
        Some(Piece::Text(text)) => std::mem::take(text),
        _ => String::new(),
    };
    if !text.is_empty() || !tokens.is_empty() {
        parts.push(Part::Text(Delta { text, tokens }));
    }
    for piece in pieces {
        match piece {
            Piece::Text(text) if text.is_empty() => {}
            Piece::Text(text) => parts.push(Part::Text(Delta { text, tokens: Vec::new() })),
            Piece::Call { call, name } => {
                parts.push(Part::Call(call, Call { id: call_id(), name, arguments: String::new() }));
            }
            Piece::Arguments { call, text } => parts.push(Part::Arguments(call, text)),
        }
    }
    parts
}

fn call_id() -> String {
    use rand::Rng;
    rand::rng().sample_iter(rand::distr::Alphanumeric).take(9).map(char::from).collect()
}

impl Answered {
    /// Adds a part.
    pub fn add(&mut self, part: Part) {
        match part {
            Part::Text(delta) => {
                self.text.push_str(&delta.text);
                self.tokens.extend(delta.tokens);
            }
            Part::Call(_, call) => self.calls.push(call),
            Part::Arguments(call, text) => {
                if let Some(call) = self.calls.get_mut(call) {
                    call.arguments.push_str(&text);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_breaks_a_line() {
        let value = serde_json::json!({"text": "a\u{85}b\u{2028}c\u{2029}d\n\r\u{b}\u{c}\u{1c}\u{1d}\u{1e}e"});
        let text = line(&value);
        let breaks = ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
        assert!(!text.contains(breaks), "{text}");
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }
}
