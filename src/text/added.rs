//! Where the tokenizer's added tokens stand in a text, by the same rules as in the `tokenizers` crate.

use std::collections::HashSet;
use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::AddedToken;

use crate::error::{Error, Result};

/// Finds added tokens; the longest of the leftmost ones wins.
pub(super) struct AddedTokens {
    automaton: AhoCorasick,
    tokens: Vec<(u32, AddedToken)>,
    /// All beginnings of special tokens that aren't the whole token.
    beginnings: HashSet<String>,
    longest_beginning: usize,
}

/// A special token's place in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub id: u32,
    /// The token's own text.
    pub core: Range<usize>,
    /// With the white space that the token takes in on its left and right.
    pub whole: Range<usize>,
}

impl AddedTokens {
    pub fn new(mut tokens: Vec<(u32, AddedToken)>) -> Result<Self> {
        tokens.retain(|(_, token)| !token.content.is_empty());
        tokens.sort_by_key(|&(id, _)| id);
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(_, token)| token.content.as_str()))
            .map_err(|error| Error::input(format!("tokenizer: the added tokens cannot be searched for: {error}")))?;
        let mut beginnings = HashSet::new();
        for (_, token) in tokens.iter().filter(|(_, token)| token.special) {
            beginnings.extend(token.content.char_indices().skip(1).map(|(end, _)| token.content[..end].to_owned()));
        }
        let longest_beginning = beginnings.iter().map(String::len).max().unwrap_or(0);
        Ok(Self { automaton, tokens, beginnings, longest_beginning })
    }

    /// Whether the text of any of them is in `text`.
    pub fn occur_in(&self, text: &str) -> bool {
        self.automaton.is_match(text)
    }

    /// The special tokens in `text`, from left to right, but for those that `is_text` says are only text.
    pub fn special(&self, text: &str, is_text: impl Fn(&Range<usize>) -> bool) -> Vec<Found> {
        let mut found = Vec::new();
        let mut done = 0;
        for place in self.automaton.find_iter(text) {
            let (id, token) = &self.tokens[place.pattern().as_usize()];
            let core = place.range();
            if !token.special || is_text(&core) {
                continue;
            }
            let (before, after) = (&text[..core.start], &text[core.end..]);
            let is_word = |character: char| character.is_alphanumeric() || character == '_';
            if token.single_word && (before.ends_with(is_word) || after.starts_with(is_word)) {
                continue;
            }
            let left = if token.lstrip { before.len() - before.trim_end().len() } else { 0 };
            let right = if token.rstrip { after.len() - after.trim_start().len() } else { 0 };
            let whole = (core.start - left).max(done)..core.end + right;
            done = whole.end;
            found.push(Found { id: *id, core, whole });
        }
        found
    }

    /// Whether `text`, without the white space at its end, ends in the beginning of a special token; where.
    pub fn dangling_end(&self, text: &str) -> Option<usize> {
        let text = text.trim_end();
        let shortest = text.len().saturating_sub(self.longest_beginning);
        let dangling =
            (shortest..text.len()).any(|start| text.get(start..).is_some_and(|end| self.beginnings.contains(end)));
        dangling.then_some(text.len())
    }

    /// Whether `text` is the text of a special token.
    pub fn is_special(&self, text: &str) -> bool {
        self.tokens.iter().any(|(_, token)| token.special && token.content == text)
    }
}
