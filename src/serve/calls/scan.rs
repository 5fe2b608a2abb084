//! What stands before a call's arguments and behind them: JSON that is cut off anywhere.

use std::collections::HashSet;

use super::Syntax;

/// Longest beginning of a call, up to its arguments, and longest end after them, in bytes.
const MOST_BYTES: usize = 1024;

/// What a beginning turned out to be.
pub(super) enum Found {
    /// That can't be told yet.
    More,
    /// No call.
    Not,
    /// A call; without arguments, where it has none.
    Call { name: String, arguments: bool },
}

/// A position in JSON, of which no more is looked at than the limit.
pub(super) struct Scan<'a> {
    text: &'a [u8],
    pub at: usize,
}

impl<'a> Scan<'a> {
    /// At the beginning of a text.
    pub fn new(text: &'a str) -> Self {
        Self { text: &text.as_bytes()[..text.len().min(MOST_BYTES)], at: 0 }
    }

    /// The next byte that is no white space.
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    /// Goes past the next byte if it is this one.
    fn eat(&mut self, byte: u8) -> Option<bool> {
        let same = self.peek()? == byte;
        self.at += usize::from(same);
        Some(same)
    }

    /// A string without escapes, or none where there is another thing.
    fn string(&mut self) -> Option<Option<&'a [u8]>> {
        if !self.eat(b'"')? {
            return Some(None);
        }
        let rest = &self.text[self.at..];
        let end = rest.iter().position(|&byte| byte == b'"' || byte == b'\\')?;
        self.at += end + 1;
        Some((rest[end] == b'"').then(|| &rest[..end]))
    }

    /// The beginning of a call up to its arguments.
    pub fn head(&mut self, lead: Option<u8>, names: &HashSet<String>) -> Found {
        let long = self.text.len() == MOST_BYTES;
        self.call(lead, names).unwrap_or(if long { Found::Not } else { Found::More })
    }

    /// The same; none where the text ends too early.
    fn call(&mut self, lead: Option<u8>, names: &HashSet<String>) -> Option<Found> {
        if let Some(lead) = lead {
            // Llama's calls follow one another with or without a semicolon.
            if !self.eat(lead)? && lead != b';' {
                return Some(Found::Not);
            }
        }
        if !self.eat(b'{')? {
            return Some(Found::Not);
        }
        let mut name = None;
        loop {
            let Some(key) = self.string()? else { return Some(Found::Not) };
            if !self.eat(b':')? {
                return Some(Found::Not);
            }
            match (key, &name) {
                (b"name", None) => {
                    let value = self.string()?.and_then(|value| std::str::from_utf8(value).ok());
                    name = value.filter(|value| names.contains(*value)).map(str::to_owned);
                    if name.is_none() {
                        return Some(Found::Not);
                    }
                }
                (b"arguments" | b"parameters", Some(name)) => {
                    let found = self.peek()? == b'{';
                    return Some(if found { Found::Call { name: name.clone(), arguments: true } } else { Found::Not });
                }
                (b"type" | b"id", _) => {
                    if self.string()?.is_none() {
                        return Some(Found::Not);
                    }
                }
                _ => return Some(Found::Not),
            }
            if self.eat(b',')? {
                continue;
            }
            return Some(match (self.peek()?, name) {
                (b'}', Some(name)) => Found::Call { name, arguments: false },
                _ => Found::Not,
            });
        }
    }
}

/// Behind a call's arguments: where what belongs to the call ends, and what leads to the next one if that follows. None
/// where that can't be told yet. Where the call ends otherwise than it should, the rest is text.
pub(super) fn tail(held: &str, syntax: Syntax) -> Option<(usize, Option<u8>)> {
    let mut scan = Scan::new(held);
    let found = closing(&mut scan, syntax);
    found.or((held.len() >= MOST_BYTES).then_some((0, None)))
}

fn closing(scan: &mut Scan, syntax: Syntax) -> Option<(usize, Option<u8>)> {
    while scan.eat(b',')? {
        // such as Mistral's id
        if scan.string()?.is_none() || !scan.eat(b':')? || scan.string()?.is_none() {
            return Some((0, None));
        }
    }
    if !scan.eat(b'}')? {
        return Some((0, None));
    }
    let end = scan.at;
    let next = scan.peek()?;
    Some(match (syntax, next) {
        (Syntax::Hermes, _) => {
            let close = b"</tool_call>";
            let rest = &scan.text[scan.at..];
            if rest.starts_with(close) {
                (scan.at + close.len(), None)
            } else if close.starts_with(rest) {
                return None;
            } else {
                (end, None)
            }
        }
        (Syntax::Mistral, b',') => (end, Some(b',')),
        (Syntax::Mistral, b']') => (scan.at + 1, None),
        (Syntax::Llama, b';' | b'{') => (end, Some(b';')),
        _ => (end, None),
    })
}
