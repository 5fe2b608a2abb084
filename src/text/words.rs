//! Cutting text into words without an engine for regular expressions.
//!
//! Nearly all byte-level tokenizers cut by one of a few expressions, in each of which a character counts only as a
//! letter, a number, white space, or something else. Those expressions are known here by their text, and done by hand;
//! [`Words::of`] is `None` for any other. Which characters are letters is asked of the engine itself, 256 of them at a
//! time and when the first of them is met, so that both always mean the same.

use std::sync::{LazyLock, OnceLock};

use serde_json::Value;
use tokenizers::utils::SysRegex;

use super::pretokenizers::{GPT2, LLAMA3, QWEN2};

/// A way to cut: single digits first where it says so, and then words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Words {
    digits: Digits,
    expression: Expression,
}

/// Which characters stand alone, before anything else is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Digits {
    None,
    /// `\p{N}` of the engine.
    Numbers,
    /// `char::is_numeric`, by a newer Unicode than the engine's.
    Numeric,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expression {
    Gpt2,
    /// GPT-4's family, with the most numbers in one word.
    Cl100k(usize),
}

impl Words {
    /// What a pre-tokenizer of `tokenizer.json` does that ends in byte-level letters; `None` where it isn't known.
    pub fn of(pre_tokenizer: &Value) -> Option<Self> {
        let steps = match pre_tokenizer["type"].as_str()? {
            "Sequence" => pre_tokenizer["pretokenizers"].as_array()?.as_slice(),
            _ => std::slice::from_ref(pre_tokenizer),
        };
        let (bytes, before) = steps.split_last()?;
        if bytes["type"] != "ByteLevel" || bytes["add_prefix_space"] != false {
            return None;
        }
        let digits = |steps: &[Value]| match steps {
            [] => Some(Digits::None),
            [step] if step["type"] == "Digits" && step["individual_digits"] == true => Some(Digits::Numeric),
            [step] if isolates(step) == Some(r"\p{N}") => Some(Digits::Numbers),
            _ => None,
        };
        match (bytes["use_regex"].as_bool()?, before) {
            (true, before) => Some(Self { digits: digits(before)?, expression: Expression::Gpt2 }),
            (false, [before @ .., last]) => {
                let expression = match isolates(last)? {
                    GPT2 => Expression::Gpt2,
                    LLAMA3 => Expression::Cl100k(3),
                    QWEN2 => Expression::Cl100k(1),
                    _ => return None,
                };
                Some(Self { digits: digits(before)?, expression })
            }
            (false, []) => None,
        }
    }

    /// Hands over the words of `text`, in order; together they are all of it.
    pub fn cut<'a>(self, text: &'a str, mut word: impl FnMut(&'a str)) {
        let mut rest = text;
        while !rest.is_empty() {
            let end = self.first_digit(rest).unwrap_or(rest.len());
            let (piece, after) = rest.split_at(end);
            let mut at = 0;
            while at < piece.len() {
                let end = match self.expression {
                    Expression::Gpt2 => gpt2(piece, at),
                    Expression::Cl100k(numbers) => cl100k(piece, at, numbers),
                };
                word(&piece[at..end]);
                at = end;
            }
            let digit = after.chars().next().map_or(0, char::len_utf8);
            if digit > 0 {
                word(&after[..digit]);
            }
            rest = &after[digit..];
        }
    }

    /// Where the first character stands that is a word by itself.
    fn first_digit(self, text: &str) -> Option<usize> {
        let alone = |character: char| match self.digits {
            Digits::None => false,
            Digits::Numbers => class(character) == Class::Number,
            Digits::Numeric => character.is_numeric(),
        };
        if self.digits == Digits::None { None } else { text.find(alone) }
    }
}

/// The expression whose matches a step isolates.
fn isolates(step: &Value) -> Option<&str> {
    let isolates = step["type"] == "Split" && step["behavior"] == "Isolated" && step["invert"] == false;
    step["pattern"]["Regex"].as_str().filter(|_| isolates)
}

/// What the expressions tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Other,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s`
    Space,
}

const ASCII: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        classes[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Number,
            b' ' | b'\t'..=b'\r' => Class::Space,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
};

type Page = [Class; 256];

/// Classes of all characters, 256 of them a page.
static PAGES: [OnceLock<Box<Page>>; 0x1100] = [const { OnceLock::new() }; 0x1100];

fn class(character: char) -> Class {
    let code = character as usize;
    if code < 128 { ASCII[code] } else { PAGES[code >> 8].get_or_init(|| page(code >> 8))[code & 0xff] }
}

/// The classes of the 256 characters from `number` · 256 on, by the engine.
fn page(number: usize) -> Box<Page> {
    static EXPRESSIONS: LazyLock<[(Class, SysRegex); 3]> = LazyLock::new(|| {
        [(Class::Letter, r"\p{L}"), (Class::Number, r"\p{N}"), (Class::Space, r"\s")]
            // constants, which every test compiles
            .map(|(class, expression)| (class, SysRegex::new(expression).expect("an expression")))
    });
    let mut classes = Box::new([Class::Other; 256]);
    for (code, class) in (number as u32 * 256..).zip(classes.iter_mut()) {
        let Some(character) = char::from_u32(code) else { continue }; // half of a pair, which no text has
        let text = character.encode_utf8(&mut [0; 4]).to_owned();
        let found = EXPRESSIONS.iter().find(|(_, expression)| expression.find_iter(&text).next().is_some());
        *class = found.map_or(Class::Other, |&(class, _)| class);
    }
    classes
}

/// The class of the character at `at`, and where the next one begins; `None` at the end.
fn look(text: &str, at: usize) -> Option<(Class, usize)> {
    match *text.as_bytes().get(at)? {
        byte if byte < 128 => Some((ASCII[usize::from(byte)], at + 1)),
        _ => text[at..].chars().next().map(|character| (class(character), at + character.len_utf8())),
    }
}

/// Where the run of `wanted` that begins at `at` ends.
fn run(text: &str, mut at: usize, wanted: Class) -> usize {
    while let Some((class, next)) = look(text, at) {
        if class != wanted {
            break;
        }
        at = next;
    }
    at
}

/// The length of what follows an apostrophe in a contraction: `s`, `t`, `re`, `ve`, `m`, `ll` or `d`.
fn contraction(after: &[u8], any_case: bool) -> Option<usize> {
    let lower = |byte: u8| if any_case { byte.to_ascii_lowercase() } else { byte };
    match (lower(*after.first()?), after.get(1).map(|&byte| lower(byte))) {
        (b's' | b't' | b'm' | b'd', _) => Some(1),
        (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) => Some(2),
        // ſ, the long s, is an s where case doesn't count
        (0xc5, Some(0xbf)) if any_case => Some(2),
        _ => None,
    }
}

/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`: where the word at `at` ends.
fn gpt2(text: &str, at: usize) -> usize {
    let bytes = text.as_bytes();
    if bytes[at] == b'\''
        && let Some(length) = contraction(&bytes[at + 1..], false)
    {
        return at + 1 + length;
    }
    match look(text, at) {
        Some((Class::Space, next)) => match look(text, next) {
            Some((class, _)) if class != Class::Space && bytes[at] == b' ' => run(text, next, class),
            _ => spaces(text, at, run(text, next, Class::Space)),
        },
        Some((class, next)) => run(text, next, class),
        None => text.len(),
    }
}

/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`, with
/// `numbers` in place of 3: where the word at `at` ends.
fn cl100k(text: &str, at: usize, numbers: usize) -> usize {
    let bytes = text.as_bytes();
    if bytes[at] == b'\''
        && let Some(length) = contraction(&bytes[at + 1..], true)
    {
        return at + 1 + length;
    }
    let Some((class, next)) = look(text, at) else { return text.len() };
    let following = look(text, next).map(|(class, _)| class);
    let breaks = |byte: &u8| matches!(byte, b'\r' | b'\n');
    let with_breaks = |end: usize| end + bytes[end..].iter().take_while(|&byte| breaks(byte)).count();
    match (class, following) {
        (Class::Letter, _) => run(text, next, Class::Letter),
        (Class::Number, _) => {
            let mut end = next;
            for _ in 1..numbers {
                match look(text, end) {
                    Some((Class::Number, next)) => end = next,
                    _ => break,
                }
            }
            end
        }
        (_, Some(Class::Letter)) if !breaks(&bytes[at]) => run(text, next, Class::Letter),
        (Class::Other, _) => with_breaks(run(text, next, Class::Other)),
        (Class::Space, Some(Class::Other)) if bytes[at] == b' ' => with_breaks(run(text, next, Class::Other)),
        (Class::Space, _) => {
            let end = run(text, next, Class::Space);
            match bytes[at..end].iter().rposition(breaks) {
                Some(last) => at + last + 1,
                None => spaces(text, at, end),
            }
        }
    }
}

/// `\s+(?!\S)|\s+` over the white space from `at` to `end`: its last character goes with what follows, unless it's alone.
fn spaces(text: &str, at: usize, end: usize) -> usize {
    let last = text[at..end].chars().next_back().map_or(0, char::len_utf8);
    if end == text.len() || end - last == at { end } else { end - last }
}
