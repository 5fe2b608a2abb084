//! A template's text before it is compiled: bounds on what compiling costs, and the one tag that Jinja doesn't know.
//!
//! Time and stack for compiling grow faster than the text where one tag holds a long chain of operators, or one `if` a
//! long chain of `elif`; both have a limit far above what templates in the wild have.

use std::borrow::Cow;

use super::limits;
use crate::error::{Error, Result};

/// The text to compile for `source`. `{% generation %}`, by which some templates mark what Hugging Face's masks train
/// on, writes nothing but opens a scope, as `{% with %}` does.
pub(super) fn prepare(source: &str) -> Result<String> {
    at_most("bytes", limits::TEMPLATE_BYTES, source.len())?;
    let mut out = String::with_capacity(source.len());
    let (mut rest, mut branches) = (source, 0);
    while let Some((before, tag, after)) = next_tag(rest) {
        at_most("names and operators in one tag", limits::TAG_TOKENS, tag.tokens)?;
        branches += usize::from(tag.first == "elif");
        at_most("elif tags", limits::BRANCHES, branches)?;
        out.push_str(before);
        out.push_str(&match tag.first {
            "generation" | "endgeneration" if tag.tokens == 1 => {
                Cow::Owned(tag.text.replace("endgeneration", "endwith").replace("generation", "with"))
            }
            _ => Cow::Borrowed(tag.text),
        });
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

fn at_most(what: &str, most: usize, got: usize) -> Result<()> {
    if got <= most {
        Ok(())
    } else {
        Err(Error::input(format!("chat template: expected at most {most} {what}, got {got}")))
    }
}

/// A `{{ … }}` or `{% … %}`.
struct Tag<'a> {
    text: &'a str,
    /// Its first name.
    first: &'a str,
    /// Number of names, numbers and operators; strings count as one.
    tokens: usize,
}

/// The next tag, with what is before and after it; comments and raw text belong to what is before.
fn next_tag(source: &str) -> Option<(&str, Tag<'_>, &str)> {
    let mut from = 0;
    loop {
        let start = from + source[from..].find("{")?;
        let text = &source[start..];
        if let Some(comment) = text.strip_prefix("{#") {
            from = start + 2 + comment.find("#}")? + 2;
        } else if text.starts_with("{{") || text.starts_with("{%") {
            let tag = scan(text);
            let end = start + tag.text.len();
            if tag.first == "raw" && text.starts_with("{%") {
                // up to the closing tag, which is the first whose only word is `endraw`
                from = end + end_of_raw(&source[end..])?;
                continue;
            }
            return Some((&source[..start], tag, &source[end..]));
        } else {
            from = start + 1;
        }
    }
}

fn end_of_raw(source: &str) -> Option<usize> {
    source.match_indices("{%").map(|(at, _)| at).find(|&at| {
        let inside = source[at + 2..].trim_start_matches(['-', '+']).trim_start();
        let behind = inside.strip_prefix("endraw").map(|behind| behind.trim_start().trim_start_matches(['-', '+']));
        behind.is_some_and(|behind| behind.starts_with("%}"))
    })
}

/// The tag at the beginning of `text`, or all of it where the tag isn't closed.
fn scan(text: &str) -> Tag<'_> {
    let close = if text.starts_with("{{") { "}}" } else { "%}" };
    let inside = &text[2..];
    let (mut first, mut tokens, mut at) = ("", 0, 0);
    while let Some(character) = inside[at..].chars().next() {
        let rest = &inside[at..];
        if rest.starts_with(close) {
            return Tag { text: &text[..2 + at + close.len()], first, tokens };
        }
        let length = match character {
            quote @ ('\'' | '"') => string_length(rest, quote),
            name if name.is_alphanumeric() || name == '_' => {
                let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                if first.is_empty() {
                    first = &rest[..length];
                }
                length
            }
            other => other.len_utf8(),
        };
        let controls_space = matches!(character, '-' | '+') && (at == 0 || inside[at + length..].starts_with(close));
        tokens += usize::from(!character.is_whitespace() && !controls_space);
        at += length;
    }
    Tag { text, first, tokens }
}

/// The bytes of the string literal at the beginning of `text`, quotes included.
fn string_length(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            end if end == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}
