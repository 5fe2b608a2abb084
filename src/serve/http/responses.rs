//! `/v1/responses`: OpenAI's newer words for the same. Nothing is remembered between requests.

use axum::body::Bytes;
use serde_json::{Map, Value, json};

use super::dialect::{Answered, Call, Context, Dialect, Ending, Maker, Part, event};
use super::errors::ApiError;
use super::fields::{Fields, kind};
use super::parse::{self, Asked};
use crate::serve::Usage;

/// What clients send besides, and what changes nothing in the answer of a local model.
const IGNORED: [&str; 9] = [
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning",
    "truncation",
    "include",
    "stream_options",
];

/// A body of `/v1/responses`, translated to one of `/v1/chat/completions`.
pub(super) fn parse(body: &[u8]) -> Result<(Asked, Maker), ApiError> {
    let mut fields = Fields::parse(body)?;
    // Only an explicit wish is refused: clients that don't say anything would get what the API's own server does.
    for (name, wanted) in [("store", fields.boolean("store")?), ("background", fields.boolean("background")?)] {
        if wanted == Some(true) {
            return Err(ApiError::unsupported(name, format!("{name}: expected false, got true: nothing is kept here")));
        }
    }
    for name in ["previous_response_id", "conversation", "prompt"] {
        if fields.take(name).is_some() {
            let message = format!("{name}: expected none, got one: nothing is kept here; send all of `input`");
            return Err(ApiError::unsupported(name, message));
        }
    }
    let mut echo = Map::new();
    let mut chat = Map::new();
    let mut messages = Vec::new();
    let instructions = fields.string("instructions")?;
    messages.extend(instructions.iter().map(|text| json!({"role": "system", "content": text})));
    match fields.take("input") {
        Some(Value::String(text)) => messages.push(json!({"role": "user", "content": text})),
        Some(Value::Array(items)) => {
            for (index, item) in items.into_iter().enumerate() {
                input(&format!("input[{index}]"), item, &mut messages)?;
            }
        }
        other => {
            let got = other.as_ref().map_or("nothing", kind);
            return Err(ApiError::field("input", "a string or an array of items", got));
        }
    }
    echo.insert("instructions".to_owned(), instructions.into());
    chat.insert("messages".to_owned(), messages.into());
    for (name, theirs, default) in [
        ("temperature", "temperature", json!(1.0)),
        ("top_p", "top_p", json!(1.0)),
        ("max_output_tokens", "max_tokens", Value::Null),
        ("parallel_tool_calls", "parallel_tool_calls", json!(true)),
    ] {
        let value = fields.take(name);
        echo.insert(name.to_owned(), value.clone().unwrap_or(default));
        chat.extend(value.map(|value| (theirs.to_owned(), value)));
    }
    for name in ["model", "stream", "seed", "top_k", "min_p", "service_tier", "chat_template_kwargs", "retrieval"] {
        chat.extend(fields.take(name).map(|value| (name.to_owned(), value)));
    }
    let tools = fields.take("tools").unwrap_or_else(|| json!([]));
    let choice = fields.take("tool_choice");
    echo.insert("tools".to_owned(), tools.clone());
    echo.insert("tool_choice".to_owned(), choice.clone().unwrap_or_else(|| "auto".into()));
    chat.insert("tools".to_owned(), nested("tools", tools)?);
    chat.extend(choice.map(|choice| ("tool_choice".to_owned(), chosen(choice))));
    let mut text = Fields::of("text", fields.take("text").unwrap_or_else(|| json!({})))?;
    let format = text.take("format").unwrap_or_else(|| json!({"type": "text"}));
    text.finish(&["verbosity"])?;
    echo.insert("text".to_owned(), json!({"format": format}));
    chat.insert("response_format".to_owned(), response_format(format));
    fields.finish(&IGNORED)?;
    let asked = parse::chat(Fields::from(chat))?;
    let maker = Box::new(move |context| {
        let writer = Responses { context, echo, items: Vec::new(), open: None, sequence: 0 };
        Box::new(writer) as Box<dyn Dialect>
    });
    Ok((asked, maker))
}

/// Adds what an item of the input says to the messages of a chat.
fn input(name: &str, item: Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut fields = Fields::of(name, item)?;
    let kind = fields.string("type")?.unwrap_or_else(|| "message".to_owned());
    match kind.as_str() {
        "message" => {
            let role = fields.take("role").unwrap_or(Value::Null);
            let mut content = fields.take("content").unwrap_or(Value::Null);
            for part in content.as_array_mut().into_iter().flatten() {
                if matches!(part["type"].as_str(), Some("input_text" | "output_text")) {
                    part["type"] = "text".into();
                }
            }
            messages.push(json!({"role": role, "content": content}));
        }
        "function_call" => {
            let mut text = |field: &str| {
                let value = fields.string(field)?;
                value.ok_or_else(|| ApiError::field(&format!("{name}.{field}"), "a string", "nothing"))
            };
            let (id, called, arguments) = (text("call_id")?, text("name")?, text("arguments")?);
            let call = json!({"id": id, "type": "function", "function": {"name": called, "arguments": arguments}});
            // Calls that follow one another are those of one turn, and of its text.
            match messages.last_mut().filter(|last| last["role"] == "assistant") {
                Some(last) => match last.get_mut("tool_calls").and_then(Value::as_array_mut) {
                    Some(calls) => calls.push(call),
                    None => last["tool_calls"] = json!([call]),
                },
                None => messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
            }
        }
        "function_call_output" => {
            let id = fields.take("call_id").unwrap_or(Value::Null);
            let mut output = fields.take("output").unwrap_or(Value::Null);
            for part in output.as_array_mut().into_iter().flatten() {
                if part["type"] == "input_text" {
                    part["type"] = "text".into();
                }
            }
            messages.push(json!({"role": "tool", "tool_call_id": id, "content": output}));
        }
        // Another server's thoughts.
        "reasoning" => {}
        other => {
            let got: String = other.chars().take(40).collect();
            let expected = "message, function_call, function_call_output or reasoning";
            return Err(ApiError::field(&format!("{name}.type"), expected, &format!("{got:?}")));
        }
    }
    Ok(())
}

/// Tools whose functions are fields of their own.
fn nested(name: &str, tools: Value) -> Result<Value, ApiError> {
    let Value::Array(tools) = tools else {
        return Err(ApiError::field(name, "an array", kind(&tools)));
    };
    let nested = tools.into_iter().map(|mut tool| {
        let kind = tool.as_object_mut().and_then(|tool| tool.swap_remove("type")).unwrap_or(Value::Null);
        json!({"type": kind, "function": tool})
    });
    Ok(nested.collect())
}

/// A choice whose function's name is a field of its own.
fn chosen(choice: Value) -> Value {
    if choice["type"] == "function" && choice["name"].is_string() {
        return json!({"type": "function", "function": {"name": choice["name"]}});
    }
    choice
}

/// A format whose schema is a field of its own.
fn response_format(mut format: Value) -> Value {
    if format["type"] == "json_schema" {
        let rest = format.as_object_mut().map(|format| {
            format.swap_remove("type");
            std::mem::take(format)
        });
        return json!({"type": "json_schema", "json_schema": rest});
    }
    format
}

/// A response; `items` are all of its output so far.
struct Responses {
    context: Context,
    /// Fields of the request that the response repeats.
    echo: Map<String, Value>,
    items: Vec<Value>,
    /// What is being written: an item's index, and its text or arguments so far.
    open: Option<(usize, String)>,
    sequence: u64,
}

impl Responses {
    /// The response as an object, `status` in the API's words.
    fn response(&self, status: &str, usage: Option<Usage>) -> Value {
        let mut response = json!({
            "id": format!("resp_{}", self.context.id),
            "object": "response",
            "created_at": self.context.created,
            "status": status,
            "error": null,
            "incomplete_details": (status == "incomplete").then(|| json!({"reason": "max_output_tokens"})),
            "model": self.context.model,
            "output": self.items,
            "previous_response_id": null,
            "store": false,
            "metadata": {},
            "usage": usage.map(|usage| json!({
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            })),
        });
        for (name, value) in &self.echo {
            response[name] = value.clone();
        }
        response
    }

    /// The texts that the answer was written under, as citations at the end of its text.
    fn annotations(&self, text: &str) -> Vec<Value> {
        let sources = self.context.sources.of(0).unwrap_or_default().into_iter();
        let index = text.chars().count();
        let cited = sources.map(|source| {
            json!({
                "type": "file_citation", "file_id": source.source, "filename": source.source, "index": index,
                "text": source.text,
            })
        });
        cited.collect()
    }

    fn message(&self, index: usize, text: Option<&str>, status: &str) -> Value {
        let content: Vec<Value> = text.map(|text| output_text(text, self.annotations(text))).into_iter().collect();
        let id = format!("msg_{}_{index}", self.context.id);
        json!({"id": id, "type": "message", "role": "assistant", "status": status, "content": content})
    }

    fn call(&self, index: usize, call: &Call, status: &str) -> Value {
        json!({
            "id": format!("fc_{}_{index}", self.context.id), "type": "function_call", "status": status,
            "call_id": call.id, "name": call.name, "arguments": call.arguments,
        })
    }

    fn send(&mut self, kind: &str, mut fields: Value, lines: &mut Vec<Bytes>) {
        fields["type"] = kind.into();
        fields["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        lines.push(event(&fields));
    }

    /// Begins an item and makes it the one that is written.
    fn open(&mut self, item: Value, lines: &mut Vec<Bytes>) {
        let index = self.items.len();
        self.send("response.output_item.added", json!({"output_index": index, "item": item}), lines);
        self.items.push(item);
        self.open = Some((index, String::new()));
    }

    /// Ends the item that is written, if there is one. What a text cites is known when the answer ends.
    fn close(&mut self, status: &str, lines: &mut Vec<Bytes>) {
        let Some((index, text)) = self.open.take() else { return };
        let place = json!({"item_id": self.items[index]["id"], "output_index": index});
        let with = |more: Value| {
            let mut fields = place.clone();
            fields
                .as_object_mut()
                .into_iter()
                .for_each(|map| map.extend(more.as_object().cloned().unwrap_or_default()));
            fields
        };
        if self.items[index]["type"] == "message" {
            let annotations = self.annotations(&text);
            for (number, annotation) in annotations.iter().enumerate() {
                let added = with(json!({"content_index": 0, "annotation_index": number, "annotation": annotation}));
                self.send("response.output_text.annotation.added", added, lines);
            }
            let part_text = output_text(&text, annotations);
            let done = with(json!({"content_index": 0, "text": text, "logprobs": []}));
            self.send("response.output_text.done", done, lines);
            let part = with(json!({"content_index": 0, "part": part_text}));
            self.send("response.content_part.done", part, lines);
            self.items[index]["content"] = json!([part_text]);
        } else {
            let done = with(json!({"arguments": text, "name": self.items[index]["name"]}));
            self.send("response.function_call_arguments.done", done, lines);
            self.items[index]["arguments"] = text.into();
        }
        self.items[index]["status"] = status.into();
        let item = self.items[index].clone();
        self.send("response.output_item.done", json!({"output_index": index, "item": item}), lines);
    }

    /// More of the item that is written.
    fn grow(&mut self, kind: &str, more: &str, lines: &mut Vec<Bytes>) {
        let Some((index, text)) = &mut self.open else { return };
        text.push_str(more);
        let mut fields = json!({"item_id": self.items[*index]["id"], "output_index": index, "delta": more});
        if kind == "response.output_text.delta" {
            fields["content_index"] = 0.into();
            fields["logprobs"] = json!([]);
        }
        self.send(kind, fields, lines);
    }

    fn writes_text(&self) -> bool {
        self.open.as_ref().is_some_and(|(index, _)| self.items[*index]["type"] == "message")
    }
}

impl Dialect for Responses {
    fn whole(&mut self, answers: Vec<Answered>, usage: Usage) -> Value {
        let answer = answers.into_iter().next().unwrap_or_default();
        let status = status(&answer.ending);
        if !answer.text.is_empty() || answer.calls.is_empty() {
            self.items.push(self.message(0, Some(&answer.text), status));
        }
        for call in &answer.calls {
            self.items.push(self.call(self.items.len(), call, status));
        }
        self.response(status, Some(usage))
    }

    fn begin(&mut self, lines: &mut Vec<Bytes>) {
        let response = self.response("in_progress", None);
        self.send("response.created", json!({"response": response}), lines);
        self.send("response.in_progress", json!({"response": response}), lines);
    }

    fn part(&mut self, _: usize, part: Part, lines: &mut Vec<Bytes>) {
        match part {
            Part::Text(delta) if delta.text.is_empty() => {}
            Part::Text(delta) => {
                if !self.writes_text() {
                    self.close("completed", lines);
                    self.open(self.message(self.items.len(), None, "in_progress"), lines);
                    let index = self.items.len() - 1;
                    let part = json!({
                        "item_id": self.items[index]["id"], "output_index": index, "content_index": 0,
                        "part": output_text("", Vec::new()),
                    });
                    self.send("response.content_part.added", part, lines);
                }
                self.grow("response.output_text.delta", &delta.text, lines);
            }
            Part::Call(_, call) => {
                self.close("completed", lines);
                self.open(self.call(self.items.len(), &call, "in_progress"), lines);
            }
            Part::Arguments(_, text) => self.grow("response.function_call_arguments.delta", &text, lines),
        }
    }

    fn end(&mut self, _: usize, ending: &Ending, usage: Usage, lines: &mut Vec<Bytes>) {
        let status = status(ending);
        self.close(status, lines);
        let response = self.response(status, Some(usage));
        self.send(&format!("response.{status}"), json!({"response": response}), lines);
    }

    fn done(&mut self, _: Usage, _: &mut Vec<Bytes>) {}

    fn failed(&mut self, error: &ApiError, lines: &mut Vec<Bytes>) {
        let error = error.json()["error"].take();
        let mut response = self.response("failed", None);
        response["error"] = json!({"code": "server_error", "message": error["message"]});
        self.send("response.failed", json!({"response": response}), lines);
    }
}

fn output_text(text: &str, annotations: Vec<Value>) -> Value {
    json!({"type": "output_text", "text": text, "annotations": annotations, "logprobs": []})
}

fn status(ending: &Ending) -> &'static str {
    if *ending == Ending::Length { "incomplete" } else { "completed" }
}
