//! A reading position in bytes that are not to be trusted.

use std::fmt::Display;

use crate::error::{Error, Result};

/// Reads little-endian values one after the other; every read is checked against what is left.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    /// Offset of the next byte to read.
    pub at: usize,
}

macro_rules! number {
    ($($name:ident: $type:ty),*) => {
        $(
            /// Reads one number; `what` names it in the error.
            pub fn $name(&mut self, what: impl Display) -> Result<$type> {
                let mut raw = [0; size_of::<$type>()];
                raw.copy_from_slice(self.take(size_of::<$type>() as u64, what)?);
                Ok(<$type>::from_le_bytes(raw))
            }
        )*
    };
}

impl<'a> Cursor<'a> {
    /// A cursor at the first byte.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes that are left.
    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: u64, what: impl Display) -> Result<&'a [u8]> {
        match usize::try_from(count).ok().and_then(|count| self.bytes.get(self.at..)?.get(..count)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(Error::input(format!(
                "{what}: expected {count} bytes at offset {}, got {} before the end of the file",
                self.at,
                self.left()
            ))
            .hint("the file is truncated or damaged: compare its size with the original's")),
        }
    }

    /// Checks that `count` items of at least `least` bytes each can follow, before anything is allocated for them.
    pub fn expect_items(&self, count: u64, least: u64, what: impl Display) -> Result<usize> {
        let room = self.left() as u64 / least;
        match usize::try_from(count) {
            Ok(fits) if count <= room => Ok(fits),
            _ => Err(Error::input(format!(
                "{what}: expected at most {room} items in the {} bytes left, got a count of {count}",
                self.left()
            ))
            .hint("the file is truncated or damaged: compare its size with the original's")),
        }
    }

    /// A string: its length as u64, then UTF-8.
    pub fn string(&mut self, what: impl Display) -> Result<&'a str> {
        let length = self.u64(format_args!("{what}: length of a string"))?;
        let raw = self.take(length, format_args!("{what}: a string"))?;
        std::str::from_utf8(raw)
            .map_err(|error| Error::input(format!("{what}: expected UTF-8, got {error} in a string of {length} bytes")))
    }

    number! { u8: u8, i8: i8, u16: u16, i16: i16, u32: u32, i32: i32, f32: f32, u64: u64, i64: i64, f64: f64 }
}
