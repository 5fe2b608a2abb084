//! Jinja as Hugging Face sets it up in Python: the filters, tests and string methods that templates rely on.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::json::{self, Style};
use super::limits;

/// An environment without loaders or I/O, limited in time, memory and depth.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.unwrap_or_default());
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(limits::TEMPLATE_FUEL));
    environment.set_recursion_limit(limits::TEMPLATE_DEPTH);
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", string);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.set_formatter(|out, _, value| {
        // Jinja writes `str(value)`: floats by Python's rules
        match f64::try_from(value.clone()) {
            Ok(float) if value.kind() == ValueKind::Number && !value.is_integer() => {
                out.write_str(&float_str(float)).map_err(Error::from)
            }
            _ => write!(out, "{value}").map_err(Error::from),
        }
    });
    environment
}

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, by position or by name.
fn tojson(value: &Value, positional: minijinja::value::Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let option = |index: usize| -> Result<Option<Value>, Error> {
        let value = match positional.get(index) {
            Some(value) => Some(value.clone()),
            None => options.get::<Option<Value>>(NAMES[index])?,
        };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let indent = match option(1)? {
        Some(indent) => Some(match usize::try_from(indent.clone()) {
            Ok(width) if width <= 64 => " ".repeat(width),
            Ok(width) => return Err(invalid(format!("tojson: expected an indent of at most 64, got {width}"))),
            Err(_) => {
                indent.as_str().map(str::to_owned).ok_or_else(|| invalid("tojson: expected a number for indent"))?
            }
        }),
        None => None,
    };
    let mut style = Style::new(indent);
    if let Some(separators) = option(2)? {
        style.item_separator = separators.get_item_by_index(0)?.to_string();
        style.key_separator = separators.get_item_by_index(1)?.to_string();
    }
    style.ensure_ascii = option(0)?.is_some_and(|value| value.is_true());
    style.sort_keys = option(3)?.is_some_and(|value| value.is_true());
    options.assert_all_used()?;
    if value.is_undefined() {
        return Err(invalid("tojson: expected a value, got an undefined one"));
    }
    let value = serde_json::to_value(value).map_err(|error| invalid(format!("tojson: {error}")))?;
    Ok(Value::from(json::dump(&value, &style)))
}

/// `str(value)`.
fn string(value: &Value) -> Value {
    match f64::try_from(value.clone()) {
        Ok(float) if value.kind() == ValueKind::Number && !value.is_integer() => Value::from(float_str(float)),
        _ if value.kind() == ValueKind::String => value.clone(),
        _ => Value::from(value.to_string()),
    }
}

fn float_str(value: f64) -> String {
    if value.is_nan() {
        "nan".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "inf" } else { "-inf" }.to_owned()
    } else {
        json::float_repr(value)
    }
}

/// In Python what has a length and items: strings and dicts too, and Jinja's undefined values.
fn is_sequence(value: &Value) -> bool {
    value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
}

fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || value.kind() == ValueKind::Iterable
}

/// Python's methods: what `pycompat` lacks, then `pycompat`.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        if let Some(result) = string_method(text, name, args)? {
            return Ok(result);
        }
    } else if value.kind() == ValueKind::Seq && name == "index" {
        let (wanted,): (Value,) = from_args(args)?;
        let position = value.try_iter()?.position(|item| item == wanted);
        return position.map(Value::from).ok_or_else(|| invalid(format!("{wanted} is not in list")));
    } else if matches!(value.kind(), ValueKind::Seq | ValueKind::Map) && name == "copy" {
        let () = from_args(args)?;
        return Ok(value.clone());
    }
    unknown_method_callback(state, value, name, args)
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let cut = if name == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match cut {
                Some((before, after)) => [before, separator, after],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "rsplit" => {
            let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
            let pieces = match limit.and_then(|limit| usize::try_from(limit).ok()) {
                None => return string_method(text, "split", args),
                Some(limit) => rsplit(text, separator, limit),
            };
            pieces.into_iter().map(Value::from).collect()
        }
        "split" => {
            let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
            if separator == Some("") {
                return Err(invalid("split: expected a separator, got an empty one"));
            }
            split(text, separator, limit.and_then(|limit| usize::try_from(limit).ok()))
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            if width > 1 << 16 {
                return Err(invalid(format!("zfill: expected a width of at most 65536, got {width}")));
            }
            let missing = width.saturating_sub(text.chars().count());
            let (sign, digits) = match text.strip_prefix(['-', '+']) {
                Some(digits) => text.split_at(text.len() - digits.len()),
                None => ("", text),
            };
            Value::from(format!("{sign}{}{digits}", "0".repeat(missing)))
        }
        "casefold" => Value::from(text.to_lowercase()),
        _ => return Ok(None),
    }))
}

fn split(text: &str, separator: Option<&str>, limit: Option<usize>) -> Value {
    let limit = limit.unwrap_or(usize::MAX);
    match separator {
        Some(separator) => text.splitn(limit.saturating_add(1), separator).map(Value::from).collect(),
        None => {
            let mut rest = text.trim_start();
            let mut pieces = Vec::new();
            while !rest.is_empty() {
                let end = if pieces.len() == limit { None } else { rest.find(char::is_whitespace) };
                let (piece, after) = rest.split_at(end.unwrap_or(rest.len()));
                pieces.push(Value::from(piece));
                rest = after.trim_start();
            }
            Value::from(pieces)
        }
    }
}

fn rsplit<'a>(text: &'a str, separator: Option<&str>, limit: usize) -> Vec<&'a str> {
    let mut pieces: Vec<&str> = match separator {
        Some(separator) => text.rsplitn(limit.saturating_add(1), separator).collect(),
        None => {
            let mut rest = text.trim_end();
            let mut pieces = Vec::new();
            while !rest.is_empty() && pieces.len() < limit {
                let (before, piece) = rest.rsplit_once(char::is_whitespace).unwrap_or(("", rest));
                pieces.push(piece);
                rest = before.trim_end();
            }
            if !rest.is_empty() {
                pieces.push(rest);
            }
            pieces
        }
    };
    pieces.reverse();
    pieces
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
