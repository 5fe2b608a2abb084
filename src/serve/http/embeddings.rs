//! `/v1/embeddings`: the model's last hidden state (after its final norm), averaged over a text's tokens, of length 1.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::oneshot::{Sender, channel};

use super::App;
use super::complete::tokens_left;
use super::errors::ApiError;
use super::fields::{Fields, kind};
use super::keys::Key;
use super::meter::Caller;
use super::parse::{Prompt, prompts};
use crate::Result as Outcome;
use crate::serve::models::Model;
use crate::serve::{Event, Request, Sampling, Sink};

/// Most texts of one request.
const MAX_TEXTS: usize = 2048;

struct Wanted {
    model: Model,
    texts: Vec<Vec<u32>>,
    base64: bool,
    dimensions: Option<usize>,
}

/// Who waits for a text's embedding.
struct Waiting(Option<Sender<Outcome<Vec<f32>>>>);

impl Waiting {
    fn tell(&mut self, outcome: Outcome<Vec<f32>>) -> bool {
        self.0.take().is_some_and(|sender| sender.send(outcome).is_ok())
    }
}

impl Sink for Waiting {
    fn send(&mut self, event: Event) -> bool {
        match event {
            Event::Failed(error) => self.tell(Err(error)),
            Event::Delta(_) | Event::Finished { .. } => true,
        }
    }

    fn closed(&self) -> bool {
        self.0.as_ref().is_none_or(Sender::is_closed)
    }

    fn embedded(&mut self, mean: Vec<f32>) {
        self.tell(Ok(mean));
    }
}

/// Answers a request. Texts are computed one after the other, in chunks between the steps of answers under way.
pub(super) async fn embeddings(app: Arc<App>, caller: Caller, body: Bytes) -> Result<Json<Value>, ApiError> {
    tokens_left(&app, &caller)?;
    let (shared, key) = (Arc::clone(&app), Arc::clone(&caller.key));
    let wanted = tokio::task::spawn_blocking(move || parse(&shared, &key, &body)).await;
    let wanted = wanted.map_err(|_| ApiError::server("the request could not be read"))??;
    let tokens: usize = wanted.texts.iter().map(Vec::len).sum();
    caller.record.model(&wanted.model.name);
    caller.record.tokens(tokens as u64, 0);
    caller.key.spend(tokens);
    app.traffic.of(&caller.key.name, &wanted.model.name).prompt_tokens.add(tokens as u64);
    let mut data = Vec::with_capacity(wanted.texts.len());
    for (index, text) in wanted.texts.into_iter().enumerate() {
        let (sender, receiver) = channel();
        let request = Request {
            prompt: text,
            answered: 0,
            sampling: Sampling::default(),
            constraint: None,
            adapter: wanted.model.adapter,
            root: None,
            decoder: app.language.decoder(false),
            sink: Box::new(Waiting(Some(sender))),
            client: caller.key.client(),
            priority: 0,
            deadline: None,
            urgent: false,
            embeds: true,
        };
        if index == 0 {
            app.engine.submit(vec![request])?;
        } else {
            app.engine.submit_more(request)?;
        }
        let hidden = receiver.await.map_err(|_| ApiError::unavailable("the server is shutting down"))??;
        let values = normalised(hidden, wanted.dimensions)?;
        let embedding = if wanted.base64 {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            Value::from(base64(&bytes))
        } else {
            values.into()
        };
        data.push(json!({"object": "embedding", "index": index, "embedding": embedding}));
    }
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(Json(json!({"object": "list", "data": data, "model": wanted.model.name, "usage": usage})))
}

fn parse(app: &App, key: &Key, body: &[u8]) -> Result<Wanted, ApiError> {
    let mut fields = Fields::parse(body)?;
    let texts = match fields.take("input") {
        Some(value) => prompts("input", value, MAX_TEXTS)?,
        None => return Err(ApiError::field("input", "a string or an array", "nothing")),
    };
    let base64 = match fields.take("encoding_format") {
        None => false,
        Some(Value::String(word)) if word == "float" => false,
        Some(Value::String(word)) if word == "base64" => true,
        Some(other) => return Err(ApiError::field("encoding_format", "\"float\" or \"base64\"", kind(&other))),
    };
    let dimensions = fields.integer("dimensions", 1, i64::from(u32::MAX))?.map(|count| count as usize);
    let (model, _) = app.model(key, fields.string("model")?.as_deref())?;
    fields.finish(&["user"])?;
    let encode = |text: Prompt| match text {
        Prompt::Text(text) => Ok(app.language.text(&text)?),
        Prompt::Tokens(tokens) => Ok(tokens),
        Prompt::Chat(_) => Err(ApiError::field("input", "texts or tokens", "a chat")),
    };
    let texts = texts.into_iter().map(encode).collect::<Result<Vec<_>, ApiError>>()?;
    for text in &texts {
        app.engine.limits().check(text, &Sampling::default())?;
    }
    Ok(Wanted { model, texts, base64, dimensions })
}

/// Of length 1; the first `dimensions` numbers only, where so many are wanted.
fn normalised(mut hidden: Vec<f32>, dimensions: Option<usize>) -> Result<Vec<f32>, ApiError> {
    if let Some(count) = dimensions {
        if count > hidden.len() {
            let expected = format!("at most the model's {}", hidden.len());
            return Err(ApiError::field("dimensions", &expected, &count.to_string()));
        }
        hidden.truncate(count);
    }
    let length = hidden.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    if !length.is_finite() {
        return Err(ApiError::server("the model's hidden state is not finite"));
    }
    if length > 0.0 {
        hidden.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
    Ok(hidden)
}

/// With padding, in the usual alphabet (RFC 4648).
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0u32, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }
}
