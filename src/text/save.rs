//! A tokenizer and a template as the files of a model's directory.

use std::path::Path;

use serde_json::{Map, json};

use super::template::Template;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Writes `tokenizer.json` and `tokenizer_config.json`, with `template` in it, to the directory `path`, so that
/// `transformers` loads the same ids and the same template.
///
/// # Errors
/// The directory or a file in it cannot be written.
pub fn save(tokenizer: &Tokenizer, template: Option<&Template>, path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|error| Error::io(path, &error))?;
    let mut config = Map::new();
    config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    config.insert("added_tokens_decoder".to_owned(), tokenizer.added_tokens_decoder());
    for (name, text) in tokenizer.special_tokens() {
        config.insert(name.clone(), json!(text));
    }
    if let Some(template) = template {
        let source = template.source();
        let value = match template.tool_use_source() {
            Some(tool_use) => {
                json!([{"name": "default", "template": source}, {"name": "tool_use", "template": tool_use}])
            }
            None => json!(source),
        };
        config.insert("chat_template".to_owned(), value);
    }
    let config = serde_json::to_string_pretty(&config).map_err(|error| Error::failure(error.to_string()))?;
    for (name, text) in [("tokenizer.json", tokenizer.to_json()?), ("tokenizer_config.json", config)] {
        let file = path.join(name);
        std::fs::write(&file, text).map_err(|error| Error::io(&file, &error))?;
    }
    Ok(())
}
