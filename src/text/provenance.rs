//! Which special-token text in a rendered conversation the template wrote, and which came in with a message.
//!
//! Only the template's own special tokens are parsed. To tell them apart, the conversation is rendered a second time
//! with every special token's text inside it wrapped in two characters that occur nowhere else; what is between them
//! in the result is the message's. A message that ends in the beginning of a special token gets one such character
//! there, so that no token is put together from the ends of two. Without the marks both renderings must be equal.

use std::ops::Range;

use serde_json::Value;

use super::added::AddedTokens;
use super::conversation::Conversation;
use super::template::{Prepared, Template};
use crate::error::{Error, Result};

/// A rendered conversation.
pub(super) struct Rendered {
    pub text: String,
    /// Special tokens' text that isn't the template's.
    foreign: Vec<Range<usize>>,
    /// Places that no special token may reach across.
    seams: Vec<usize>,
}

impl Rendered {
    /// Whether a special token's text at `range` is to be read as text.
    pub fn is_text(&self, range: &Range<usize>) -> bool {
        let first = self.foreign.partition_point(|foreign| foreign.end <= range.start);
        let overlaps = self.foreign.get(first).is_some_and(|foreign| foreign.start < range.end);
        let seam = self.seams.partition_point(|&seam| seam <= range.start);
        overlaps || self.seams.get(seam).is_some_and(|&seam| seam < range.end)
    }
}

/// Renders the whole conversation.
pub(super) fn render(
    template: &Template,
    added: &AddedTokens,
    conversation: &Conversation,
    prepared: &Prepared,
    add_generation_prompt: bool,
) -> Result<Rendered> {
    let all = 0..conversation.messages.len();
    let text = template.render_messages(prepared, all.clone(), add_generation_prompt)?;
    if !holds_special(conversation, added) {
        return Ok(Rendered { text, foreign: Vec::new(), seams: Vec::new() });
    }
    let marks = unused_characters(template, conversation)?;
    let marked = mark_conversation(conversation, added, marks);
    let marked = Prepared::new(&marked).at(prepared);
    let marked = template.render_messages(&marked, all, add_generation_prompt)?;
    let rendered = unmark(&marked, added, marks);
    if rendered.text != text {
        return Err(Error::input(
            "chat template: special-token text inside a message cannot be told from the template's own: the template \
             works on that text",
        )
        .hint("remove the special tokens' text from the messages"));
    }
    Ok(rendered)
}

fn holds_special(conversation: &Conversation, added: &AddedTokens) -> bool {
    any_text(conversation, &mut |text| !added.special(text, |_| false).is_empty() || added.dangling_end(text).is_some())
}

/// Whether `test` holds for any string of the conversation, keys included.
fn any_text(conversation: &Conversation, test: &mut impl FnMut(&str) -> bool) -> bool {
    fn walk(value: &Value, test: &mut impl FnMut(&str) -> bool) -> bool {
        match value {
            Value::String(text) => test(text),
            Value::Array(items) => items.iter().any(|item| walk(item, test)),
            Value::Object(map) => map.iter().any(|(key, value)| test(key) || walk(value, test)),
            _ => false,
        }
    }
    conversation
        .messages
        .iter()
        .chain(&conversation.tools)
        .chain(conversation.extra.values())
        .any(|value| walk(value, test))
}

/// Two characters of the private planes that neither the conversation nor the template has.
fn unused_characters(template: &Template, conversation: &Conversation) -> Result<[char; 2]> {
    let mut used = std::collections::HashSet::new();
    let private = |character: &char| *character >= '\u{f0000}';
    used.extend(template.source().chars().filter(private));
    used.extend(template.tool_use_source().unwrap_or_default().chars().filter(private));
    any_text(conversation, &mut |text| {
        used.extend(text.chars().filter(private));
        false
    });
    let mut unused = ('\u{f0000}'..='\u{ffffd}').filter(|character| !used.contains(character));
    match (unused.next(), unused.next()) {
        (Some(open), Some(close)) => Ok([open, close]),
        _ => Err(Error::input("conversation: expected some unused characters of the private planes, got all of them")),
    }
}

fn mark_conversation(conversation: &Conversation, added: &AddedTokens, marks: [char; 2]) -> Conversation {
    let mark = |value: &Value| mark_value(value, added, marks);
    Conversation {
        messages: conversation.messages.iter().map(mark).collect(),
        tools: conversation.tools.as_ref().map(mark),
        extra: conversation.extra.iter().map(|(name, value)| (name.clone(), mark(value))).collect(),
    }
}

fn mark_value(value: &Value, added: &AddedTokens, marks: [char; 2]) -> Value {
    match value {
        Value::String(text) => Value::String(mark_text(text, added, marks)),
        Value::Array(items) => items.iter().map(|item| mark_value(item, added, marks)).collect(),
        Value::Object(map) => {
            map.iter().map(|(key, value)| (mark_text(key, added, marks), mark_value(value, added, marks))).collect()
        }
        other => other.clone(),
    }
}

fn mark_text(text: &str, added: &AddedTokens, [open, close]: [char; 2]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for found in added.special(text, |_| false) {
        out.push_str(&text[done..found.core.start]);
        out.push(open);
        out.push_str(&text[found.core.clone()]);
        out.push(close);
        done = found.core.end;
    }
    match added.dangling_end(text).filter(|&end| end >= done) {
        Some(end) => {
            out.push_str(&text[done..end]);
            out.push(close);
            out.push_str(&text[end..]);
        }
        None => out.push_str(&text[done..]),
    }
    out
}

/// Takes the marks out again and keeps where they were.
fn unmark(marked: &str, added: &AddedTokens, [open, close]: [char; 2]) -> Rendered {
    let mut text = String::with_capacity(marked.len());
    let (mut foreign, mut seams, mut opened) = (Vec::new(), Vec::new(), None);
    for character in marked.chars() {
        if character == open {
            seams.extend(opened.replace(text.len()));
        } else if character == close {
            match opened.take() {
                Some(start) if added.is_special(&text[start..]) => foreign.push(start..text.len()),
                // the template cut the text between the marks
                start => {
                    seams.extend(start);
                    seams.push(text.len());
                }
            }
        } else {
            text.push(character);
        }
    }
    seams.extend(opened);
    Rendered { text, foreign, seams }
}
