//! Reads calls from an answer while it grows.
//!
//! Text is given out as soon as it cannot be the beginning of a call; a call, once its name is one of the request's and its
//! arguments have begun. What only looks like a call is text after all. How the answer was cut in pieces changes nothing.

use std::collections::HashSet;

use super::scan::{Found, Scan, tail};
use super::{Syntax, Tools};
use crate::serve::stop::overlap;

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// What the user sees.
    Text(String),
    /// A call of this function begins, the answer's `call`-th from 0 on.
    Call {
        /// Its number.
        call: usize,
        /// The function's name.
        name: String,
    },
    /// More of the arguments' JSON.
    Arguments {
        /// The call's number.
        call: usize,
        /// The next part.
        text: String,
    },
}

/// Where a reader stands; `held` is always what has not been decided yet.
#[derive(Clone, Copy, Debug)]
enum State {
    /// In text, maybe with the beginning of a marker.
    Text,
    /// Behind a marker of `skip` bytes and a separator `lead`: a call, if it is one.
    Head { skip: usize, lead: Option<u8> },
    /// In a call's arguments.
    Arguments { depth: usize, string: bool, escaped: bool },
    /// Behind them.
    Tail,
    /// Behind the only call that was asked for.
    Over,
}

/// Reads one answer.
#[derive(Clone, Debug)]
pub struct Reader {
    syntax: Syntax,
    names: HashSet<String>,
    most: usize,
    held: String,
    state: State,
    /// Whether there was text already; without a marker, calls come first or not at all.
    begun: bool,
    calls: usize,
}

impl Reader {
    /// A reader of calls of `tools`.
    pub fn new(syntax: Syntax, tools: &Tools) -> Self {
        Self {
            syntax,
            names: tools.list.iter().map(|tool| tool.name.clone()).collect(),
            most: if tools.parallel { usize::MAX } else { 1 },
            held: String::new(),
            state: State::Text,
            begun: false,
            calls: 0,
        }
    }

    /// Takes more of the answer's text.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while self.step(&mut pieces) {}
        pieces
    }

    /// The answer ended: what was held is text after all, but for white space around calls.
    pub fn finish(&mut self) -> Vec<Piece> {
        let rest = std::mem::take(&mut self.held);
        let dropped = match self.state {
            State::Text => self.calls > 0 && rest.trim().is_empty(),
            State::Head { .. } => false,
            State::Arguments { .. } | State::Tail | State::Over => true,
        };
        if dropped || rest.is_empty() { Vec::new() } else { vec![Piece::Text(rest)] }
    }

    /// Number of calls so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Decides what can be decided next; `false` when that needs more text.
    fn step(&mut self, pieces: &mut Vec<Piece>) -> bool {
        match self.state {
            State::Text => self.text(pieces),
            State::Head { skip, lead } => self.head(skip, lead, pieces),
            State::Arguments { depth, string, escaped } => self.arguments(depth, string, escaped, pieces),
            State::Tail => match tail(&self.held, self.syntax) {
                None => false,
                Some((end, next)) => {
                    self.held.drain(..end);
                    self.state = next.map_or(State::Text, |lead| State::Head { skip: 0, lead: Some(lead) });
                    true
                }
            },
            State::Over => {
                self.held.clear();
                false
            }
        }
    }

    fn text(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let first = self.held.trim_start().as_bytes().first().copied();
        if self.syntax == Syntax::Llama && !self.begun {
            match first {
                None => return false,
                Some(b'{') => self.state = State::Head { skip: 0, lead: None },
                Some(_) => {}
            }
            self.begun = true;
            if first == Some(b'{') {
                return true;
            }
        }
        let marker = self.syntax.marker();
        // White space before a call belongs to the call.
        if let Some(at) = self.held.find(marker) {
            let before = self.held[..at].trim_end().len();
            self.show(before, pieces);
            let lead = (self.syntax == Syntax::Mistral).then_some(b'[');
            self.state = State::Head { skip: at - before + marker.len(), lead };
            return true;
        }
        let certain = self.held.len() - overlap(&self.held, marker);
        let certain = self.held[..certain].trim_end().len();
        self.show(certain, pieces);
        false
    }

    fn head(&mut self, skip: usize, lead: Option<u8>, pieces: &mut Vec<Piece>) -> bool {
        let mut scan = Scan::new(&self.held[skip..]);
        match scan.head(lead, &self.names) {
            Found::More => false,
            Found::Not => {
                self.show(skip, pieces);
                self.state = State::Text;
                true
            }
            Found::Call { name, arguments } => {
                self.held.drain(..skip + scan.at);
                if self.calls == self.most {
                    self.state = State::Over;
                    return true;
                }
                let call = self.calls;
                self.calls += 1;
                pieces.push(Piece::Call { call, name });
                if arguments {
                    self.state = State::Arguments { depth: 0, string: false, escaped: false };
                } else {
                    pieces.push(Piece::Arguments { call, text: "{}".to_owned() });
                    self.state = State::Tail;
                }
                true
            }
        }
    }

    fn arguments(&mut self, depth: usize, string: bool, escaped: bool, pieces: &mut Vec<Piece>) -> bool {
        let (mut depth, mut string, mut escaped) = (depth, string, escaped);
        let mut end = None;
        for (at, byte) in self.held.bytes().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if string => escaped = true,
                b'"' => string = !string,
                b'{' | b'[' if !string => depth += 1,
                b'}' | b']' if !string => {
                    depth -= 1;
                    if depth == 0 {
                        end = Some(at + 1);
                        break;
                    }
                }
                _ => {}
            }
        }
        let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
        if !text.is_empty() {
            pieces.push(Piece::Arguments { call: self.calls - 1, text });
        }
        self.state = if end.is_some() { State::Tail } else { State::Arguments { depth, string, escaped } };
        end.is_some()
    }

    fn show(&mut self, length: usize, pieces: &mut Vec<Piece>) {
        if length > 0 {
            pieces.push(Piece::Text(self.held.drain(..length).collect()));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::{Choice, Tool};
    use super::*;

    fn tools(parallel: bool) -> Tools {
        let tool = |name: &str| Tool { name: name.to_owned(), parameters: json!({"type": "object"}) };
        Tools { list: vec![tool("weather"), tool("now")], choice: Choice::Auto, parallel }
    }

    /// All text, and each call's name and arguments.
    type Read = (String, Vec<(String, String)>);

    fn read<'a>(syntax: Syntax, parallel: bool, pieces: impl IntoIterator<Item = &'a str>) -> Read {
        let mut reader = Reader::new(syntax, &tools(parallel));
        let mut found: Vec<Piece> = pieces.into_iter().flat_map(|piece| reader.push(piece)).collect();
        found.extend(reader.finish());
        let (mut text, mut calls) = (String::new(), Vec::<(String, String)>::new());
        for piece in found {
            match piece {
                Piece::Text(more) => text.push_str(&more),
                Piece::Call { call, name } => {
                    assert_eq!(call, calls.len());
                    calls.push((name, String::new()));
                }
                Piece::Arguments { call, text } => {
                    assert_eq!(call + 1, calls.len());
                    calls[call].1.push_str(&text);
                }
            }
        }
        assert_eq!(reader.calls(), calls.len());
        (text, calls)
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.to_owned(), arguments.to_owned())
    }

    const WEATHER: &str = r#"{"place": "}</tool_call> \"Ulm\\", "days": [1, {"a": "é"}]}"#;

    #[test]
    fn each_syntax_is_read() {
        let both = vec![call("weather", WEATHER), call("now", "{}")];
        let hermes = format!(
            "Let me see.\n<tool_call>\n{{\"name\": \"weather\", \"arguments\": {WEATHER}}}\n</tool_call>\n<tool_call>\n\
             {{\"name\": \"now\"}}\n</tool_call>\n"
        );
        assert_eq!(read(Syntax::Hermes, true, [&*hermes]), ("Let me see.".into(), both.clone()));
        assert_eq!(read(Syntax::Hermes, false, [&*hermes]), ("Let me see.".into(), both[..1].to_vec()));
        for (before, between) in [("", "; "), ("<|python_tag|>", "\n"), ("\n", ";")] {
            let llama = format!(
                "{before}{{\"name\": \"weather\", \"parameters\": {WEATHER}}}{between}{{\"type\": \"function\", \
                 \"name\": \"now\", \"parameters\": {{}}}}"
            );
            assert_eq!(read(Syntax::Llama, true, [&*llama]), (String::new(), both.clone()), "{llama}");
        }
        let mistral = format!(
            "[TOOL_CALLS] [{{\"name\": \"weather\", \"arguments\": {WEATHER}, \"id\": \"abcdefghi\"}}, {{\"name\": \
             \"now\", \"arguments\": {{}}}}]"
        );
        assert_eq!(read(Syntax::Mistral, true, [&*mistral]), (String::new(), both));
    }

    #[test]
    fn what_is_no_call_is_text() {
        let nobody = r#"{"name": "nobody", "arguments": {}, "parameters": {}}"#;
        for (syntax, text) in [
            (Syntax::Hermes, " a <tool_call> b "),
            (Syntax::Hermes, "<tool_cal"),
            (Syntax::Hermes, "<tool_call>\n{\"name\": \"weather\""),
            (Syntax::Hermes, "<tool_call>\n{\"name\": \"weather\", \"arguments\": 3}</tool_call>"),
            (Syntax::Hermes, "<tool_call>{\"arguments\": {}, \"name\": \"weather\"}</tool_call>"),
            (Syntax::Hermes, &format!("<tool_call>\n{nobody}\n</tool_call>")),
            (Syntax::Hermes, &format!("<tool_call>{}", " ".repeat(3000))),
            (Syntax::Llama, nobody),
            (Syntax::Llama, "a {\"name\": \"weather\", \"parameters\": {}}"),
            (Syntax::Llama, "<|python_tag|>print(1)"),
            (Syntax::Mistral, "[TOOL_CALLS] weather"),
            (Syntax::Mistral, "[TOOL_CALLS] {\"name\": \"weather\", \"arguments\": {}}"),
        ] {
            assert_eq!(read(syntax, true, [text]), (text.to_owned(), Vec::new()), "{text}");
        }
    }

    #[test]
    fn an_answer_goes_on_behind_what_only_looked_like_a_call() {
        let text = "<tool_call><tool_call>\n{\"name\": \"now\", \"arguments\": {}}</tool_call> and so on ";
        assert_eq!(read(Syntax::Hermes, true, [text]), ("<tool_call> and so on".into(), vec![call("now", "{}")]));
    }

    #[test]
    fn text_is_not_held_longer_than_it_must_be() {
        let mut reader = Reader::new(Syntax::Hermes, &tools(true));
        assert_eq!(reader.push("one <tool"), [Piece::Text("one".into())]);
        assert_eq!(reader.push("s> {"), [Piece::Text(" <tools> {".into())]);
        assert_eq!(reader.push("<tool_call>{\"name\": \"now\", \"arguments\": "), []);
        let begun = [Piece::Call { call: 0, name: "now".into() }, Piece::Arguments { call: 0, text: "{\"a\"".into() }];
        assert_eq!(reader.push("{\"a\""), begun);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            syntax in prop::sample::select(vec![Syntax::Hermes, Syntax::Llama, Syntax::Mistral]),
            parts in prop::collection::vec(prop::sample::select(vec![
                "<tool_call>", "</tool_call>", "<tool_", "[TOOL_CALLS]", "<|python_tag|>", "{\"name\": \"weather\"",
                ", \"arguments\": ", ", \"parameters\": ", "{\"a\": \"}\\\"é\"}", "}", "{", "[", "]", ", ", "; ", "\n",
                " ", "é", "{\"name\": \"now\", \"arguments\": {\"x\": [{}]}}", ", \"id\": \"x\"", "\"", "text",
            ]), 0..14),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
            parallel: bool,
        ) {
            let whole = parts.concat();
            let expected = read(syntax, parallel, [&*whole]);
            let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(whole.len() + 1)).collect();
            ends.retain(|&end| whole.is_char_boundary(end));
            ends.extend([0, whole.len()]);
            ends.sort_unstable();
            let pieces = ends.windows(2).map(|pair| &whole[pair[0]..pair[1]]);
            prop_assert_eq!(&read(syntax, parallel, pieces), &expected);
            let letters: Vec<String> = whole.chars().map(String::from).collect();
            prop_assert_eq!(&read(syntax, parallel, letters.iter().map(String::as_str)), &expected);
            if expected.1.is_empty() {
                prop_assert_eq!(expected.0, whole);
            }
        }
    }
}
