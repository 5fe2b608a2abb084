//! Whether a file can be trained on, row by row, before anything is trained: for servers that take files from others.

use std::path::Path;

use super::read::rows;
use super::rows::{BadRow, Place, Row};
use super::schema::{Mapping, Schema};
use super::source::{self, Format};
use crate::error::{Error, Result};

/// Problems that are told.
const TOLD: usize = 5;

/// What a file holds.
#[derive(Debug, Default)]
pub struct Checked {
    /// Rows that can be trained on.
    pub rows: u64,
    /// Rows that cannot.
    pub bad_rows: u64,
    /// The schema of all of them.
    pub kind: Option<&'static str>,
    /// What is wrong with the first of the bad ones, with their lines.
    pub problems: Vec<String>,
}

/// Reads a file of JSON lines whose rows all have the schema of the first.
///
/// # Errors
/// The file is none, or has no rows. Bad rows are no error here.
pub fn check(path: &Path) -> Result<Checked> {
    let mut checked = Checked::default();
    let (mut schema, mapping) = (None, Mapping::new());
    // The file's place is no business of who sent it.
    let unnamed = |error: Error| Error {
        message: error.message.replace(&path.display().to_string(), "file"),
        hint: None,
        ..error
    };
    for source in source::open(path).map_err(unnamed)? {
        if source.format != Format::JsonLines {
            return Err(Error::input("file: expected JSONL, one JSON object a line, got another format"));
        }
        rows(source, &mut |row| {
            let problem = match row {
                Ok(Row { place, columns }) => Schema::recognise(&columns)
                    .and_then(|found| match schema.get_or_insert(found) {
                        first if *first == found => found.read(&columns, &mapping).map(drop),
                        first => Err(format!(
                            "expected a row of the schema {} as the first one, got one of {}",
                            first.name(),
                            found.name()
                        )),
                    })
                    .map_err(|problem| (place, problem)),
                Err(BadRow { place, problem }) => Err((place, problem)),
            };
            match problem {
                Ok(()) => checked.rows += 1,
                Err((Place { line, .. }, problem)) => {
                    checked.bad_rows += 1;
                    if checked.problems.len() < TOLD {
                        checked.problems.push(format!("line {line}: {problem}"));
                    }
                }
            }
            Ok(())
        })
        .map_err(unnamed)?;
    }
    if checked.rows + checked.bad_rows == 0 {
        return Err(Error::input("file: expected rows, got none"));
    }
    checked.kind = schema.map(Schema::name);
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<Checked> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, text).unwrap();
        check(&path)
    }

    #[test]
    fn bad_rows_are_told_with_their_lines() {
        let good = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
        let found = checked(&format!("{good}\n{good}")).unwrap();
        assert_eq!((found.rows, found.bad_rows, found.kind), (2, 0, Some("messages")));
        let found = checked(&format!("{good}{{\"messages\": 3}}\n{{\n[]\n{{\"text\": \"x\"}}\n{good}")).unwrap();
        assert_eq!((found.rows, found.bad_rows), (2, 4));
        for (line, problem) in (2..).zip(&found.problems) {
            assert!(problem.starts_with(&format!("line {line}: ")) && problem.contains("expected"), "{problem}");
        }
    }

    #[test]
    fn other_files_are_refused() {
        for text in ["", "\n\n", "[{\"text\": \"a\"}]", "text\na\n", "just words"] {
            let found = checked(text);
            assert!(
                found.as_ref().is_err() || found.as_ref().is_ok_and(|found| found.bad_rows > 0),
                "{text}: {found:?}"
            );
        }
    }
}
