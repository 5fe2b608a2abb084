//! `/v1/messages`: Anthropic's words for a conversation.

use axum::body::Bytes;
use serde_json::{Map, Value, json};

use super::dialect::{Answered, Context, Dialect, Ending, Maker, Part, event};
use super::errors::ApiError;
use super::fields::{Fields, kind};
use super::parse::{self, Asked};
use crate::serve::Usage;

/// What clients send besides, and what changes nothing in the answer of a local model.
const IGNORED: [&str; 8] =
    ["metadata", "cache_control", "betas", "container", "inference_geo", "speed", "user_profile_id", "workspace_id"];

/// A body of `/v1/messages`.
pub(super) fn parse(body: &[u8]) -> Result<(Asked, Maker), ApiError> {
    let mut fields = Fields::parse(body)?;
    let most = fields.take("max_tokens");
    let most = most.ok_or_else(|| ApiError::field("max_tokens", "a whole number", "nothing"))?;
    let asked = asked(fields, Some(most))?;
    let maker = Box::new(|context| Box::new(Messages { context, block: None, blocks: 0 }) as Box<dyn Dialect>);
    Ok((asked, maker))
}

/// A body of `/v1/messages/count_tokens`, which is the same but for what concerns the answer.
pub(super) fn count(body: &[u8]) -> Result<Asked, ApiError> {
    asked(Fields::parse(body)?, None)
}

/// Translates to a body of `/v1/chat/completions`.
fn asked(mut fields: Fields, most: Option<Value>) -> Result<Asked, ApiError> {
    let mut chat = Map::new();
    chat.extend(most.map(|most| ("max_tokens".to_owned(), most)));
    for (name, theirs) in [
        ("model", "model"),
        ("stream", "stream"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
        ("stop_sequences", "stop"),
        ("retrieval", "retrieval"),
    ] {
        chat.extend(fields.take(name).map(|value| (theirs.to_owned(), value)));
    }
    if let Some(tier) = fields.take("service_tier") {
        // there is no other capacity to buy here: their word for "not in a hurry" is the usual tier
        let tier = if tier == "standard_only" { json!("default") } else { tier };
        chat.insert("service_tier".to_owned(), tier);
    }
    // `adaptive` leaves it to the model whether it thinks.
    if fields.take("thinking").is_some_and(|thinking| thinking["type"] != "disabled" && thinking["type"] != "adaptive")
    {
        let told = "thinking: expected none or type disabled or adaptive, got another";
        return Err(ApiError::unsupported("thinking", told));
    }
    if let Some(config) = fields.take("output_config") {
        let mut config = Fields::of("output_config", config)?;
        if let Some(format) = config.take("format") {
            let mut format = Fields::of("output_config.format", format)?;
            let kind = format.string("type")?;
            if kind.as_deref() != Some("json_schema") {
                let got = kind.unwrap_or_else(|| "nothing".to_owned());
                return Err(ApiError::field("output_config.format.type", "json_schema", &got));
            }
            let schema = json!({"type": "json_schema", "json_schema": {"schema": format.take("schema")}});
            chat.insert("response_format".to_owned(), schema);
            format.finish(&[])?;
        }
        config.finish(&["effort"])?;
    }
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        messages.push(json!({"role": "system", "content": system}));
    }
    match fields.take("messages") {
        Some(Value::Array(given)) => {
            for (index, message) in given.into_iter().enumerate() {
                turn(&format!("messages[{index}]"), message, &mut messages)?;
            }
        }
        other => return Err(ApiError::field("messages", "an array", other.as_ref().map_or("nothing", kind))),
    }
    chat.insert("messages".to_owned(), messages.into());
    if let Some(tools) = fields.take("tools") {
        let Value::Array(tools) = tools else { return Err(ApiError::field("tools", "an array", kind(&tools))) };
        let tools = tools.into_iter().map(|tool| {
            let kind = tool.get("type").filter(|kind| !kind.is_null() && *kind != "custom").cloned();
            let function = json!({
                "name": tool["name"], "description": tool["description"], "parameters": tool["input_schema"],
            });
            json!({"type": kind.unwrap_or_else(|| "function".into()), "function": function})
        });
        chat.insert("tools".to_owned(), tools.collect());
    }
    if let Some(choice) = fields.take("tool_choice") {
        let mut choice = Fields::of("tool_choice", choice)?;
        if choice.boolean("disable_parallel_tool_use")? == Some(true) {
            chat.insert("parallel_tool_calls".to_owned(), false.into());
        }
        let chosen = match choice.string("type")?.as_deref() {
            Some("any") => json!("required"),
            Some("tool") => json!({"type": "function", "function": {"name": choice.take("name")}}),
            Some(word @ ("auto" | "none")) => json!(word),
            _ => return Err(ApiError::field("tool_choice.type", "auto, any, tool or none", "another")),
        };
        chat.insert("tool_choice".to_owned(), chosen);
    }
    fields.finish(&IGNORED)?;
    parse::chat(Fields::from(chat))
}

/// A message: results of tools are messages of their own in a chat, and so they come before the text.
fn turn(name: &str, message: Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut fields = Fields::of(name, message)?;
    let role = match fields.string("role")?.as_deref() {
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("system") => "system",
        _ => return Err(ApiError::field(&format!("{name}.role"), "user or assistant", "another")),
    };
    let blocks = match fields.take("content") {
        Some(Value::String(text)) => {
            messages.push(json!({"role": role, "content": text}));
            return Ok(());
        }
        Some(Value::Array(blocks)) => blocks,
        other => {
            let got = other.as_ref().map_or("nothing", kind);
            return Err(ApiError::field(&format!("{name}.content"), "a string or an array of blocks", got));
        }
    };
    let (mut texts, mut calls) = (Vec::new(), Vec::new());
    for (index, block) in blocks.into_iter().enumerate() {
        match (block["type"].as_str(), role) {
            (Some("text"), _) => texts.push(json!({"type": "text", "text": block["text"]})),
            (Some("tool_use"), "assistant") => calls.push(json!({
                "id": block["id"], "type": "function",
                "function": {"name": block["name"], "arguments": block["input"]},
            })),
            (Some("tool_result"), "user") => messages.push(json!({
                "role": "tool", "tool_call_id": block["tool_use_id"],
                "content": if block["content"].is_null() { json!("") } else { block["content"].clone() },
            })),
            // Another server's thoughts.
            (Some("thinking" | "redacted_thinking"), "assistant") => {}
            _ => {
                let expected = "a block of type text, tool_use (assistant) or tool_result (user)";
                return Err(ApiError::field(&format!("{name}.content[{index}]"), expected, "another"));
            }
        }
    }
    match (texts.is_empty(), calls.is_empty()) {
        (true, true) => {}
        (_, true) => messages.push(json!({"role": role, "content": texts})),
        (_, false) => messages.push(json!({"role": role, "content": texts, "tool_calls": calls})),
    }
    Ok(())
}

/// A message; `block` is the kind of the block that is being written.
struct Messages {
    context: Context,
    block: Option<&'static str>,
    blocks: usize,
}

impl Messages {
    fn message(&self, content: Vec<Value>, ending: Option<&Ending>, usage: Usage) -> Value {
        let (reason, sequence) = ending.map_or((Value::Null, Value::Null), reason);
        json!({
            "id": format!("msg_{}", self.context.id), "type": "message", "role": "assistant",
            "model": self.context.model, "content": content, "stop_reason": reason, "stop_sequence": sequence,
            "usage": cost(usage),
        })
    }

    fn open(&mut self, kind: &'static str, block: &Value, lines: &mut Vec<Bytes>) {
        self.close(lines);
        lines.push(event(&json!({"type": "content_block_start", "index": self.blocks, "content_block": block})));
        self.block = Some(kind);
    }

    fn close(&mut self, lines: &mut Vec<Bytes>) {
        if self.block.take().is_some() {
            lines.push(event(&json!({"type": "content_block_stop", "index": self.blocks})));
            self.blocks += 1;
        }
    }

    /// The texts that the answer was written under, as citations of its text; an answer without retrieval has none.
    fn citations(&self) -> Vec<Value> {
        let sources = self.context.sources.of(0).unwrap_or_default().into_iter().enumerate();
        let cited = sources.map(|(index, source)| {
            json!({
                "type": "search_result_location", "source": source.source, "title": source.source,
                "cited_text": source.text, "search_result_index": index, "start_block_index": 0, "end_block_index": 1,
            })
        });
        cited.collect()
    }

    fn delta(&self, delta: &Value, lines: &mut Vec<Bytes>) {
        lines.push(event(&json!({"type": "content_block_delta", "index": self.blocks, "delta": delta})));
    }
}

impl Dialect for Messages {
    fn whole(&mut self, answers: Vec<Answered>, usage: Usage) -> Value {
        let answer = answers.into_iter().next().unwrap_or_default();
        let mut content = Vec::new();
        if !answer.text.is_empty() || answer.calls.is_empty() {
            let citations = self.citations();
            content.push(json!({"type": "text", "text": answer.text}));
            if !citations.is_empty() {
                content[0]["citations"] = citations.into();
            }
        }
        content.extend(answer.calls.iter().map(
            |call| json!({"type": "tool_use", "id": call.id, "name": call.name, "input": call.input("INVALID_JSON")}),
        ));
        self.message(content, Some(&answer.ending), usage)
    }

    fn begin(&mut self, lines: &mut Vec<Bytes>) {
        let usage = Usage { prompt_tokens: self.context.prompt_tokens, ..Usage::default() };
        lines.push(event(&json!({"type": "message_start", "message": self.message(Vec::new(), None, usage)})));
    }

    fn part(&mut self, _: usize, part: Part, lines: &mut Vec<Bytes>) {
        match part {
            Part::Text(delta) if delta.text.is_empty() => {}
            Part::Text(delta) => {
                if self.block != Some("text") {
                    self.open("text", &json!({"type": "text", "text": ""}), lines);
                }
                self.delta(&json!({"type": "text_delta", "text": delta.text}), lines);
            }
            Part::Call(_, call) => {
                let block = json!({"type": "tool_use", "id": call.id, "name": call.name, "input": {}});
                self.open("tool_use", &block, lines);
            }
            Part::Arguments(_, text) => {
                self.delta(&json!({"type": "input_json_delta", "partial_json": text}), lines);
            }
        }
    }

    fn end(&mut self, _: usize, ending: &Ending, usage: Usage, lines: &mut Vec<Bytes>) {
        for citation in self.citations() {
            if self.block != Some("text") {
                self.open("text", &json!({"type": "text", "text": ""}), lines);
            }
            self.delta(&json!({"type": "citations_delta", "citation": citation}), lines);
        }
        self.close(lines);
        let (reason, sequence) = reason(ending);
        let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        lines.push(event(&json!({"type": "message_delta", "delta": delta, "usage": cost(usage)})));
        lines.push(event(&json!({"type": "message_stop"})));
    }

    fn done(&mut self, _: Usage, _: &mut Vec<Bytes>) {}

    fn failed(&mut self, error: &ApiError, lines: &mut Vec<Bytes>) {
        lines.push(event(&error.anthropic()));
    }
}

fn reason(ending: &Ending) -> (Value, Value) {
    match ending {
        Ending::Stop => ("end_turn".into(), Value::Null),
        Ending::StopString(stop) => ("stop_sequence".into(), stop.as_str().into()),
        Ending::Length => ("max_tokens".into(), Value::Null),
        Ending::Calls => ("tool_use".into(), Value::Null),
    }
}

/// What an answer cost; tokens that were there already are not counted as input.
fn cost(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens - usage.cached_tokens, "output_tokens": usage.completion_tokens,
        "cache_creation_input_tokens": 0, "cache_read_input_tokens": usage.cached_tokens,
    })
}
