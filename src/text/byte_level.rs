//! Byte-level tokenizers without detours: text is cut into words ([`Words`]), each is looked up among those that came
//! before, and what is new is merged ([`Merges`]).
//!
//! Most of today's tokenizers are such: GPT-2's, Llama 3's, Qwen's, SmolLM2's. The ids are those of the `tokenizers` crate,
//! which is the reference, and what does all others.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;
use tokenizers::{ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper};

use super::merges::{Merges, NONE, Scratch};
use super::words::Words;

/// Words that are kept by each of the threads that encode at a time; an entry has 32 bytes.
const KEPT: usize = 1 << 15;
/// Memories of words that are kept while nobody encodes.
const MEMORIES: usize = 16;
/// The longest word that is kept, in bytes, and the most tokens that it may have.
const LONGEST: usize = 15;
const MOST: usize = 4;

/// A byte-level tokenizer's way from text without added tokens to ids.
pub(super) struct ByteLevel {
    words: Words,
    /// Text is composed (NFC) first.
    composes: bool,
    /// Words that are tokens whatever merges say.
    whole: HashMap<Vec<u8>, u32>,
    merges: Merges,
    memories: Mutex<Vec<Memory>>,
}

/// The part of `tokenizer.json` that is read here.
#[derive(Deserialize)]
struct Document {
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

impl ByteLevel {
    /// `text` is what `parsed` was read from. `None` for a tokenizer that works otherwise, or might.
    pub fn of(text: &str, parsed: &tokenizers::Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = parsed.get_model() else { return None };
        let affix = |affix: &Option<String>| affix.as_deref().unwrap_or_default().is_empty();
        if model.dropout.is_some_and(|share| share > 0.0)
            || !affix(&model.continuing_subword_prefix)
            || !affix(&model.end_of_word_suffix)
        {
            return None;
        }
        let composes = match parsed.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            Some(_) => return None,
        };
        // the crate composes an added token that is searched for in composed text; here it's searched for as it is
        let composed = |token: &tokenizers::AddedToken| !token.normalized || token.content.is_ascii();
        if composes && !parsed.get_added_tokens_decoder().values().all(composed) {
            return None;
        }
        let words = Words::of(&serde_json::to_value(parsed.get_pre_tokenizer()?).ok()?)?;
        let Document { model: Model { vocab, merges } } = serde_json::from_str(text).ok()?;
        let ids: HashSet<u32> = vocab.values().copied().collect();
        if ids.len() != vocab.len() || ids.iter().any(|&id| id > NONE / 2) {
            return None;
        }
        let letters = letters();
        let token = |letter: &char| vocab.get(letter.encode_utf8(&mut [0; 4]) as &str).copied();
        let bytes = letters.each_ref().map(|letter| token(letter).unwrap_or(NONE));
        // a byte without a token is left out, unless the model has another one for what it doesn't know
        if bytes.contains(&NONE) && (model.unk_token.is_some() || model.byte_fallback) {
            return None;
        }
        let merges: Option<Vec<_>> = merges.iter().map(|merge| merge.ids(&vocab)).collect();
        let mut whole = HashMap::new();
        if model.ignore_merges {
            let bytes: HashMap<char, u8> = letters.into_iter().zip(0..=255).collect();
            for (token, &id) in &vocab {
                let token: Option<Vec<u8>> = token.chars().map(|letter| bytes.get(&letter).copied()).collect();
                whole.extend(token.map(|token| (token, id)));
            }
        }
        let merges = Merges::new(bytes, &merges?);
        Some(Self { words, composes, whole, merges, memories: Mutex::new(Vec::new()) })
    }

    /// Appends the ids of `text`, in which no added token is looked for; `composed` says that it's normalized already.
    pub fn encode(&self, text: &str, composed: bool, ids: &mut Vec<u32>) {
        // below U+0300 every character is composed, and combines with none before it
        if self.composes && !composed && text.bytes().any(|byte| byte >= 0xcc) {
            let mut text = NormalizedString::from(text);
            if tokenizers::normalizers::NFC.normalize(&mut text).is_ok() {
                return self.encode(text.get(), true, ids);
            }
        }
        let memories = || self.memories.lock().unwrap_or_else(PoisonError::into_inner);
        let mut memory = memories().pop().unwrap_or_default();
        let Memory { entries, scratch } = &mut memory;
        self.words.cut(text, |word| {
            let bytes = word.as_bytes();
            if bytes.len() > LONGEST {
                return ids.extend_from_slice(self.tokens(bytes, scratch));
            }
            let key = key(bytes);
            let entry = &mut entries[place(key)];
            if entry.key != key {
                let tokens = self.tokens(bytes, scratch);
                if tokens.len() > MOST {
                    return ids.extend_from_slice(tokens);
                }
                *entry = Entry { key, tokens: [NONE; MOST] };
                entry.tokens[..tokens.len()].copy_from_slice(tokens);
            }
            ids.extend(entry.tokens.iter().take_while(|&&token| token != NONE));
        });
        let mut memories = memories();
        if memories.len() < MEMORIES {
            memories.push(memory);
        }
    }

    fn tokens<'a>(&self, word: &[u8], scratch: &'a mut Scratch) -> &'a [u32] {
        match self.whole.get(word) {
            Some(&id) => scratch.alone(id),
            None => self.merges.tokens(word, scratch),
        }
    }
}

impl Merge {
    /// Left, right and what they become.
    fn ids(&self, vocabulary: &HashMap<String, u32>) -> Option<(u32, u32, u32)> {
        let (left, right) = match self {
            Self::Pair(left, right) => (left.as_str(), right.as_str()),
            Self::Line(line) => line.split_once(' ').filter(|(_, right)| !right.contains(' '))?,
        };
        let id = |token: &str| vocabulary.get(token).copied();
        Some((id(left)?, id(right)?, id(&format!("{left}{right}"))?))
    }
}

/// GPT-2's letters for bytes: the printable ones are themselves, the rest follow from U+0100.
fn letters() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| match byte {
        33..=126 | 161..=172 | 174..=255 => byte as u8 as char,
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap_or_default() // 68 letters, all of them there
        }
    })
}

/// Words that were met, and their tokens; a new one takes the place of another.
struct Memory {
    entries: Box<[Entry]>,
    scratch: Scratch,
}

#[derive(Clone, Copy)]
struct Entry {
    /// The word's bytes and, in the highest, their number; no word has none.
    key: u128,
    tokens: [u32; MOST],
}

impl Default for Memory {
    fn default() -> Self {
        let empty = Entry { key: 0, tokens: [NONE; MOST] };
        Self { entries: vec![empty; KEPT].into(), scratch: Scratch::default() }
    }
}

/// A word of at most [`LONGEST`] bytes as a number.
fn key(word: &[u8]) -> u128 {
    let mut bytes = [0; 16];
    bytes[..word.len()].copy_from_slice(word);
    u128::from_le_bytes(bytes) | (word.len() as u128) << 120
}

/// The entry that a word may be in.
fn place(key: u128) -> usize {
    // two odd numbers without a pattern; the upper bits of a product depend on all of its factors' bits
    let mixed =
        (key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((key >> 64) as u64).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    ((mixed ^ mixed >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 49) as usize % KEPT
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::super::directory::Config;
    use super::super::pretokenizers::PreTokenizer;
    use super::super::{Specials, Tokenizer, tests::bytes};

    /// GGUF's names for all that is done by hand: GPT-2's words, with single digits, Llama 3's and Qwen's.
    const NAMES: [&str; 4] = ["gpt-2", "smollm", "llama3", "qwen2"];
    const LETTERS: [&str; 12] = ["a", "b", "e", " ", "\n", "'", "s", "1", ".", "é", "中", "\r"];

    /// Merges that join tokens at random, from letters that tests' texts are full of.
    fn document(name: &str, whole: bool, gaps: bool, pairs: &[(usize, usize)]) -> Value {
        let mut document = bytes();
        let letters = super::letters();
        let mut tokens: Vec<String> = LETTERS
            .iter()
            .flat_map(|letter| letter.bytes())
            .map(|byte| letters[usize::from(byte)].to_string())
            .collect();
        if gaps {
            // as in SmolLM2's vocabulary, which lacks bytes that its makers never met
            let vocabulary = document["model"]["vocab"].as_object_mut().expect("a vocabulary");
            vocabulary.retain(|letter, _| !["_", "Ģ", "ð", "Ì", "Ç"].contains(&letter.as_str()));
        }
        let mut merges = Vec::new();
        for &(left, right) in pairs {
            let (left, right) = (tokens[left % tokens.len()].clone(), tokens[right % tokens.len()].clone());
            let both = format!("{left}{right}");
            let vocabulary = document["model"]["vocab"].as_object_mut().expect("a vocabulary");
            let next = vocabulary.values().filter_map(Value::as_u64).max().unwrap_or(0) + 1;
            vocabulary.entry(both.clone()).or_insert(json!(next));
            merges.push(json!([left, right]));
            tokens.push(both);
        }
        let pre = PreTokenizer::named(name).expect("a name");
        document["model"]["merges"] = Value::Array(merges);
        document["model"]["ignore_merges"] = json!(whole);
        document["pre_tokenizer"] = pre.to_json();
        document["normalizer"] = if pre.composed { json!({"type": "NFC"}) } else { Value::Null };
        let added = |id: usize, content: &str, special: bool, strips: bool| {
            json!({"id": id, "content": content, "special": special, "normalized": false, "lstrip": strips,
                   "rstrip": strips, "single_word": false})
        };
        let next = 1000;
        document["added_tokens"] = json!([
            added(next, "<|end|>", true, false),
            added(next + 1, "<think>", false, false),
            added(next + 2, "<|strip|>", true, true),
        ]);
        document
    }

    fn loaded(document: &Value) -> Tokenizer {
        let tokenizer = Tokenizer::from_json(&document.to_string(), Config::default()).expect("a tokenizer");
        assert!(tokenizer.is_byte_level());
        tokenizer
    }

    fn agree(tokenizer: &Tokenizer, text: &str) {
        let crates = tokenizer.parsed_by_crate(text).expect("ids");
        assert_eq!(tokenizer.encode(text, Specials::Parse).expect("ids"), crates, "{text:?}");
        let crates = tokenizer.between_by_crate(text, true).expect("ids");
        assert_eq!(tokenizer.encode(text, Specials::Literal).expect("ids"), crates, "{text:?}");
    }

    fn text() -> impl Strategy<Value = String> {
        const PIECES: &str = "'s|'S|'ſ|'ll|'Re|'d| '|23|4567|٣|½|Ⅷ|e\u{301}|\u{301}|🙂|\u{a0}|\u{3000}|\u{85}|\u{200b}|\t|  |\r\n|_|ß|İ|가|각";
        let added = ["<|end|>", "<think>", "<|strip|>", "<|en"];
        let pieces = prop::sample::select(PIECES.split('|').chain(added).collect::<Vec<_>>());
        let piece = prop_oneof![
            8 => prop::sample::select(LETTERS.to_vec()).prop_map(str::to_owned),
            3 => pieces.prop_map(str::to_owned),
            1 => any::<char>().prop_map(String::from),
            1 => (prop::sample::select(LETTERS.to_vec()), 1_usize..200).prop_map(|(letter, times)| letter.repeat(times)),
            1 => prop::collection::vec(prop::sample::select(vec!["a", "b", "e", "é"]), 30..150).prop_map(|all| all.concat()),
        ];
        prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn ids_are_those_of_the_crate(
            name in prop::sample::select(NAMES.to_vec()),
            whole: bool,
            gaps: bool,
            pairs in prop::collection::vec((0_usize..997, 0_usize..997), 0..120),
            texts in prop::collection::vec(text(), 1..8),
        ) {
            let tokenizer = loaded(&document(name, whole, gaps, &pairs));
            for text in &texts {
                agree(&tokenizer, text);
            }
        }
    }

    #[test]
    fn every_character_is_cut_as_the_engine_does() {
        let planes = (0..0x1_0000).chain((0x1_0000..0x11_0000).step_by(37));
        let characters: Vec<char> = planes.filter_map(char::from_u32).collect();
        for name in NAMES {
            let tokenizer = loaded(&document(name, false, false, &[]));
            for some in characters.chunks(256) {
                let text: String = some.iter().map(|c| format!("x{c}y 1{c} {c}{c}  '{c}'s{c}\n")).collect();
                agree(&tokenizer, &text);
            }
        }
    }

    #[test]
    fn what_works_otherwise_is_left_to_the_crate() {
        let valid = document("smollm", false, false, &[(0, 1)]);
        let changes: [(&str, Value); 8] = [
            ("/model/dropout", json!(0.5)),
            ("/model/end_of_word_suffix", json!("</w>")),
            ("/model/continuing_subword_prefix", json!("a")),
            ("/normalizer", json!({"type": "Lowercase"})),
            ("/pre_tokenizer/pretokenizers/1/add_prefix_space", json!(true)),
            ("/pre_tokenizer/pretokenizers/1/use_regex", json!(false)),
            ("/pre_tokenizer/pretokenizers/0/behavior", json!("Removed")),
            ("/pre_tokenizer/pretokenizers/0/pattern", json!({"Regex": "a+"})),
        ];
        for (place, value) in changes {
            let mut document = valid.clone();
            *document.pointer_mut(place).expect(place) = value;
            if let Ok(tokenizer) = Tokenizer::from_json(&document.to_string(), Config::default()) {
                assert!(!tokenizer.is_byte_level(), "{place}");
            }
        }
        assert!(loaded(&valid).is_byte_level());
    }
}
