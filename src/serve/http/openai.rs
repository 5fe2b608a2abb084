//! Answers in the words of OpenAI's two completion routes.

use axum::body::Bytes;
use serde_json::{Value, json};

use super::dialect::{Answered, Context, Dialect, Ending, Maker, Part, data};
use super::errors::ApiError;
use super::fields::Fields;
use super::parse::{self, Asked};
use crate::serve::{Delta, Token, Usage};

/// Log-probabilities must be numbers in JSON; nothing is less likely than this.
const LEAST: f32 = -9999.0;

/// Which of the two routes answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// An answer of either route.
struct OpenAi {
    route: Route,
    context: Context,
    /// Whether log-probabilities were asked for.
    logprobs: bool,
    /// Whether the last chunk says what the answer cost.
    include_usage: bool,
    /// Characters of each choice so far.
    offsets: Vec<usize>,
}

/// A body of `/v1/chat/completions`.
pub(super) fn chat(body: &[u8]) -> Result<(Asked, Maker), ApiError> {
    Ok(answered(Route::Chat, parse::chat(Fields::parse(body)?)?))
}

/// A body of `/v1/completions`.
pub(super) fn completion(body: &[u8]) -> Result<(Asked, Maker), ApiError> {
    Ok(answered(Route::Completion, parse::completion(Fields::parse(body)?)?))
}

fn answered(route: Route, asked: Asked) -> (Asked, Maker) {
    let (logprobs, include_usage) = (asked.sampling.logprobs.is_some(), asked.include_usage);
    let maker = Box::new(move |context: Context| {
        let offsets = vec![0; context.choices];
        Box::new(OpenAi { route, context, logprobs, include_usage, offsets }) as Box<dyn Dialect>
    });
    (asked, maker)
}

impl OpenAi {
    fn head(&self, object: &str) -> Value {
        let prefix = if self.route == Route::Chat { "chatcmpl" } else { "cmpl" };
        let Context { id, created, model, fingerprint, .. } = &self.context;
        json!({
            "id": format!("{prefix}-{id}"), "object": object, "created": created, "model": model,
            "system_fingerprint": fingerprint,
        })
    }

    /// A piece of an answer. `usage`: null in all pieces but the last, where it was asked for.
    fn chunk(&self, choices: Vec<Value>, usage: Value) -> Bytes {
        let object = if self.route == Route::Chat { "chat.completion.chunk" } else { "text_completion" };
        let mut chunk = self.head(object);
        chunk["choices"] = choices.into();
        if self.include_usage {
            chunk["usage"] = usage;
        }
        data(&chunk)
    }

    fn choice(&self, index: usize, answer: &Answered) -> Value {
        let logprobs = self.logprobs(&answer.tokens, 0);
        let reason = reason(&answer.ending);
        match self.route {
            Route::Chat => {
                let mut message = json!({"role": "assistant", "content": answer.text, "refusal": null});
                if !answer.calls.is_empty() {
                    if answer.text.is_empty() {
                        message["content"] = Value::Null;
                    }
                    let calls = answer.calls.iter().map(|call| {
                        let function = json!({"name": call.name, "arguments": call.arguments});
                        json!({"id": call.id, "type": "function", "function": function})
                    });
                    message["tool_calls"] = calls.collect();
                }
                let mut choice =
                    json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason});
                self.sourced(index, &mut choice);
                choice
            }
            Route::Completion => {
                json!({"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": reason})
            }
        }
    }

    /// Names the texts that a choice was written under, where there are some.
    fn sourced(&self, index: usize, choice: &mut Value) {
        if let Some(sources) = self.context.sources.shown(index) {
            choice["sources"] = sources;
        }
    }

    /// One choice of a chunk.
    fn piece(&self, index: usize, delta: &Value, logprobs: &Value, reason: Option<&str>) -> Bytes {
        let mut choice = match self.route {
            Route::Chat => json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}),
            Route::Completion => {
                let text = delta["content"].as_str().unwrap_or_default();
                json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
            }
        };
        if reason.is_some() {
            self.sourced(index, &mut choice);
        }
        self.chunk(vec![choice], Value::Null)
    }

    /// `offset`: the characters of the choice before these tokens.
    fn logprobs(&self, tokens: &[Token], offset: usize) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let language = &self.context.language;
        match self.route {
            Route::Chat => {
                let entry = |id: u32, logprob: f32| {
                    let piece = language.piece(id);
                    // Part of a character is no text of its own; its bytes are not known here.
                    let bytes = (!piece.contains(char::REPLACEMENT_CHARACTER)).then(|| piece.as_bytes().to_vec());
                    json!({"token": piece, "logprob": logprob.max(LEAST), "bytes": bytes})
                };
                let content = tokens.iter().map(|token| {
                    let mut shown = entry(token.id, token.logprob.unwrap_or(LEAST));
                    shown["top_logprobs"] = token.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
                    shown
                });
                json!({"content": content.collect::<Vec<_>>(), "refusal": null})
            }
            Route::Completion => {
                let (mut texts, mut offsets, mut values, mut tops) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
                let mut at = offset;
                for token in tokens {
                    let piece = language.piece(token.id);
                    offsets.push(at);
                    at += piece.chars().count();
                    texts.push(piece);
                    values.push(token.logprob.unwrap_or(LEAST).max(LEAST));
                    let top =
                        token.top.iter().map(|&(id, logprob)| (language.piece(id), Value::from(logprob.max(LEAST))));
                    tops.push(Value::Object(top.collect()));
                }
                json!({"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets})
            }
        }
    }

    fn text(&mut self, index: usize, delta: &Delta) -> Option<Bytes> {
        if delta.text.is_empty() && (!self.logprobs || delta.tokens.is_empty()) {
            return None;
        }
        let offset = self.offsets[index];
        let logprobs = if delta.tokens.is_empty() { Value::Null } else { self.logprobs(&delta.tokens, offset) };
        self.offsets[index] += delta.text.chars().count();
        Some(self.piece(index, &json!({"content": delta.text}), &logprobs, None))
    }
}

impl Dialect for OpenAi {
    fn whole(&mut self, answers: Vec<Answered>, usage: Usage) -> Value {
        let object = if self.route == Route::Chat { "chat.completion" } else { "text_completion" };
        let mut whole = self.head(object);
        whole["choices"] = answers.iter().enumerate().map(|(index, answer)| self.choice(index, answer)).collect();
        whole["usage"] = cost(usage);
        whole
    }

    fn begin(&mut self, lines: &mut Vec<Bytes>) {
        if self.route == Route::Chat {
            let opening = json!({"role": "assistant", "content": ""});
            lines.extend((0..self.context.choices).map(|index| self.piece(index, &opening, &Value::Null, None)));
        }
    }

    fn part(&mut self, choice: usize, part: Part, lines: &mut Vec<Bytes>) {
        let call = match part {
            Part::Text(delta) => return lines.extend(self.text(choice, &delta)),
            Part::Call(number, call) => {
                let function = json!({"name": call.name, "arguments": ""});
                json!({"index": number, "id": call.id, "type": "function", "function": function})
            }
            Part::Arguments(number, text) => json!({"index": number, "function": {"arguments": text}}),
        };
        lines.push(self.piece(choice, &json!({"tool_calls": [call]}), &Value::Null, None));
    }

    fn end(&mut self, choice: usize, ending: &Ending, _: Usage, lines: &mut Vec<Bytes>) {
        lines.push(self.piece(choice, &json!({}), &Value::Null, Some(reason(ending))));
    }

    fn done(&mut self, usage: Usage, lines: &mut Vec<Bytes>) {
        if self.include_usage {
            lines.push(self.chunk(Vec::new(), cost(usage)));
        }
        lines.push(Bytes::from_static(b"data: [DONE]\n\n"));
    }

    /// No `[DONE]` follows.
    fn failed(&mut self, error: &ApiError, lines: &mut Vec<Bytes>) {
        lines.push(data(&error.json()));
    }
}

fn reason(ending: &Ending) -> &'static str {
    match ending {
        Ending::Stop | Ending::StopString(_) => "stop",
        Ending::Length => "length",
        Ending::Calls => "tool_calls",
    }
}

/// What an answer cost.
fn cost(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}
