//! JSON as Python's `json.dumps` writes it: templates were written against its spaces, order and floats.

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// `json.dumps`'s arguments.
#[derive(Clone, Debug)]
pub(super) struct Style {
    /// The text of one level of indentation; `None` keeps all on one line.
    pub indent: Option<String>,
    /// Between items.
    pub item_separator: String,
    /// Between a key and its value.
    pub key_separator: String,
    /// Whether what isn't ASCII is written as `\uXXXX`.
    pub ensure_ascii: bool,
    /// Whether keys are sorted.
    pub sort_keys: bool,
}

impl Style {
    /// Python's defaults: `", "` and `": "`, and no space after the comma where lines are broken.
    pub fn new(indent: Option<String>) -> Self {
        let item_separator = if indent.is_some() { "," } else { ", " }.to_owned();
        Self { indent, item_separator, key_separator: ": ".to_owned(), ensure_ascii: false, sort_keys: false }
    }
}

/// Parses one JSON document: numbers, depth and duplicate keys by serde_json's rules.
pub fn parse(text: &str, name: &str) -> Result<Value> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let value = Value::deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
    value.map_err(|error| Error::input(format!("{name}: expected JSON, got {error}")))
}

/// Writes `value`.
pub(super) fn dump(value: &Value, style: &Style) -> String {
    let mut out = String::new();
    write_value(&mut out, value, style, 0);
    out
}

fn write_value(out: &mut String, value: &Value, style: &Style, depth: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => out.push_str(&float_repr(float)),
            _ => out.push_str(&number.to_string()),
        },
        Value::String(text) => write_string(out, text, style.ensure_ascii),
        Value::Array(items) => write_items(out, items.iter(), ['[', ']'], style, depth, |out, item| {
            write_value(out, item, style, depth + 1);
        }),
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            if style.sort_keys {
                entries.sort_by_key(|&(key, _)| key);
            }
            write_items(out, entries.into_iter(), ['{', '}'], style, depth, |out, (key, value)| {
                write_string(out, key, style.ensure_ascii);
                out.push_str(&style.key_separator);
                write_value(out, value, style, depth + 1);
            });
        }
    }
}

fn write_items<T>(
    out: &mut String,
    items: impl ExactSizeIterator<Item = T>,
    brackets: [char; 2],
    style: &Style,
    depth: usize,
    mut write: impl FnMut(&mut String, T),
) {
    out.push(brackets[0]);
    let empty = items.len() == 0;
    for (index, item) in items.enumerate() {
        if index > 0 {
            out.push_str(&style.item_separator);
        }
        new_line(out, style, depth + 1);
        write(out, item);
    }
    if !empty {
        new_line(out, style, depth);
    }
    out.push(brackets[1]);
}

fn new_line(out: &mut String, style: &Style, depth: usize) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        (0..depth).for_each(|_| out.push_str(indent));
    }
}

fn write_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\0'..='\u{1f}' => out.push_str(&format!("\\u{:04x}", character as u32)),
            // Python escapes DEL with the rest of what isn't printable ASCII
            '\u{7f}'.. if ensure_ascii => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            _ => out.push(character),
        }
    }
    out.push('"');
}

/// A float as Python's `repr` writes it: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
pub(super) fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(power) if value != 0.0 && !(-4..16).contains(&power) => {
            let sign = if power < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", power.abs())
        }
        _ => {
            let plain = value.to_string();
            if plain.contains('.') { plain } else { format!("{plain}.0") }
        }
    }
}
