//! What a file says about itself: keys with typed values.

use std::borrow::Cow;
use std::collections::HashMap;

use super::cursor::Cursor;
use crate::error::{Error, Result};

/// The longest key of the format's specification.
const MAX_KEY_BYTES: usize = 65_535;
/// How deep arrays may hold arrays; files in the wild have none that do.
const MAX_DEPTH: usize = 4;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the variants are the format's types
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array; all items have one type.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the variants are the format's types
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// The numbers of the types in a file.
pub(super) mod types {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

impl Value {
    /// The type's name: `u32`, `string`, `[f32]` …
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::F32(_) => "f32",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(items) => items.type_name(),
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F64(_) => "f64",
        }
    }

    /// The value as an integer, whatever its width; none for what isn't one.
    pub fn integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(value) => value.into(),
            Self::I8(value) => value.into(),
            Self::U16(value) => value.into(),
            Self::I16(value) => value.into(),
            Self::U32(value) => value.into(),
            Self::I32(value) => value.into(),
            Self::U64(value) => value.into(),
            Self::I64(value) => value.into(),
            _ => return None,
        })
    }

    /// Reads a value of the type `kind`; `key` names it in errors.
    fn read(cursor: &mut Cursor<'_>, kind: u32, key: &str) -> Result<Self> {
        Ok(match kind {
            types::U8 => Self::U8(cursor.u8(key)?),
            types::I8 => Self::I8(cursor.i8(key)?),
            types::U16 => Self::U16(cursor.u16(key)?),
            types::I16 => Self::I16(cursor.i16(key)?),
            types::U32 => Self::U32(cursor.u32(key)?),
            types::I32 => Self::I32(cursor.i32(key)?),
            types::F32 => Self::F32(cursor.f32(key)?),
            types::BOOL => Self::Bool(boolean(cursor, key)?),
            types::STRING => Self::String(cursor.string(key)?.to_owned()),
            types::ARRAY => Self::Array(Array::read(cursor, key, 1)?),
            types::U64 => Self::U64(cursor.u64(key)?),
            types::I64 => Self::I64(cursor.i64(key)?),
            types::F64 => Self::F64(cursor.f64(key)?),
            other => return Err(unknown_type(key, other)),
        })
    }
}

impl Array {
    /// Number of items.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(items) => items.len(),
            Self::I8(items) => items.len(),
            Self::U16(items) => items.len(),
            Self::I16(items) => items.len(),
            Self::U32(items) => items.len(),
            Self::I32(items) => items.len(),
            Self::F32(items) => items.len(),
            Self::Bool(items) => items.len(),
            Self::String(items) => items.len(),
            Self::Array(items) => items.len(),
            Self::U64(items) => items.len(),
            Self::I64(items) => items.len(),
            Self::F64(items) => items.len(),
        }
    }

    /// The type's name: that of the items in brackets.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "[u8]",
            Self::I8(_) => "[i8]",
            Self::U16(_) => "[u16]",
            Self::I16(_) => "[i16]",
            Self::U32(_) => "[u32]",
            Self::I32(_) => "[i32]",
            Self::F32(_) => "[f32]",
            Self::Bool(_) => "[bool]",
            Self::String(_) => "[string]",
            Self::Array(_) => "[array]",
            Self::U64(_) => "[u64]",
            Self::I64(_) => "[i64]",
            Self::F64(_) => "[f64]",
        }
    }

    /// Whether there are no items.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn read(cursor: &mut Cursor<'_>, key: &str, depth: usize) -> Result<Self> {
        if depth > MAX_DEPTH {
            return Err(Error::input(format!(
                "metadata {key:?}: expected arrays nested at most {MAX_DEPTH} deep, got more"
            )));
        }
        let kind = cursor.u32(key)?;
        let count = cursor.u64(key)?;
        macro_rules! numbers {
            ($read:ident, $least:literal) => {{
                let count = cursor.expect_items(count, $least, key)?;
                let mut items = Vec::with_capacity(count);
                for _ in 0..count {
                    items.push(cursor.$read(key)?);
                }
                items
            }};
        }
        Ok(match kind {
            types::U8 => Self::U8(numbers!(u8, 1)),
            types::I8 => Self::I8(numbers!(i8, 1)),
            types::U16 => Self::U16(numbers!(u16, 2)),
            types::I16 => Self::I16(numbers!(i16, 2)),
            types::U32 => Self::U32(numbers!(u32, 4)),
            types::I32 => Self::I32(numbers!(i32, 4)),
            types::F32 => Self::F32(numbers!(f32, 4)),
            types::U64 => Self::U64(numbers!(u64, 8)),
            types::I64 => Self::I64(numbers!(i64, 8)),
            types::F64 => Self::F64(numbers!(f64, 8)),
            types::BOOL => {
                let count = cursor.expect_items(count, 1, key)?;
                Self::Bool((0..count).map(|_| boolean(cursor, key)).collect::<Result<_>>()?)
            }
            types::STRING => {
                let count = cursor.expect_items(count, 8, key)?;
                Self::String((0..count).map(|_| Ok(cursor.string(key)?.to_owned())).collect::<Result<_>>()?)
            }
            types::ARRAY => {
                let count = cursor.expect_items(count, 12, key)?;
                Self::Array((0..count).map(|_| Self::read(cursor, key, depth + 1)).collect::<Result<_>>()?)
            }
            other => return Err(unknown_type(key, other)),
        })
    }
}

fn boolean(cursor: &mut Cursor<'_>, key: &str) -> Result<bool> {
    match cursor.u8(key)? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Error::input(format!("metadata {key:?}: expected 0 or 1 for a boolean, got {other}"))),
    }
}

fn unknown_type(key: &str, kind: u32) -> Error {
    Error::input(format!("metadata {key:?}: expected a value type from 0 to 12, got {kind}"))
}

/// Keys and values in the file's order.
///
/// The typed getters give `None` for a key that isn't there and an error for one of another type.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

impl Metadata {
    pub(super) fn read(cursor: &mut Cursor<'_>, count: u64) -> Result<Self> {
        // the least entry: an empty key's length, a type, one byte
        let count = cursor.expect_items(count, 8 + 4 + 1, "number of metadata entries")?;
        let mut metadata = Self::default();
        for number in 0..count {
            let key = cursor.string(format_args!("key of metadata entry {number}"))?;
            if key.is_empty() || key.len() > MAX_KEY_BYTES {
                return Err(Error::input(format!(
                    "key of metadata entry {number}: expected 1 to {MAX_KEY_BYTES} bytes, got {}",
                    key.len()
                )));
            }
            let kind = cursor.u32(key)?;
            let value = Value::read(cursor, kind, key)?;
            if metadata.index.insert(key.to_owned(), number).is_some() {
                return Err(Error::input(format!("metadata {key:?}: expected the key once, got it twice")));
            }
            metadata.entries.push((key.to_owned(), value));
        }
        Ok(metadata)
    }

    /// All entries in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&number| &self.entries[number].1)
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// An integer of any width that fits into 32 bits without a sign.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer of 32 bits, not negative", |value| value.integer()?.try_into().ok())
    }

    /// A number with a fraction.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "an f32", |value| match value {
            Value::F32(number) => Some(*number),
            Value::F64(number) => Some(*number as f32),
            _ => None,
        })
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(truth) => Some(*truth),
            _ => None,
        })
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(items)) => Some(items.as_slice()),
            _ => None,
        })
    }

    /// An array of f32.
    pub fn f32s(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of f32", |value| match value {
            Value::Array(Array::F32(items)) => Some(items.as_slice()),
            _ => None,
        })
    }

    /// An array of i32, or of u32 that fit.
    pub fn i32s(&self, key: &str) -> Result<Option<Cow<'_, [i32]>>> {
        self.typed(key, "an array of i32", |value| match value {
            Value::Array(Array::I32(items)) => Some(Cow::Borrowed(items.as_slice())),
            Value::Array(Array::U32(items)) => {
                items.iter().map(|&item| item.try_into().ok()).collect::<Option<Vec<_>>>().map(Cow::Owned)
            }
            _ => None,
        })
    }

    fn typed<'a, T>(&'a self, key: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            let got = value.integer().map_or_else(String::new, |number| format!(" {number}"));
            Error::input(format!("metadata {key:?}: expected {expected}, got {}{got}", value.type_name()))
        })
    }
}
