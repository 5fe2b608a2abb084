//! Text from ids, one at a time, without ever showing half a character.

use super::tokenizer::Tokenizer;

/// What a decoder writes for bytes that aren't (yet) a character.
const REPLACEMENT: char = '\u{fffd}';
/// A character has at most four bytes, so at most three can be waiting for the next.
const MOST_WAITING: usize = 3;
/// So many ids without a whole character aren't text: what there is, is shown, so that time stays bounded.
const MOST_PENDING: usize = 32;

/// Turns ids into text as they come; special tokens are skipped, but for those that are asked for.
#[derive(Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// The ids of the last shown text, as context, and those after it.
    ids: Vec<u32>,
    /// How many of `ids` are shown whole.
    shown_ids: usize,
    /// How many bytes of the text of `ids` are shown.
    shown_bytes: usize,
    /// Special tokens that are shown.
    specials: Vec<u32>,
}

impl StreamDecoder {
    /// A decoder for one sequence of ids.
    pub fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), shown_ids: 0, shown_bytes: 0, specials: Vec::new() }
    }

    /// The same decoder, which shows this special token.
    #[must_use]
    pub fn showing(mut self, id: u32) -> Self {
        self.specials.push(id);
        self
    }

    /// Takes the next id; gives the text that is certain now, often one token's, sometimes none.
    pub fn push(&mut self, id: u32) -> String {
        if self.specials.contains(&id) {
            let mut text = self.finish();
            text.extend(self.tokenizer.token_of(id));
            return text;
        }
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, true);
        let waiting = text.chars().rev().take_while(|&character| character == REPLACEMENT).count().min(MOST_WAITING);
        let forced = self.ids.len() - self.shown_ids > MOST_PENDING;
        let certain = if forced { text.len() } else { text.len() - waiting * REPLACEMENT.len_utf8() };
        if certain <= self.shown_bytes {
            return String::new();
        }
        let new = text.get(self.shown_bytes..certain).unwrap_or_default().to_owned();
        self.shown_bytes = certain;
        if certain == text.len() {
            self.ids.drain(..self.shown_ids);
            self.shown_ids = self.ids.len();
            self.shown_bytes = self.tokenizer.decode(&self.ids, true).len();
        }
        new
    }

    /// What is left when no id follows: a character that was never finished shows as U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = self.tokenizer.decode(&self.ids, true);
        let rest = text.get(self.shown_bytes..).unwrap_or_default().to_owned();
        self.ids.clear();
        (self.shown_ids, self.shown_bytes) = (0, 0);
        rest
    }
}
