//! Text to ids and back, by the `tokenizers` crate; and sooner, to the same ids, where [`ByteLevel`] knows the way.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};
use tokenizers::AddedVocabulary;
use tokenizers::{AddedToken, Model, OffsetReferential, OffsetType, PreTokenizer, PreTokenizerWrapper};

use super::added::AddedTokens;
use super::byte_level::ByteLevel;
use super::directory::{self, Config};
use crate::error::{Error, Result};

/// The longest `tokenizer.json`, in bytes; those of vocabularies with 260,000 tokens have about 35 MB.
const MAX_BYTES: u64 = 512 << 20;

/// Names of tokens that end a turn of the assistant in the families that have them beside their end of sequence.
const END_OF_TURN: [&str; 14] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end_of_turn|>",
    "<|eot|>",
    "<|return|>",
    "<|call|>",
    "<｜end▁of▁sentence｜>",
];

/// Whether special tokens' text is parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// `<|im_end|>` becomes one id.
    Parse,
    /// `<|im_end|>` is text like any other.
    Literal,
}

/// A model's tokenizer. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    parsing: tokenizers::Tokenizer,
    /// The added tokens for text in which special ones are only text.
    literal: AddedVocabulary,
    /// The pre-tokenizer for text that doesn't begin a sequence.
    continuing: Option<PreTokenizerWrapper>,
    added: AddedTokens,
    byte_level: Option<ByteLevel>,
    special_tokens: BTreeMap<String, String>,
    bos: Option<u32>,
    eos: Option<u32>,
    end_ids: Vec<u32>,
    hash: OnceLock<String>,
}

impl Tokenizer {
    /// The tokenizer of a model's directory: `tokenizer.json`, with `tokenizer_config.json`, `special_tokens_map.json`
    /// and `generation_config.json` where they are.
    pub fn from_dir(path: &Path) -> Result<Self> {
        let file = path.join("tokenizer.json");
        let Some(text) = directory::read_text(&file, MAX_BYTES)? else {
            return Err(Error::input(format!("{}: expected tokenizer.json, got none", path.display()))
                .hint("a tokenizer in another format becomes one by loading and saving it with transformers"));
        };
        Self::from_json(&text, Config::read(path)?)
            .map_err(|error| Error { message: format!("{}: {}", file.display(), error.message), ..error })
    }

    pub(super) fn from_json(text: &str, config: Config) -> Result<Self> {
        let mut parsing = guarded(|| tokenizers::Tokenizer::from_bytes(text))?
            .map_err(|error| Error::input(format!("expected a tokenizer, got {error}")))?;
        parsing.with_truncation(None).map_err(|error| Error::input(error.to_string()))?;
        parsing.with_padding(None);
        parsing.set_encode_special_tokens(false);
        for (&id, entry) in &config.added_tokens {
            let token: AddedToken = added_token(entry)
                .ok_or_else(|| Error::input(format!("tokenizer_config.json: added token {id}: expected a token")))?;
            if !parsing.get_added_vocabulary().get_vocab().contains_key(&token.content) {
                guarded(|| parsing.add_tokens(std::slice::from_ref(&token)))?;
                let got = parsing.token_to_id(&token.content);
                if got != Some(id) {
                    return Err(Error::input(format!(
                        "tokenizer_config.json: added token {:?}: expected id {id}, got {got:?}",
                        token.content
                    )));
                }
            }
        }
        let added = parsing.get_added_tokens_decoder();
        let mut literal = parsing.get_added_vocabulary().clone();
        literal.set_encode_special_tokens(true);
        let continuing = parsing.get_pre_tokenizer().map(continuing).transpose()?;
        let id_of = |name: &str| parsing.token_to_id(config.special_tokens.get(name)?);
        let (bos, eos) = (id_of("bos_token"), id_of("eos_token"));
        let mut end_ids: Vec<u32> = eos.into_iter().collect();
        let known = config.end_ids.iter().copied().filter(|&id| parsing.id_to_token(id).is_some());
        end_ids.extend(known);
        // gpt-oss ends a message, not the turn, by <|end|>
        let harmony = parsing.token_to_id("<|return|>").is_some();
        let names = END_OF_TURN.iter().filter(|&&name| !(harmony && name == "<|end|>"));
        end_ids.extend(names.filter_map(|name| parsing.token_to_id(name)).filter(|id| added.contains_key(id)));
        end_ids.sort_unstable();
        end_ids.dedup();
        let byte_level = ByteLevel::of(text, &parsing);
        let added = AddedTokens::new(added.into_iter().collect())?;
        let special_tokens = config.special_tokens;
        let hash = OnceLock::new();
        Ok(Self {
            inner: Arc::new(Inner {
                parsing,
                literal,
                continuing,
                added,
                byte_level,
                special_tokens,
                bos,
                eos,
                end_ids,
                hash,
            }),
        })
    }

    /// The ids of `text`; none is added in front or behind.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>> {
        match (specials, &self.inner.byte_level) {
            (Specials::Literal, _) => self.encode_between(text, true),
            (Specials::Parse, Some(byte_level)) => {
                self.encode_words(byte_level, self.inner.parsing.get_added_vocabulary(), text)
            }
            (Specials::Parse, None) => self.parsed_by_crate(text),
        }
    }

    /// Whether text is encoded without the crate.
    #[cfg(test)]
    pub(super) fn is_byte_level(&self) -> bool {
        self.inner.byte_level.is_some()
    }

    /// The reference of parsing special tokens.
    pub(super) fn parsed_by_crate(&self, text: &str) -> Result<Vec<u32>> {
        let encoded = guarded(|| self.inner.parsing.encode_fast(text, false))?;
        Ok(encoded.map_err(|error| cannot_encode(&*error))?.get_ids().to_vec())
    }

    /// The ids of a raw prompt, special tokens included: behind [`Self::opening`], unless the text begins with it itself.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, Specials::Parse)?;
        if let Some(opening) = self.opening().filter(|opening| ids.first() != Some(opening)) {
            ids.insert(0, opening);
        }
        Ok(ids)
    }

    /// The ids of a stretch of text in which special tokens are only text; `first` says that nothing is before it.
    pub(super) fn encode_between(&self, text: &str, first: bool) -> Result<Vec<u32>> {
        match &self.inner.byte_level {
            // it's the same wherever the text stands
            Some(byte_level) => self.encode_words(byte_level, &self.inner.literal, text),
            None => self.between_by_crate(text, first),
        }
    }

    /// The ids of `text` with the tokens that `added` finds in it.
    fn encode_words(&self, byte_level: &ByteLevel, added: &AddedVocabulary, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        if !self.inner.added.occur_in(text) {
            byte_level.encode(text, false, &mut ids);
            return Ok(ids);
        }
        let pieces = guarded(|| added.extract_and_normalize(self.inner.parsing.get_normalizer(), text))?;
        for (piece, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => byte_level.encode(piece, true, &mut ids),
            }
        }
        Ok(ids)
    }

    /// The reference of [`Self::encode_between`].
    pub(super) fn between_by_crate(&self, text: &str, first: bool) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let parsing = &self.inner.parsing;
        let ids = guarded(|| -> tokenizers::Result<Vec<u32>> {
            let mut pieces = self.inner.literal.extract_and_normalize(parsing.get_normalizer(), text);
            let pre_tokenizer = if first { parsing.get_pre_tokenizer() } else { self.inner.continuing.as_ref() };
            if let Some(pre_tokenizer) = pre_tokenizer {
                pre_tokenizer.pre_tokenize(&mut pieces)?;
            }
            let model = parsing.get_model();
            pieces.tokenize(|piece| model.tokenize(piece.get()))?;
            Ok(pieces.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
        })?;
        ids.map_err(|error| cannot_encode(&*error))
    }

    /// The text of `ids`. Ids beyond the vocabulary have none.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        guarded(|| self.inner.parsing.decode(ids, skip_special)).ok().and_then(Result::ok).unwrap_or_default()
    }

    /// The id of a token, written as in the vocabulary.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.parsing.token_to_id(token)
    }

    /// A token as it is written in the vocabulary.
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.inner.parsing.id_to_token(id)
    }

    /// Whether the id is a special token's: one that structures a text and isn't shown.
    pub fn is_special(&self, id: u32) -> bool {
        self.token_of(id).is_some_and(|token| self.inner.parsing.get_added_vocabulary().is_special_token(&token))
    }

    /// The id that begins a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.inner.bos
    }

    /// The id that stands before every raw text: [`Self::bos`], where the tokenizer adds it of its own accord.
    pub fn opening(&self) -> Option<u32> {
        let ids = guarded(|| self.inner.parsing.encode_fast("a", true)).ok().and_then(Result::ok)?;
        self.inner.bos.filter(|bos| ids.get_ids().first() == Some(bos) && ids.get_ids().len() > 1)
    }

    /// The id that ends a sequence.
    pub fn eos(&self) -> Option<u32> {
        self.inner.eos
    }

    /// The ids at which generation stops, ascending: the end of a sequence and those of a turn.
    pub fn end_ids(&self) -> Vec<u32> {
        self.inner.end_ids.clone()
    }

    /// Whether generation stops at `id`.
    pub(super) fn ends(&self, id: u32) -> bool {
        self.inner.end_ids.binary_search(&id).is_ok()
    }

    /// The number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.parsing.get_vocab_size(true)
    }

    /// blake3, in hex, of all that decides the ids.
    pub fn hash(&self) -> String {
        let hash = self.inner.hash.get_or_init(|| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(self.to_json().unwrap_or_default().as_bytes());
            for (name, token) in &self.inner.special_tokens {
                hasher.update(format!("\n{name}={token}").as_bytes());
            }
            hasher.update(format!("\n{:?}", self.inner.end_ids).as_bytes());
            hasher.finalize().to_hex().to_string()
        });
        hash.clone()
    }

    /// The tokenizer as the text of a `tokenizer.json`.
    pub fn to_json(&self) -> Result<String> {
        let text = guarded(|| self.inner.parsing.to_string(false))?;
        text.map_err(|error| Error::failure(format!("tokenizer: {error}")))
    }

    pub(super) fn added(&self) -> &AddedTokens {
        &self.inner.added
    }

    pub(super) fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.inner.special_tokens
    }

    /// The added tokens as `tokenizer_config.json` lists them.
    pub(super) fn added_tokens_decoder(&self) -> Value {
        let tokens: BTreeMap<u32, AddedToken> = self.inner.parsing.get_added_tokens_decoder().into_iter().collect();
        tokens
            .into_iter()
            .map(|(id, token)| {
                let entry = json!({
                    "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized,
                    "rstrip": token.rstrip, "single_word": token.single_word, "special": token.special,
                });
                (id.to_string(), entry)
            })
            .collect()
    }
}

fn added_token(entry: &Value) -> Option<AddedToken> {
    let flag = |name: &str| entry.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(false);
    Some(
        AddedToken::from(entry.get("content")?.as_str()?, special)
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .single_word(flag("single_word").unwrap_or(false))
            .normalized(flag("normalized").unwrap_or(!special)),
    )
}

/// The same pre-tokenizer for what isn't the beginning: one that puts a space before a sequence's first word (Metaspace
/// with the scheme `first`) puts none.
fn continuing(pre_tokenizer: &PreTokenizerWrapper) -> Result<PreTokenizerWrapper> {
    fn rewrite(value: &mut Value) {
        match value {
            Value::Object(map) => {
                for (name, value) in map {
                    if name == "prepend_scheme" && value == "first" {
                        *value = json!("never");
                    } else {
                        rewrite(value);
                    }
                }
            }
            Value::Array(items) => items.iter_mut().for_each(rewrite),
            _ => {}
        }
    }
    let rewritten = serde_json::to_value(pre_tokenizer).and_then(|mut value| {
        rewrite(&mut value);
        serde_json::from_value(value)
    });
    rewritten.map_err(|error| Error::input(format!("tokenizer: pre-tokenizer: {error}")))
}

fn cannot_encode(error: &(dyn std::error::Error + Send + Sync)) -> Error {
    Error::input(format!("tokenizer: the text cannot be encoded: {error}"))
}

/// The `tokenizers` crate asserts what a hostile file may break; a panic in it is an error of the file.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let message = panic.downcast_ref::<String>().cloned();
        let message = message.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
        Error::input(format!("tokenizer: inconsistent: {}", message.unwrap_or_default()))
    })
}
