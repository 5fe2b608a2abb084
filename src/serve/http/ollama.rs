//! `/api/chat` and `/api/generate`, and what their clients ask before: Ollama's words. Streams are lines of JSON.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::App;
use super::dialect::{self, Answered, Call, Context, Dialect, Ending, Maker, Part};
use super::errors::ApiError;
use super::fields::{Fields, kind};
use super::meter::Caller;
use super::parse::{self, Asked};
use crate::serve::models::Model;
use crate::serve::{Delta, Usage};

/// How a model is loaded: here it is already.
const LOADING: [&str; 10] = [
    "num_ctx",
    "num_keep",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "low_vram",
    "use_mmap",
    "use_mlock",
    "numa",
];

/// A body of `/api/chat`, translated to one of `/v1/chat/completions`.
pub(super) fn chat(body: &[u8]) -> Result<(Asked, Maker), ApiError> {
    let mut fields = Fields::parse(body)?;
    let mut messages = match fields.take("messages") {
        Some(Value::Array(messages)) => messages,
        other => return Err(ApiError::field("messages", "an array", other.as_ref().map_or("nothing", kind))),
    };
    let (mut calls, mut results) = (0, 0);
    for (index, message) in messages.iter_mut().enumerate() {
        let Some(message) = message.as_object_mut() else { continue };
        without_images(&format!("messages[{index}].images"), message.swap_remove("images"))?;
        message.swap_remove("thinking");
        // Calls have no ids here, but some templates want one: in the order of calls and results.
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(call) = call.as_object_mut() {
                call.insert("type".to_owned(), "function".into());
                call.insert("id".to_owned(), format!("call{calls:05}").into());
            }
            calls += 1;
        }
        if message.get("role").is_some_and(|role| role == "tool") {
            message.insert("tool_call_id".to_owned(), format!("call{results:05}").into());
            let name = message.swap_remove("tool_name");
            message.extend(name.map(|name| ("name".to_owned(), name)));
            results += 1;
        }
    }
    let mut chat = common(&mut fields)?;
    chat.insert("messages".to_owned(), messages.into());
    chat.extend(fields.take("tools").map(|tools| ("tools".to_owned(), tools)));
    fields.finish(&["keep_alive"])?;
    Ok((parse::chat(Fields::from(chat))?, maker(true)))
}

/// A body of `/api/generate`: a question, or, `raw`, a text to go on with.
pub(super) fn generate(body: &[u8]) -> Result<(Asked, Maker), ApiError> {
    let mut fields = Fields::parse(body)?;
    let Some(prompt) = fields.string("prompt")? else {
        return Err(ApiError::field("prompt", "a string", "nothing"));
    };
    for name in ["suffix", "template", "context"] {
        if fields.take(name).is_some_and(|value| value != "" && value != json!([])) {
            return Err(ApiError::unsupported(name, format!("{name}: expected none, got one")));
        }
    }
    without_images("images", fields.take("images"))?;
    let raw = fields.boolean("raw")?.unwrap_or(false);
    let system = fields.string("system")?.filter(|system| !system.is_empty());
    let mut chat = common(&mut fields)?;
    fields.finish(&["keep_alive"])?;
    if raw {
        let most = chat.contains_key("max_tokens");
        chat.swap_remove("chat_template_kwargs");
        if chat.get("retrieval") == Some(&Value::Bool(false)) {
            chat.swap_remove("retrieval");
        }
        chat.insert("prompt".to_owned(), prompt.into());
        let mut asked = parse::completion(Fields::from(chat))?;
        if !most {
            asked.sampling.max_tokens = None;
        }
        return Ok((asked, maker(false)));
    }
    let mut messages: Vec<Value> = system.map(|text| json!({"role": "system", "content": text})).into_iter().collect();
    messages.push(json!({"role": "user", "content": prompt}));
    chat.insert("messages".to_owned(), messages.into());
    Ok((parse::chat(Fields::from(chat))?, maker(false)))
}

/// What both have.
fn common(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let mut chat = Map::new();
    chat.extend(fields.take("model").map(|model| ("model".to_owned(), model)));
    chat.insert("stream".to_owned(), fields.take("stream").unwrap_or(Value::Bool(true)));
    if let Some(think) = fields.boolean("think")? {
        chat.insert("chat_template_kwargs".to_owned(), json!({"enable_thinking": think}));
    }
    match fields.take("format") {
        None => {}
        Some(Value::String(word)) if word.is_empty() => {}
        Some(Value::String(word)) if word == "json" => {
            chat.insert("response_format".to_owned(), json!({"type": "json_object"}));
        }
        Some(schema @ Value::Object(_)) => {
            let schema = json!({"type": "json_schema", "json_schema": {"schema": schema}});
            chat.insert("response_format".to_owned(), schema);
        }
        Some(other) => return Err(ApiError::field("format", "\"json\" or a JSON schema", kind(&other))),
    }
    chat.extend(fields.take("retrieval").map(|wanted| ("retrieval".to_owned(), wanted)));
    let Some(options) = fields.take("options") else { return Ok(chat) };
    let mut options = Fields::of("options", options)?;
    for name in ["temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty"] {
        chat.extend(options.take(name).map(|value| (name.to_owned(), value)));
    }
    chat.extend(options.take("repeat_penalty").map(|value| ("repetition_penalty".to_owned(), value)));
    // Less than one: as many as there is room for.
    let most = options.take("num_predict").filter(|most| most.as_i64().is_none_or(|most| most > 0));
    chat.extend(most.map(|most| ("max_tokens".to_owned(), most)));
    options.finish(&LOADING)?;
    Ok(chat)
}

fn without_images(name: &str, images: Option<Value>) -> Result<(), ApiError> {
    match images {
        None | Some(Value::Null) => Ok(()),
        Some(images) if images == json!([]) => Ok(()),
        Some(_) => Err(ApiError::unsupported("images", format!("{name}: expected none, got some"))),
    }
}

fn maker(chat: bool) -> Maker {
    let start = Instant::now();
    Box::new(move |context| {
        let writer = Ollama { context, chat, start, first: None, call: None, reason: "stop" };
        Box::new(writer) as Box<dyn Dialect>
    })
}

/// An answer of either route.
struct Ollama {
    context: Context,
    chat: bool,
    start: Instant,
    /// When the first part came.
    first: Option<Instant>,
    /// A call that is not whole yet: these clients take whole ones only.
    call: Option<Call>,
    reason: &'static str,
}

impl Ollama {
    fn object(&self, text: &str, calls: &[Call]) -> Value {
        let mut object = json!({"model": self.context.model, "created_at": date(OffsetDateTime::now_utc())});
        if self.chat {
            object["message"] = json!({"role": "assistant", "content": text});
            if !calls.is_empty() {
                let calls = calls
                    .iter()
                    .map(|call| json!({"function": {"name": call.name, "arguments": call.input("INVALID_JSON")}}));
                object["message"]["tool_calls"] = calls.collect();
            }
        } else {
            object["response"] = text.into();
        }
        object["done"] = false.into();
        object
    }

    /// Adds what only the last object has; times are in nanoseconds. When the first token of a whole answer came isn't
    /// known here: all its time counts as the answer's.
    fn last(&self, mut object: Value, usage: Usage) -> Value {
        let total = self.start.elapsed();
        let first = self.first.map_or(std::time::Duration::ZERO, |at| at - self.start);
        let nanoseconds = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        object["done"] = true.into();
        object["done_reason"] = self.reason.into();
        object["total_duration"] = nanoseconds(total).into();
        object["load_duration"] = 0.into();
        object["prompt_eval_count"] = usage.prompt_tokens.into();
        object["prompt_eval_duration"] = nanoseconds(first).into();
        object["eval_count"] = usage.completion_tokens.into();
        object["eval_duration"] = nanoseconds(total.saturating_sub(first)).into();
        if let Some(sources) = self.context.sources.shown(0) {
            object["sources"] = sources;
        }
        object
    }

    fn flush(&mut self, lines: &mut Vec<Bytes>) {
        if let Some(call) = self.call.take() {
            lines.push(line(&self.object("", &[call])));
        }
    }
}

impl Dialect for Ollama {
    fn whole(&mut self, answers: Vec<Answered>, usage: Usage) -> Value {
        let answer = answers.into_iter().next().unwrap_or_default();
        self.reason = reason(&answer.ending);
        self.last(self.object(&answer.text, &answer.calls), usage)
    }

    fn begin(&mut self, _: &mut Vec<Bytes>) {}

    fn part(&mut self, _: usize, part: Part, lines: &mut Vec<Bytes>) {
        self.first.get_or_insert_with(Instant::now);
        match (part, &mut self.call) {
            (Part::Text(Delta { text, .. }), _) if text.is_empty() => {}
            (Part::Text(Delta { text, .. }), _) => {
                self.flush(lines);
                lines.push(line(&self.object(&text, &[])));
            }
            (Part::Call(_, call), _) => {
                self.flush(lines);
                self.call = Some(call);
            }
            (Part::Arguments(_, text), Some(call)) => call.arguments.push_str(&text),
            (Part::Arguments(..), None) => {}
        }
    }

    fn end(&mut self, _: usize, ending: &Ending, _: Usage, lines: &mut Vec<Bytes>) {
        self.flush(lines);
        self.reason = reason(ending);
    }

    fn done(&mut self, usage: Usage, lines: &mut Vec<Bytes>) {
        lines.push(line(&self.last(self.object("", &[]), usage)));
    }

    fn failed(&mut self, error: &ApiError, lines: &mut Vec<Bytes>) {
        lines.push(line(&error.ollama()));
    }

    fn content_type(&self) -> &'static str {
        "application/x-ndjson"
    }
}

fn line(value: &Value) -> Bytes {
    format!("{}\n", dialect::line(value)).into()
}

fn reason(ending: &Ending) -> &'static str {
    if *ending == Ending::Length { "length" } else { "stop" }
}

fn date(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap_or_default()
}

fn details() -> Value {
    json!({
        "parent_model": "", "format": "", "family": "", "families": [], "parameter_size": "", "quantization_level": "",
    })
}

/// `/api/tags`: all models.
pub(super) fn tags(app: &App, caller: &Caller) -> Json<Value> {
    let shown = |model: Model| {
        let at = i64::try_from(model.created).ok().and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
        json!({
            "name": model.name, "model": model.name, "modified_at": at.map_or_else(String::new, date), "size": 0,
            "digest": "", "details": details(),
        })
    };
    Json(json!({"models": app.sorted(&caller.key).into_iter().map(shown).collect::<Vec<_>>()}))
}

/// `/api/show`: one of them.
pub(super) fn show(app: &Arc<App>, caller: &Caller, body: &[u8]) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::parse(body)?;
    // The older name of the same.
    let name = fields.string("model")?.or(fields.string("name")?);
    app.model(&caller.key, name.as_deref())?;
    fields.finish(&["verbose", "system", "template", "options"])?;
    let mut abilities = vec!["completion"];
    abilities.extend(app.language.syntax().map(|_| "tools"));
    Ok(Json(json!({
        "modelfile": "", "parameters": "", "template": app.language.template().unwrap_or_default(),
        "details": details(), "capabilities": abilities,
        "model_info": {
            "general.architecture": "ftkit", "ftkit.context_length": app.engine.limits().context_tokens,
        },
    })))
}
