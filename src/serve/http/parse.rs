//! What OpenAI's two completion routes are asked, and what the other APIs' requests are translated to: from fields to what
//! the engine is asked. Nothing is guessed.

use serde_json::{Map, Value};

use super::errors::ApiError;
use super::fields::{Fields, kind};
use super::tools;
use crate::serve::Sampling;
use crate::serve::calls::{Choice, Tools};
use crate::serve::constraint::Format;
use crate::serve::sampling::{MAX_BIASES, MAX_STOP_BYTES, MAX_STOPS, MAX_TOP_LOGPROBS};
use crate::text::Conversation;

/// Most answers to one prompt.
const MAX_CHOICES: i64 = 16;
/// Most prompts of one request.
const MAX_PROMPTS: usize = 64;
/// Most messages of one conversation.
const MAX_MESSAGES: usize = 4096;

/// What OpenAI's clients send besides, and what changes nothing in the answer of a local model.
const IGNORED: [&str; 10] = [
    "user",
    "store",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "verbosity",
    "prediction",
    "modalities",
];

/// What is to be completed.
#[derive(Debug, PartialEq)]
pub(super) enum Prompt {
    /// A conversation, by the model's template.
    Chat(Conversation),
    /// A text as it is.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<u32>),
}

/// A request of either route.
#[derive(Debug, PartialEq)]
pub(super) struct Asked {
    /// The model's name, if one was given.
    pub model: Option<String>,
    /// What is to be completed; several only on the older route.
    pub prompts: Vec<Prompt>,
    /// How.
    pub sampling: Sampling,
    /// The functions that it may call.
    pub tools: Option<Tools>,
    /// What the answer must look like.
    pub format: Option<Format>,
    /// Answers to each prompt.
    pub choices: usize,
    /// Whether it is written under what an index finds, where there is one: when not said, if it can be.
    pub retrieval: Option<bool>,
    /// Whether the answer comes in pieces.
    pub stream: bool,
    /// Whether the last piece says what it cost.
    pub include_usage: bool,
    /// Among the requests of the same client.
    pub priority: i8,
}

/// The body of `/v1/chat/completions`.
pub(super) fn chat(mut fields: Fields) -> Result<Asked, ApiError> {
    let messages = match fields.take("messages") {
        Some(Value::Array(messages)) if (1..=MAX_MESSAGES).contains(&messages.len()) => messages,
        Some(Value::Array(messages)) => {
            let expected = format!("1 to {MAX_MESSAGES} messages");
            return Err(ApiError::field("messages", &expected, &messages.len().to_string()));
        }
        Some(other) => return Err(ApiError::field("messages", "an array", kind(&other))),
        None => return Err(ApiError::field("messages", "an array", "nothing")),
    };
    let messages =
        messages.into_iter().enumerate().map(|(index, value)| message(index, value)).collect::<Result<_, _>>()?;
    let (shown, tools) = tools::tools(&mut fields)?.unzip();
    let extra = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(ApiError::field("chat_template_kwargs", "an object", kind(&other))),
    };
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS as i64)?;
    if top.is_some() && !wanted {
        return Err(ApiError::field("top_logprobs", "`logprobs`: true with it", "it alone"));
    }
    let retrieval = fields.boolean("retrieval")?;
    let newer = fields.integer("max_completion_tokens", 1, i64::from(u32::MAX))?;
    let mut asked = common(&mut fields, vec![Prompt::Chat(Conversation { messages, tools: shown, extra })])?;
    if tools.as_ref().is_some_and(|tools| tools.choice != Choice::Auto) && asked.sampling.ignore_end {
        return Err(ApiError::field("ignore_eos", "false with this `tool_choice`", "true"));
    }
    asked.tools = tools;
    asked.retrieval = retrieval;
    asked.sampling.max_tokens = newer.map(|count| count as usize).or(asked.sampling.max_tokens);
    asked.sampling.logprobs = wanted.then_some(top.unwrap_or(0) as usize);
    fields.finish(&IGNORED)?;
    Ok(asked)
}

/// The body of `/v1/completions`.
pub(super) fn completion(mut fields: Fields) -> Result<Asked, ApiError> {
    let prompts = match fields.take("prompt") {
        Some(value) => prompts("prompt", value, MAX_PROMPTS)?,
        None => return Err(ApiError::field("prompt", "a string or an array", "nothing")),
    };
    let logprobs = fields.integer("logprobs", 0, MAX_TOP_LOGPROBS as i64)?;
    if fields.boolean("echo")? == Some(true) {
        return Err(ApiError::unsupported("echo", "echo: expected false, got true"));
    }
    if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::unsupported("suffix", "suffix: expected none, got one"));
    }
    let best_of = fields.integer("best_of", 1, MAX_CHOICES)?;
    let mut asked = common(&mut fields, prompts)?;
    if best_of.is_some_and(|count| count as usize != asked.choices) {
        return Err(ApiError::unsupported("best_of", "best_of: expected the same number as n, got another"));
    }
    // The older route's default.
    asked.sampling.max_tokens = asked.sampling.max_tokens.or(Some(16));
    asked.sampling.logprobs = logprobs.map(|count| count as usize);
    fields.finish(&IGNORED)?;
    Ok(asked)
}

/// What both routes have.
fn common(fields: &mut Fields, prompts: Vec<Prompt>) -> Result<Asked, ApiError> {
    let default = Sampling::default();
    let sampling = Sampling {
        max_tokens: fields.integer("max_tokens", 1, i64::from(u32::MAX))?.map(|count| count as usize),
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(default.temperature),
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(default.top_p),
        top_k: fields.integer("top_k", 0, i64::from(u32::MAX))?.map_or(default.top_k, |count| count as usize),
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(default.min_p),
        repetition_penalty: fields.number("repetition_penalty", 0.01, 100.0)?.unwrap_or(default.repetition_penalty),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(default.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(default.frequency_penalty),
        // Any 64 bits will do.
        seed: fields.integer("seed", i64::MIN, i64::MAX)?.map(|seed| seed as u64),
        stop: fields.take("stop").map_or(Ok(Vec::new()), stops)?,
        logit_bias: fields.take("logit_bias").map_or(Ok(Vec::new()), biases)?,
        logprobs: None,
        ignore_end: fields.boolean("ignore_eos")?.unwrap_or(false),
    };
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let include_usage = match fields.take("stream_options") {
        None => false,
        Some(_) if !stream => return Err(ApiError::field("stream_options", "`stream`: true with it", "it alone")),
        Some(options) => {
            let mut options = Fields::of("stream_options", options)?;
            let include = options.boolean("include_usage")?.unwrap_or(false);
            options.finish(&["include_obfuscation"])?;
            include
        }
    };
    let format = fields.take("response_format").map_or(Ok(None), format)?;
    if format.is_some() && sampling.ignore_end {
        return Err(ApiError::field("ignore_eos", "false with `response_format`", "true"));
    }
    Ok(Asked {
        model: fields.string("model")?,
        prompts,
        sampling,
        tools: None,
        format,
        choices: fields.integer("n", 1, MAX_CHOICES)?.unwrap_or(1) as usize,
        retrieval: None,
        stream,
        include_usage,
        priority: priority(fields)?,
    })
}

/// OpenAI's tiers: `flex` may take longer, `priority` goes first. A quarter of the share, or four times as much.
fn priority(fields: &mut Fields) -> Result<i8, ApiError> {
    match fields.string("service_tier")?.as_deref() {
        None | Some("auto" | "default") => Ok(0),
        Some("flex") => Ok(-2),
        Some("priority") => Ok(2),
        Some(other) => Err(ApiError::field("service_tier", "auto, default, flex or priority", &format!("{other:?}"))),
    }
}

/// A message with the content parts of text joined, for templates know strings only.
fn message(index: usize, value: Value) -> Result<Value, ApiError> {
    let name = format!("messages[{index}]");
    let Value::Object(mut message) = value else {
        return Err(ApiError::field(&name, "an object", kind(&value)));
    };
    let role = match message.get("role") {
        Some(Value::String(role)) => role.clone(),
        other => return Err(ApiError::field(&format!("{name}.role"), "a string", other.map_or("nothing", kind))),
    };
    match role.as_str() {
        "system" | "user" | "assistant" | "tool" => {}
        // The newer name of the same.
        "developer" => {
            message.insert("role".to_owned(), Value::from("system"));
        }
        other => {
            let got = format!("{:?}", other.chars().take(40).collect::<String>());
            return Err(ApiError::field(&format!("{name}.role"), "system, developer, user, assistant or tool", &got));
        }
    }
    // Clients send back whole answers; templates ask whether a field is there.
    message.retain(|_, value| !value.is_null() && *value != Value::Array(Vec::new()));
    let calls = message.get_mut("tool_calls").map(Value::take);
    let called = calls.is_some();
    if let Some(calls) = calls {
        message.insert("tool_calls".to_owned(), tools::calls(&format!("{name}.tool_calls"), calls)?);
    }
    let content = match message.get_mut("content").map(Value::take) {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => joined(&name, parts)?,
        None if called => String::new(),
        other => {
            let got = other.as_ref().map_or("nothing", kind);
            return Err(ApiError::field(&format!("{name}.content"), "a string or an array of text parts", got));
        }
    };
    message.insert("content".to_owned(), Value::String(content));
    Ok(Value::Object(message))
}

fn joined(name: &str, parts: Vec<Value>) -> Result<String, ApiError> {
    let mut text = String::new();
    for part in parts {
        match (part.get("type").and_then(Value::as_str), part.get("text")) {
            (Some("text"), Some(Value::String(part))) => text.push_str(part),
            _ => return Err(ApiError::field(&format!("{name}.content"), "parts of type text", "another part")),
        }
    }
    Ok(text)
}

/// OpenAI's three types, and two of other servers: an expression, and a grammar.
fn format(value: Value) -> Result<Option<Format>, ApiError> {
    let mut fields = Fields::of("response_format", value)?;
    let kind = fields.string("type")?;
    let text = |fields: &mut Fields, name: &str| {
        fields.string(name)?.ok_or_else(|| ApiError::field(&format!("response_format.{name}"), "a string", "nothing"))
    };
    let format = match kind.as_deref() {
        Some("text") => None,
        Some("json_object") => Some(Format::Json(serde_json::json!({"type": "object"}))),
        Some("json_schema") => {
            let Some(schema) = fields.take("json_schema") else {
                return Err(ApiError::field("response_format.json_schema", "an object", "nothing"));
            };
            let mut inner = Fields::of("response_format.json_schema", schema)?;
            let schema = match inner.take("schema") {
                Some(schema @ Value::Object(_)) => schema,
                other => {
                    let got = other.as_ref().map_or("nothing", self::kind);
                    return Err(ApiError::field("response_format.json_schema.schema", "an object", got));
                }
            };
            // Always strict; names and descriptions are for people.
            inner.finish(&["name", "description", "strict"])?;
            Some(Format::Json(schema))
        }
        Some("regex") => Some(Format::Regex(text(&mut fields, "regex")?)),
        Some("grammar") => Some(Format::Grammar(text(&mut fields, "grammar")?)),
        other => {
            let got =
                other.map_or("nothing".to_owned(), |other| format!("{:?}", other.chars().take(40).collect::<String>()));
            let expected = "text, json_object, json_schema, regex or grammar";
            return Err(ApiError::field("response_format.type", expected, &got));
        }
    };
    fields.finish(&[])?;
    Ok(format)
}

fn stops(value: Value) -> Result<Vec<String>, ApiError> {
    let expected = format!("a string or at most {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes");
    let stops = match value {
        Value::String(stop) => vec![stop],
        Value::Array(stops) if stops.len() <= MAX_STOPS => stops
            .into_iter()
            .map(|stop| match stop {
                Value::String(stop) => Ok(stop),
                other => Err(ApiError::field("stop", &expected, kind(&other))),
            })
            .collect::<Result<_, _>>()?,
        Value::Array(stops) => return Err(ApiError::field("stop", &expected, &stops.len().to_string())),
        other => return Err(ApiError::field("stop", &expected, kind(&other))),
    };
    match stops.iter().find(|stop| !(1..=MAX_STOP_BYTES).contains(&stop.len())) {
        Some(stop) => Err(ApiError::field("stop", &expected, &format!("one of {} bytes", stop.len()))),
        None => Ok(stops),
    }
}

fn biases(value: Value) -> Result<Vec<(u32, f32)>, ApiError> {
    let expected = format!("at most {MAX_BIASES} token ids with a bias from -100 to 100");
    let Value::Object(map) = value else {
        return Err(ApiError::field("logit_bias", &expected, kind(&value)));
    };
    if map.len() > MAX_BIASES {
        return Err(ApiError::field("logit_bias", &expected, &map.len().to_string()));
    }
    let bias = |(token, bias): (String, Value)| match (token.parse::<u32>(), bias.as_f64()) {
        (Ok(token), Some(bias)) if (-100.0..=100.0).contains(&bias) => Ok((token, bias as f32)),
        _ => Err(ApiError::field("logit_bias", &expected, "another entry")),
    };
    map.into_iter().map(bias).collect()
}

/// Texts or token ids, one or at most `most` of them.
pub(super) fn prompts(name: &str, value: Value, most: usize) -> Result<Vec<Prompt>, ApiError> {
    let wrong = |got: &str| {
        let expected = format!("a string, token ids, or 1 to {most} of either");
        ApiError::field(name, &expected, got)
    };
    let ids = |values: &[Value]| -> Option<Vec<u32>> {
        values.iter().map(|value| value.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
    };
    match value {
        Value::String(text) => Ok(vec![Prompt::Text(text)]),
        Value::Array(values) if values.is_empty() => Err(wrong("an empty array")),
        Value::Array(values) if values[0].is_number() => {
            ids(&values).map(|ids| vec![Prompt::Tokens(ids)]).ok_or_else(|| wrong("something that is no token id"))
        }
        Value::Array(values) if values.len() <= most => values
            .into_iter()
            .map(|value| match value {
                Value::String(text) => Ok(Prompt::Text(text)),
                Value::Array(values) => {
                    ids(&values).map(Prompt::Tokens).ok_or_else(|| wrong("something that is no token id"))
                }
                other => Err(wrong(kind(&other))),
            })
            .collect(),
        Value::Array(values) => Err(wrong(&format!("{} of them", values.len()))),
        other => Err(wrong(kind(&other))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "\\PC{0,12}".prop_map(Value::from),
            prop_oneof![Just("user"), Just("assistant"), Just("text"), Just("auto"), Just("none")]
                .prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 5, |inner| {
            let key = prop_oneof![
                "\\PC{0,6}",
                prop::sample::select(vec!["role", "content", "type", "text", "include_usage", "tool_calls", "7"])
                    .prop_map(str::to_owned),
            ];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((key, inner), 0..4).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    fn any_body() -> impl Strategy<Value = Value> {
        let names = vec![
            "model",
            "messages",
            "prompt",
            "max_tokens",
            "max_completion_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "n",
            "stop",
            "seed",
            "stream",
            "stream_options",
            "logprobs",
            "top_logprobs",
            "logit_bias",
            "tools",
            "tool_choice",
            "response_format",
            "presence_penalty",
            "frequency_penalty",
            "best_of",
            "echo",
            "suffix",
            "user",
        ];
        let valid = json!([{"role": "user", "content": "hi"}]);
        prop::collection::vec((prop::sample::select(names), any_json()), 0..6).prop_map(move |pairs| {
            let mut map: Map<String, Value> = pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            map.entry("messages").or_insert(valid.clone());
            map.entry("prompt").or_insert("hi".into());
            Value::Object(map)
        })
    }

    proptest! {
        /// Whatever is parsed is within every bound; whatever is not is an error that says so, and nothing panics.
        #[test]
        fn any_fields_are_valid_or_refused(mut body in any_body()) {
            for (route, other) in [(chat as fn(Fields) -> Result<Asked, ApiError>, "prompt"), (completion, "messages")] {
                let text = body.as_object_mut().map(|map| map.remove(other)).map_or(String::new(), |removed| {
                    let text = body.to_string();
                    if let (Some(removed), Some(map)) = (removed, body.as_object_mut()) {
                        map.insert(other.to_owned(), removed);
                    }
                    text
                });
                match Fields::parse(text.as_bytes()).and_then(route) {
                    Ok(asked) => {
                        prop_assert!((1..=16).contains(&asked.choices) && !asked.prompts.is_empty());
                        prop_assert!(asked.sampling.check(usize::MAX).is_ok());
                    }
                    Err(error) => prop_assert!(error.json()["error"]["message"].as_str().unwrap().contains("expected")),
                }
            }
        }

        #[test]
        fn any_bytes_are_refused_or_parsed(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Fields::parse(&body).and_then(chat);
            let _ = Fields::parse(&body).and_then(completion);
        }
    }

    #[test]
    fn deep_nesting_is_refused() {
        let body = format!("{{\"messages\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(Fields::parse(body.as_bytes()).is_err());
    }

    #[test]
    fn parts_join_and_developer_is_system() {
        let body = json!({"messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "c"},
        ], "max_completion_tokens": 3, "max_tokens": 5, "seed": -1});
        let asked = chat(Fields::parse(body.to_string().as_bytes()).unwrap()).unwrap();
        let Prompt::Chat(conversation) = &asked.prompts[0] else { panic!("expected a chat") };
        assert_eq!(conversation.messages[0], json!({"role": "system", "content": "ab"}));
        assert_eq!((asked.sampling.max_tokens, asked.sampling.seed), (Some(3), Some(u64::MAX)));
    }
}
