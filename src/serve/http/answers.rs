//! Answers in the shape of OpenAI's API: whole, or in chunks.

use serde_json::{Value, json};

use crate::serve::{Delta, Language, Token, Usage};

/// Log-probabilities must be numbers in JSON; nothing is less likely than this.
const LEAST: f32 = -9999.0;

/// Which of the two routes answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// What all parts of an answer share.
#[derive(Clone, Debug)]
pub(super) struct Envelope {
    /// Which shape.
    pub route: Route,
    /// The answer's id.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The name of the model that answers.
    pub model: String,
    /// Whether log-probabilities were asked for.
    pub logprobs: bool,
}

impl Envelope {
    /// A whole answer.
    pub fn whole(&self, choices: Vec<Value>, usage: Usage) -> Value {
        let object = if self.route == Route::Chat { "chat.completion" } else { "text_completion" };
        let mut answer = self.head(object);
        answer["choices"] = choices.into();
        answer["usage"] = cost(usage);
        answer
    }

    /// A piece of an answer. `usage`: null in all pieces but the last, where it was asked for.
    pub fn chunk(&self, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let object = if self.route == Route::Chat { "chat.completion.chunk" } else { "text_completion" };
        let mut chunk = self.head(object);
        chunk["choices"] = choices.into();
        if let Some(usage) = usage {
            chunk["usage"] = usage;
        }
        chunk
    }

    /// One choice of a whole answer.
    pub fn choice(&self, index: usize, answer: &Delta, reason: &str, language: &dyn Language) -> Value {
        let logprobs = self.logprobs(&answer.tokens, 0, language);
        match self.route {
            Route::Chat => json!({
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": null},
                "logprobs": logprobs,
                "finish_reason": reason,
            }),
            Route::Completion => {
                json!({"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": reason})
            }
        }
    }

    /// One choice of a chunk; `offset`: the characters of this choice before it.
    pub fn part(
        &self,
        index: usize,
        delta: &Delta,
        offset: usize,
        reason: Option<&str>,
        language: &dyn Language,
    ) -> Value {
        let logprobs =
            if delta.tokens.is_empty() { Value::Null } else { self.logprobs(&delta.tokens, offset, language) };
        match self.route {
            Route::Chat => {
                let delta = if delta.text.is_empty() && delta.tokens.is_empty() {
                    json!({})
                } else {
                    json!({"content": delta.text})
                };
                json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})
            }
            Route::Completion => {
                json!({"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": reason})
            }
        }
    }

    /// The first chunk of a chat's choice.
    pub fn opening(&self, index: usize) -> Value {
        json!({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null})
    }

    fn head(&self, object: &str) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model})
    }

    fn logprobs(&self, tokens: &[Token], offset: usize, language: &dyn Language) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
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
}

/// What an answer cost.
pub(super) fn cost(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}
