//! A model's directory as Hugging Face lays it out: what it says about tokens and templates.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::json::parse;
use super::limits;
use crate::error::{Error, Result};

/// The special tokens' names in `tokenizer_config.json` and the keys of their ids in GGUF metadata (with the misspelling
/// that the format has).
pub(super) const SPECIAL_TOKEN_KEYS: [(&str, &str); 7] = [
    ("bos_token", "tokenizer.ggml.bos_token_id"),
    ("eos_token", "tokenizer.ggml.eos_token_id"),
    ("unk_token", "tokenizer.ggml.unknown_token_id"),
    ("sep_token", "tokenizer.ggml.seperator_token_id"),
    ("pad_token", "tokenizer.ggml.padding_token_id"),
    ("cls_token", "tokenizer.ggml.cls_token_id"),
    ("mask_token", "tokenizer.ggml.mask_token_id"),
];

/// What the small files of a directory say.
#[derive(Debug, Default)]
pub(super) struct Config {
    pub template: Option<String>,
    pub tool_use_template: Option<String>,
    /// `bos_token` → its text, and so on.
    pub special_tokens: BTreeMap<String, String>,
    /// Tokens that `tokenizer.json` may lack: id → entry.
    pub added_tokens: BTreeMap<u32, Value>,
    /// The ids at which generation stops, by `generation_config.json` or `config.json`.
    pub end_ids: Vec<u32>,
}

impl Config {
    pub fn read(path: &Path) -> Result<Self> {
        let mut config = Self::default();
        let tokenizer = read_object(&path.join("tokenizer_config.json"))?.unwrap_or_default();
        let fallback = read_object(&path.join("special_tokens_map.json"))?.unwrap_or_default();
        for (name, _) in SPECIAL_TOKEN_KEYS {
            let text = [&tokenizer, &fallback].into_iter().find_map(|map| token_text(map.get(name)?));
            config.special_tokens.extend(text.map(|text| (name.to_owned(), text)));
        }
        if let Some(added) = tokenizer.get("added_tokens_decoder").and_then(Value::as_object) {
            for (id, entry) in added {
                let id = id.parse().map_err(|_| {
                    Error::input(format!("tokenizer_config.json: added_tokens_decoder: expected ids, got {id:?}"))
                })?;
                config.added_tokens.insert(id, entry.clone());
            }
        }
        (config.template, config.tool_use_template) = templates(path, &tokenizer)?;
        for name in ["generation_config.json", "config.json"] {
            let ids = read_object(&path.join(name))?.and_then(|map| map.get("eos_token_id").map(ids));
            if let Some(ids) = ids.filter(|ids| !ids.is_empty()) {
                config.end_ids = ids;
                break;
            }
        }
        Ok(config)
    }
}

/// The template and the one for tools: a file of its own goes before the configuration.
fn templates(path: &Path, tokenizer: &Map<String, Value>) -> Result<(Option<String>, Option<String>)> {
    if let Some(text) = read_text(&path.join("chat_template.jinja"), limits::TEMPLATE_BYTES as u64)? {
        let tool_use = path.join("additional_chat_templates").join("tool_use.jinja");
        return Ok((Some(text), read_text(&tool_use, limits::TEMPLATE_BYTES as u64)?));
    }
    Ok(match tokenizer.get("chat_template") {
        Some(Value::String(text)) => (Some(text.clone()), None),
        Some(Value::Array(items)) => {
            let named = |name: &str| {
                let item = items.iter().find(|item| item.get("name").and_then(Value::as_str) == Some(name))?;
                item.get("template").and_then(Value::as_str).map(str::to_owned)
            };
            (named("default"), named("tool_use"))
        }
        _ => (None, None),
    })
}

fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

fn ids(value: &Value) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(items) => items.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

/// The file's text; none where there is no such file.
pub(super) fn read_text(path: &Path, most_bytes: u64) -> Result<Option<String>> {
    let bytes = match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        found => found.map_err(|error| Error::io(path, &error))?.len(),
    };
    if bytes > most_bytes {
        return Err(Error::input(format!("{}: expected at most {most_bytes} bytes, got {bytes}", path.display())));
    }
    std::fs::read_to_string(path).map(Some).map_err(|error| Error::io(path, &error))
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    // the longest in the wild, with thousands of added tokens, have some hundred KiB
    let Some(text) = read_text(path, 64 << 20)? else { return Ok(None) };
    match parse(&text, &path.display().to_string())? {
        Value::Object(map) => Ok(Some(map)),
        _ => Err(Error::input(format!("{}: expected a JSON object", path.display()))),
    }
}
