//! How byte-pair tokenizers cut text before merging, by the names that GGUF files have for it.
//!
//! A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) and leaves the regular expressions to the reader. These are
//! the expressions of the models' own `tokenizer.json`; each cuts what the one before has left.

use serde_json::{Value, json};

use crate::error::{Error, Result};

/// GPT-2's words, as most older families have them.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
];
const DEEPSEEK_CODER: [&str; 5] = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"];
const FALCON: [&str; 3] = [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"];
/// What files get that name no pre-tokenizer, or the name `default`.
const DEFAULT: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];
/// Single digits, then GPT-2's words.
const DIGITS: [&str; 2] = [r"\p{N}", GPT2];

/// A way to cut, and what goes with it.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    /// The regular expressions, each isolating its matches.
    expressions: &'static [&'static str],
    /// Whether words that are tokens are taken whole, before merging.
    pub ignore_merges: bool,
    /// Whether text is brought to Unicode's composed form first.
    pub composed: bool,
}

impl PreTokenizer {
    /// The one that `name` (`tokenizer.ggml.pre`) stands for. Raises for a name that isn't known: ids would be wrong.
    pub fn named(name: &str) -> Result<Self> {
        let plain = |expressions| Self { expressions, ignore_merges: false, composed: false };
        let whole = |expressions| Self { ignore_merges: true, ..plain(expressions) };
        let composed = |expressions| Self { composed: true, ..plain(expressions) };
        Ok(match name {
            "default" => plain(&DEFAULT),
            "gpt-2" | "gpt2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "exaone4" | "gigachat" | "mellum"
            | "modern-bert" | "roberta-bpe" | "granite-docling" => plain(&[GPT2]),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => plain(&DIGITS),
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "lfm2" | "midm-2.0" => {
                whole(&[LLAMA3])
            }
            "dbrx" | "smaug-bpe" | "chatglm-bpe" | "glm4" => plain(&[LLAMA3]),
            "qwen2" | "deepseek-r1-qwen" | "megrez" => composed(&[QWEN2]),
            "stablelm2" | "hunyuan" | "solar-open" | "grok-2" => plain(&[QWEN2]),
            "qwen35" => composed(&[QWEN35]),
            "tekken" => whole(&[TEKKEN]),
            "gpt-4o" | "llama4" | "minimax-m2" => plain(&[GPT4O]),
            "deepseek-v3" | "hunyuan-dense" => plain(&DEEPSEEK3),
            "deepseek-coder" => plain(&DEEPSEEK_CODER),
            "falcon" => plain(&FALCON),
            other => {
                return Err(Error::input(format!(
                    "metadata \"tokenizer.ggml.pre\": expected a known pre-tokenizer such as llama-bpe, qwen2, smollm, \
                     tekken or gpt-2, got {other:?}"
                ))
                .hint("use the model's directory with its tokenizer.json"));
            }
        })
    }

    /// As `tokenizer.json` writes it.
    pub fn to_json(&self) -> Value {
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let split = |expression: &&str| json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
        let (last, before) = match self.expressions {
            // built in, and faster
            [before @ .., last] if *last == GPT2 => (byte_level(true), before),
            all => (byte_level(false), all),
        };
        let mut steps: Vec<Value> = before.iter().map(split).collect();
        steps.push(last);
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}
