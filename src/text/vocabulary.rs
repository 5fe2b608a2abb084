//! A tokenizer rebuilt from GGUF metadata.
//!
//! `tokenizer.ggml.model` names the kind: `gpt2` is byte-level BPE with merges, `llama` SentencePiece's BPE with scores
//! and byte fallback, `t5` SentencePiece's unigram model. Each becomes the `tokenizer.json` that its model would have.

use serde_json::{Map, Value, json};

use super::directory::{Config, SPECIAL_TOKEN_KEYS};
use super::pretokenizers::PreTokenizer;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::gguf;

/// The marks of `tokenizer.ggml.token_type` that make a token special, and those that make it an added one.
mod kinds {
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
}

/// More ids that end a turn, beside the end of sequence.
const END_KEYS: [&str; 2] = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

impl Tokenizer {
    /// The tokenizer in a GGUF file's metadata. Raises for a kind or a pre-tokenizer that isn't known.
    pub fn from_gguf(file: &gguf::File) -> Result<Self> {
        let located =
            |error: Error| Error { message: format!("{}: {}", file.path().display(), error.message), ..error };
        from_metadata(file.metadata()).map_err(located)
    }
}

fn from_metadata(metadata: &gguf::Metadata) -> Result<Tokenizer> {
    let vocabulary = Vocabulary::read(metadata)?;
    let mut document = match metadata.str("tokenizer.ggml.model")? {
        Some("gpt2") => byte_level(metadata, &vocabulary)?,
        Some("llama") => sentencepiece(metadata, &vocabulary)?,
        Some("t5") => unigram(metadata, &vocabulary)?,
        other => {
            let got = other.unwrap_or("none");
            return Err(Error::input(format!(
                "metadata \"tokenizer.ggml.model\": expected gpt2, llama or t5, got {got}"
            )));
        }
    };
    document.insert("version".to_owned(), json!("1.0"));
    document.insert("added_tokens".to_owned(), vocabulary.added_tokens());
    document.insert("post_processor".to_owned(), vocabulary.post_processor(metadata)?);
    let mut config = Config::default();
    for (name, key) in SPECIAL_TOKEN_KEYS {
        if let Some(id) = metadata.u32(key)? {
            config.special_tokens.insert(name.to_owned(), vocabulary.token(key, id)?.to_owned());
        }
    }
    for key in END_KEYS {
        config.end_ids.extend(metadata.u32(key)?);
    }
    Tokenizer::from_json(&Value::Object(document).to_string(), config)
}

/// The tokens with their kinds and scores.
struct Vocabulary<'a> {
    tokens: &'a [String],
    kinds: Vec<i32>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a gguf::Metadata) -> Result<Self> {
        let Some(tokens) = metadata.strings("tokenizer.ggml.tokens")? else {
            return Err(Error::input("metadata: expected tokenizer.ggml.tokens, got none")
                .hint("the file holds no tokenizer; use the model's directory"));
        };
        if u32::try_from(tokens.len()).is_err() || tokens.is_empty() {
            return Err(Error::input(format!("metadata: expected some tokens, got {}", tokens.len())));
        }
        let kinds = metadata.i32s("tokenizer.ggml.token_type")?;
        let kinds = kinds.map_or_else(|| vec![1; tokens.len()], |kinds| kinds.into_owned());
        same_length("tokenizer.ggml.token_type", kinds.len(), tokens.len())?;
        Ok(Self { tokens, kinds })
    }

    fn token(&self, key: &str, id: u32) -> Result<&'a str> {
        let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
        token.map(String::as_str).ok_or_else(|| {
            Error::input(format!("metadata {key:?}: expected an id below {}, got {id}", self.tokens.len()))
        })
    }

    /// Token → id; of tokens that come twice the first is meant.
    fn ids(&self) -> Map<String, Value> {
        let mut ids = Map::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            ids.entry(token.as_str()).or_insert_with(|| json!(id));
        }
        ids
    }

    fn added_tokens(&self) -> Value {
        let added = self.tokens.iter().zip(&self.kinds).enumerate().filter_map(|(id, (token, &kind))| {
            let special = match kind {
                kinds::CONTROL | kinds::UNKNOWN => true,
                kinds::USER_DEFINED => false,
                _ => return None,
            };
            let added = json!({
                "id": id, "content": token, "special": special, "normalized": false,
                "lstrip": false, "rstrip": false, "single_word": false,
            });
            (!token.is_empty()).then_some(added)
        });
        added.collect()
    }

    /// What is put around a text that asks for it: the beginning and the end of a sequence.
    fn post_processor(&self, metadata: &gguf::Metadata) -> Result<Value> {
        // SentencePiece's models have a beginning unless they say otherwise
        let sentencepiece = metadata.str("tokenizer.ggml.model")? == Some("llama");
        let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        let mut tokens = Map::new();
        for (flag, key, begins) in [
            ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id", true),
            ("tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id", false),
        ] {
            let wanted = metadata.bool(flag)?.unwrap_or(sentencepiece && begins);
            let Some(id) = metadata.u32(key)?.filter(|_| wanted) else { continue };
            let token = self.token(key, id)?;
            let piece = json!({"SpecialToken": {"id": token, "type_id": 0}});
            single.insert(if begins { 0 } else { single.len() }, piece);
            tokens.insert(token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
        }
        if tokens.is_empty() {
            return Ok(Value::Null);
        }
        let pair = [single.clone(), vec![json!({"Sequence": {"id": "B", "type_id": 1}})]].concat();
        Ok(json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}))
    }
}

fn same_length(key: &str, got: usize, tokens: usize) -> Result<()> {
    if got == tokens {
        return Ok(());
    }
    Err(Error::input(format!("metadata {key:?}: expected an entry for each of {tokens} tokens, got {got}")))
}

/// Byte-level BPE.
fn byte_level(metadata: &gguf::Metadata, vocabulary: &Vocabulary<'_>) -> Result<Map<String, Value>> {
    let pre = PreTokenizer::named(metadata.str("tokenizer.ggml.pre")?.unwrap_or("default"))?;
    let Some(merges) = metadata.strings("tokenizer.ggml.merges")? else {
        return Err(Error::input("metadata: expected tokenizer.ggml.merges, got none"));
    };
    let pairs: Result<Vec<Value>> = merges
        .iter()
        .enumerate()
        .map(|(number, merge)| {
            // a token may begin with a space only where it isn't byte-level; the pair's space is then the second
            let at = merge.char_indices().skip(1).find(|&(_, character)| character == ' ').map(|(at, _)| at);
            let (left, right) = at.map(|at| merge.split_at(at)).ok_or_else(|| {
                Error::input(format!("tokenizer.ggml.merges: entry {number}: expected two tokens, got {merge:?}"))
            })?;
            Ok(json!([left, &right[1..]]))
        })
        .collect();
    Ok(document(json!({
        "normalizer": if pre.composed { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": pre.to_json(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "vocab": vocabulary.ids(), "merges": pairs?, "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre.ignore_merges,
        },
    })))
}

/// SentencePiece's BPE: which pair merges first is told by the score of what it becomes.
fn sentencepiece(metadata: &gguf::Metadata, vocabulary: &Vocabulary<'_>) -> Result<Map<String, Value>> {
    let scores = scores(metadata, vocabulary)?;
    let ids = vocabulary.ids();
    let id = |token: &str| ids.get(token).and_then(Value::as_u64);
    let mut merges: Vec<(f32, [u64; 2], [&str; 2])> = Vec::new();
    for (token, &score) in vocabulary.tokens.iter().zip(scores) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left_id), Some(right_id)) = (id(left), id(right)) {
                merges.push((score, [left_id, right_id], [left, right]));
            }
        }
    }
    // highest score first; of the ways to make one token, the order of the ids decides
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let merges: Vec<Value> = merges.iter().map(|(_, _, pair)| json!(pair)).collect();
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = metadata.u32("tokenizer.ggml.unknown_token_id")?;
    let unknown = unknown.map(|id| vocabulary.token("tokenizer.ggml.unknown_token_id", id)).transpose()?;
    Ok(document(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "vocab": ids, "merges": merges, "dropout": null, "unk_token": unknown,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false,
        },
    })))
}

/// SentencePiece's unigram model.
fn unigram(metadata: &gguf::Metadata, vocabulary: &Vocabulary<'_>) -> Result<Map<String, Value>> {
    let scores = scores(metadata, vocabulary)?;
    let pieces: Vec<Value> = vocabulary.tokens.iter().zip(scores).map(|(token, score)| json!([token, score])).collect();
    let unknown = metadata.u32("tokenizer.ggml.unknown_token_id")?;
    if let Some(id) = unknown {
        vocabulary.token("tokenizer.ggml.unknown_token_id", id)?;
    }
    let mut normalizers = Vec::new();
    if let Some(gguf::Value::Array(gguf::Array::U8(map))) = metadata.get("tokenizer.ggml.precompiled_charsmap") {
        normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": base64(map)}));
    }
    if metadata.bool("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(true) {
        normalizers.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
        normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    let prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let metaspace = json!({
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": if prefix { "always" } else { "never" }, "split": true,
    });
    Ok(document(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": metaspace, "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": false},
    })))
}

fn scores<'a>(metadata: &'a gguf::Metadata, vocabulary: &Vocabulary<'_>) -> Result<&'a [f32]> {
    let Some(scores) = metadata.f32s("tokenizer.ggml.scores")? else {
        return Err(Error::input("metadata: expected tokenizer.ggml.scores, got none"));
    };
    same_length("tokenizer.ggml.scores", scores.len(), vocabulary.tokens.len())?;
    match scores.iter().position(|score| !score.is_finite()) {
        Some(id) => Err(Error::input(format!(
            "metadata \"tokenizer.ggml.scores\": expected finite numbers, got {} for token {id}",
            scores[id]
        ))),
        None => Ok(scores),
    }
}

fn document(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// As `tokenizer.json` keeps bytes.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            match digit <= chunk.len() {
                true => out.push(char::from(DIGITS[(bits >> (18 - 6 * digit) & 63) as usize])),
                false => out.push('='),
            }
        }
    }
    out
}
