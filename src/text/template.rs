//! A model's chat template: Jinja text from a stranger, rendered without I/O and within limits.
//!
//! What it writes equals what `transformers`' `apply_chat_template` writes for the same messages.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use minijinja::value::Serde;
use minijinja::{Environment, Value};
use time::OffsetDateTime;

use super::conversation::Conversation;
use super::source::prepare;
use super::{clock, directory, limits, python};
use crate::error::{Error, Result};
use crate::gguf;

/// The name of the one template in its environment.
const NAME: &str = "chat template";

/// A compiled chat template with the special tokens that it may name. Cheap to clone.
#[derive(Clone)]
pub struct Template {
    inner: Arc<Inner>,
}

struct Inner {
    default: Compiled,
    /// A second template that some models have for conversations with tools.
    tool_use: Option<Compiled>,
    /// `bos_token`, `eos_token` and so on, as the template sees them.
    specials: BTreeMap<String, String>,
}

struct Compiled {
    environment: Environment<'static>,
    source: String,
}

impl Compiled {
    fn new(source: &str) -> Result<Self> {
        let prepared = prepare(source)?;
        let mut environment = python::environment();
        limits::on_deep_stack(|| environment.add_template_owned(NAME, prepared).map_err(|error| describe(&error)))?;
        Ok(Self { environment, source: source.to_owned() })
    }
}

impl Template {
    /// Compiles `source`; `bos` and `eos` are what it sees as `bos_token` and `eos_token`.
    pub fn from_source(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self> {
        let specials = [("bos_token", bos), ("eos_token", eos)];
        let specials = specials.into_iter().filter_map(|(name, text)| Some((name.to_owned(), text?.to_owned())));
        Self::with_specials(source, None, specials.collect())
    }

    /// The template of a model's directory (`chat_template.jinja`, or in `tokenizer_config.json`); none for a model
    /// that has none.
    pub fn from_dir(path: &Path) -> Result<Option<Self>> {
        let config = directory::Config::read(path)?;
        let Some(source) = &config.template else { return Ok(None) };
        let located = |error: Error| Error { message: format!("{}: {}", path.display(), error.message), ..error };
        Self::with_specials(source, config.tool_use_template.as_deref(), config.special_tokens)
            .map(Some)
            .map_err(located)
    }

    /// The template in a GGUF file's metadata; none for a file that has none.
    pub fn from_gguf(file: &gguf::File) -> Result<Option<Self>> {
        let metadata = file.metadata();
        let Some(source) = metadata.str("tokenizer.chat_template")? else { return Ok(None) };
        let tool_use = metadata.str("tokenizer.chat_template.tool_use")?;
        let tokens = metadata.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
        let mut specials = BTreeMap::new();
        for (name, key) in directory::SPECIAL_TOKEN_KEYS {
            if let Some(id) = metadata.u32(key)? {
                let token = usize::try_from(id).ok().and_then(|id| tokens.get(id));
                specials.extend(token.map(|token| (name.to_owned(), token.clone())));
            }
        }
        Self::with_specials(source, tool_use, specials).map(Some)
    }

    fn with_specials(source: &str, tool_use: Option<&str>, specials: BTreeMap<String, String>) -> Result<Self> {
        let default = Compiled::new(source)?;
        let tool_use = tool_use.map(Compiled::new).transpose()?;
        Ok(Self { inner: Arc::new(Inner { default, tool_use, specials }) })
    }

    /// The text of `conversation`. Raises what the template raises, with the line in the template.
    pub fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<String> {
        let prepared = Prepared::new(conversation);
        self.render_messages(&prepared, 0..conversation.messages.len(), add_generation_prompt)
    }

    /// The text of some of the messages of a prepared conversation.
    pub(super) fn render_messages(
        &self,
        prepared: &Prepared,
        messages: Range<usize>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let compiled = match &self.inner.tool_use {
            Some(tool_use) if !prepared.tools.is_none() => tool_use,
            _ => &self.inner.default,
        };
        let messages: Value = prepared.messages[messages].iter().cloned().collect();
        let now = prepared.now;
        let mut variables: BTreeMap<String, Value> = BTreeMap::new();
        variables.extend(self.inner.specials.iter().map(|(name, text)| (name.clone(), Value::from(text.as_str()))));
        variables.insert("documents".to_owned(), Value::from(()));
        variables.extend(prepared.extra.iter().cloned());
        variables.insert("messages".to_owned(), messages);
        variables.insert("tools".to_owned(), prepared.tools.clone());
        variables.insert("add_generation_prompt".to_owned(), Value::from(add_generation_prompt));
        variables
            .insert("strftime_now".to_owned(), Value::from_function(move |format: &str| clock::strftime(now, format)));
        let mut out = Limited(Vec::new());
        let template = compiled.environment.get_template(NAME).map_err(|error| describe(&error))?;
        limits::on_deep_stack(|| {
            template.render_captured_to(Value::from(variables), &mut out).map(drop).map_err(|error| describe(&error))
        })?;
        String::from_utf8(out.0).map_err(|_| Error::failure("chat template: expected UTF-8 from the renderer"))
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.inner.default.source
    }

    /// The text that is used for conversations with tools, where it is another.
    pub fn tool_use_source(&self) -> Option<&str> {
        self.inner.tool_use.as_ref().map(|compiled| compiled.source.as_str())
    }

    /// blake3, in hex, of all that decides what is written: the sources and the special tokens.
    pub fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let sources = [Some(self.source()), self.tool_use_source()];
        let specials = self.inner.specials.iter().flat_map(|(name, text)| [Some(name.as_str()), Some(text.as_str())]);
        for part in sources.into_iter().chain(specials) {
            // lengths keep neighbours apart
            hasher.update(&part.map_or(u64::MAX, |part| part.len() as u64).to_le_bytes());
            hasher.update(part.unwrap_or_default().as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// A conversation as the template engine's values, converted once for many renderings at one moment.
pub(super) struct Prepared {
    messages: Vec<Value>,
    tools: Value,
    extra: Vec<(String, Value)>,
    /// The moment that `strftime_now` tells.
    now: OffsetDateTime,
}

impl Prepared {
    pub fn new(conversation: &Conversation) -> Self {
        Self {
            messages: conversation.messages.iter().map(message).collect(),
            tools: conversation.tools.as_ref().map_or_else(|| Value::from(()), |tools| Value::from(Serde(tools))),
            extra: conversation.extra.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value)))).collect(),
            now: clock::now(),
        }
    }

    /// The same at the moment of `other`.
    pub fn at(self, other: &Self) -> Self {
        Self { now: other.now, ..self }
    }
}

/// The names under which reasoning is passed. Templates read the first, gpt-oss's the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message with its reasoning under every name that templates read, as transformers does it.
fn message(message: &serde_json::Value) -> Value {
    let reasoning = REASONING.iter().find_map(|&name| message.get(name).filter(|value| !value.is_null()));
    match (reasoning, message.as_object()) {
        (Some(reasoning), Some(fields)) => {
            let mut fields = fields.clone();
            fields.entry("thinking").or_insert_with(|| reasoning.clone());
            fields.insert("reasoning_content".to_owned(), reasoning.clone());
            Value::from(Serde(&fields))
        }
        _ => Value::from(Serde(message)),
    }
}

/// Takes text up to the limit.
struct Limited(Vec<u8>);

impl std::io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > limits::OUTPUT_BYTES {
            return Err(std::io::Error::other(format!("expected at most {} bytes of text", limits::OUTPUT_BYTES)));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What went wrong and in which line of the template.
fn describe(error: &minijinja::Error) -> Error {
    let mut innermost: &dyn std::error::Error = error;
    let mut deepest = error;
    while let Some(source) = innermost.source() {
        innermost = source;
        if let Some(source) = source.downcast_ref::<minijinja::Error>() {
            deepest = source;
        }
    }
    let line = deepest.line().or(error.line()).map_or_else(String::new, |line| format!(", line {line}"));
    let what = match (deepest.kind(), deepest.detail()) {
        (minijinja::ErrorKind::OutOfFuel, _) => {
            "expected less work for one conversation, got too many steps".to_owned()
        }
        (_, Some(detail)) => detail.to_owned(),
        (kind, None) if std::ptr::eq(innermost, deepest as &dyn std::error::Error) => kind.to_string(),
        (kind, None) => format!("{kind}: {innermost}"),
    };
    Error::input(format!("chat template{line}: {what}"))
}
