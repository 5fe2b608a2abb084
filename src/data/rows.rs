//! A row on its way from a file to an example, and where it came from.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Map, Value};

/// The longest line of a JSONL file; a conversation longer than any context is a mistake in the file.
pub const LINE_BYTES: u64 = 64 << 20;

/// Where a row stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: Arc<PathBuf>,
    /// Its line, or its number where a file has no lines; from 1.
    pub line: u64,
    /// The column at which something is wrong, from 1; 0 when the row as a whole is.
    pub column: u64,
    /// Whether `line` counts rows instead of lines.
    pub counts_rows: bool,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if self.counts_rows {
            write!(f, " row ")?;
        }
        write!(f, "{}", self.line)?;
        if self.column > 0 {
            write!(f, ":{}", self.column)?;
        }
        Ok(())
    }
}

/// A row as it was read.
#[derive(Clone, Debug)]
pub struct Row {
    /// Where it stands.
    pub place: Place,
    /// Its columns.
    pub columns: Map<String, Value>,
}

/// A row that cannot be used.
#[derive(Clone, Debug)]
pub struct BadRow {
    /// Where it stands.
    pub place: Place,
    /// What was expected, and what was there.
    pub problem: String,
}

impl fmt::Display for BadRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.problem)
    }
}
