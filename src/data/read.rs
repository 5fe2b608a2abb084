//! Readers: each format as a stream of rows, good and bad, in the order of the file.

use std::cell::Cell;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use serde::de::{DeserializeSeed, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::rows::{BadRow, LINE_BYTES, Place, Row};
use super::source::{Format, Source};
use crate::error::{Error, Result};

/// The longest JSON document that is an object: it is read whole, and takes a multiple of this in memory.
const OBJECT_BYTES: u64 = 256 << 20;

/// What a reader hands over, row by row; an error ends the reading.
pub type Sink<'a> = dyn FnMut(Result<Row, BadRow>) -> Result<()> + 'a;

/// Streams the rows of `source` to `sink`.
///
/// # Errors
/// The file as a whole cannot be read, or `sink` gave one.
pub fn rows(source: Source, sink: &mut Sink<'_>) -> Result<()> {
    let Source { path, format, file, .. } = source;
    match format {
        Format::JsonLines => json_lines(&path, BufReader::with_capacity(1 << 20, file), sink),
        Format::Json => json(&path, BufReader::with_capacity(1 << 20, file), sink),
        Format::Csv(separator) => csv_rows(&path, file, separator, sink),
        Format::Parquet => parquet_rows(&path, file, sink),
        Format::Text => whole_text(&path, file, sink),
    }
}

/// The file as one row with the column `text`, as it is but for a byte order mark.
fn whole_text(path: &Arc<PathBuf>, file: File, sink: &mut Sink<'_>) -> Result<()> {
    let mut bytes = Vec::new();
    file.take(LINE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| Error::io(path, &error))?;
    if bytes.len() as u64 > LINE_BYTES {
        let most = LINE_BYTES >> 20;
        let message = format!("{}: expected a text of at most {most} MiB, got a longer one", path.display());
        return Err(Error::input(message).hint("a folder of smaller .txt files is read as a text a file"));
    }
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let place = |line| Place { file: path.clone(), line, column: 0, counts_rows: false };
    sink(match std::str::from_utf8(text) {
        Ok(text) => {
            Ok(Row { place: place(1), columns: Map::from_iter([("text".to_owned(), Value::String(text.to_owned()))]) })
        }
        Err(error) => {
            let at = error.valid_up_to();
            let problem = format!("expected UTF-8 text, got the byte 0x{:02x}", text[at]);
            Err(BadRow { place: place(1 + newlines(&text[..at])), problem })
        }
    })
}

fn json_lines(path: &Arc<PathBuf>, mut reader: impl BufRead, sink: &mut Sink<'_>) -> Result<()> {
    let mut line = Vec::new();
    let mut place = Place { file: path.clone(), line: 0, column: 0, counts_rows: false };
    loop {
        line.clear();
        let failed = |error: std::io::Error| Error::io(path, &error);
        let read = (&mut reader).take(LINE_BYTES + 1).read_until(b'\n', &mut line).map_err(failed)?;
        if read == 0 {
            return Ok(());
        }
        place.line += 1;
        if line.last() != Some(&b'\n') && line.len() as u64 > LINE_BYTES {
            reader.skip_until(b'\n').map_err(failed)?;
            let problem = format!("expected a line of at most {} MiB, got a longer one", LINE_BYTES >> 20);
            sink(Err(BadRow { place: place.clone(), problem }))?;
            continue;
        }
        let text = if place.line == 1 { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line) } else { &line };
        if !text.trim_ascii().is_empty() {
            sink(json_row(text, &place))?;
        }
    }
}

fn json_row(text: &[u8], place: &Place) -> Result<Row, BadRow> {
    let bad =
        |column: usize, problem: String| BadRow { place: Place { column: column as u64, ..place.clone() }, problem };
    let text = std::str::from_utf8(text).map_err(|error| {
        let at = error.valid_up_to();
        bad(at + 1, format!("expected UTF-8 text, got the byte 0x{:02x}", text[at]))
    })?;
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(columns)) => Ok(Row { place: place.clone(), columns }),
        Ok(other) => Err(bad(1, format!("expected a JSON object, got {}", kind(&other)))),
        Err(error) => Err(bad(error.column(), format!("expected a JSON object, got {}", reason(&error)))),
    }
}

/// serde_json's message without its own line and column.
fn reason(error: &serde_json::Error) -> String {
    let message = error.to_string();
    message.split(" at line ").next().unwrap_or_default().to_owned()
}

/// A JSON value's type in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A list of rows is streamed; an object is read whole and must hold one list of rows.
fn json(path: &Arc<PathBuf>, mut reader: impl BufRead, sink: &mut Sink<'_>) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(path, &error);
    if reader.fill_buf().map_err(failed)?.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    let progress = Rc::new(Progress { line: Cell::new(1), bytes: Cell::new(0) });
    let line = &progress.line;
    let first = loop {
        let buffer = reader.fill_buf().map_err(failed)?;
        let spaces = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        line.set(line.get() + newlines(&buffer[..spaces]));
        match buffer.get(spaces) {
            Some(&first) => {
                reader.consume(spaces);
                break first;
            }
            None if spaces == 0 => return Ok(()),
            None => reader.consume(spaces),
        }
    };
    let before = line.get() - 1;
    let place = Place { file: path.clone(), line: 0, column: 0, counts_rows: first != b'[' };
    let mut list = List { place, progress: progress.clone(), sink, failure: None };
    let outcome = if first == b'[' {
        let mut reader = serde_json::Deserializer::from_reader(Followed { reader, progress });
        serde::Deserializer::deserialize_seq(&mut reader, &mut list).and_then(|()| reader.end())
    } else {
        let mut whole = String::new();
        reader.take(OBJECT_BYTES + 1).read_to_string(&mut whole).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidData => Error::input(format!("{}: expected UTF-8 text", path.display())),
            _ => failed(error),
        })?;
        if whole.len() as u64 > OBJECT_BYTES {
            return Err(Error::input(format!(
                "{}: expected a JSON object of at most {} MiB, got a longer one",
                path.display(),
                OBJECT_BYTES >> 20
            ))
            .hint("an object is read whole; one row a line (JSONL), or a list of rows, can have any size"));
        }
        serde_json::from_str(&whole).map(|whole| list.failure = list.of_object(whole).err())
    };
    match (list.failure, outcome) {
        (Some(failure), _) => Err(failure),
        (None, Ok(())) => Ok(()),
        (None, Err(error)) => Err(Error::input(format!(
            "{}:{}:{}: expected a JSON list of rows, got {}",
            path.display(),
            before + error.line() as u64,
            error.column(),
            reason(&error)
        ))),
    }
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&byte| byte == b'\n').count() as u64
}

/// How far a JSON list was read; the reader takes one byte at a time.
struct Progress {
    /// The line that is being read.
    line: Cell<u64>,
    /// Bytes since the last row began.
    bytes: Cell<u64>,
}

/// Follows the reading, and ends it in a row that is longer than any row may be.
struct Followed<R> {
    reader: R,
    progress: Rc<Progress>,
}

impl<R: Read> Read for Followed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let Progress { line, bytes } = &*self.progress;
        let count = self.reader.read(buffer)?;
        line.set(line.get() + newlines(&buffer[..count]));
        bytes.set(bytes.get() + count as u64);
        if bytes.get() > LINE_BYTES {
            return Err(std::io::Error::other(format!("a row of more than {} MiB", LINE_BYTES >> 20)));
        }
        Ok(count)
    }
}

/// Hands the items of a JSON list over while it is parsed.
struct List<'a, 'b> {
    place: Place,
    progress: Rc<Progress>,
    sink: &'a mut Sink<'b>,
    failure: Option<Error>,
}

impl List<'_, '_> {
    fn hand_over(&mut self, item: Value, line: u64) -> Result<()> {
        self.place.line = line;
        (self.sink)(match item {
            Value::Object(columns) => Ok(Row { place: self.place.clone(), columns }),
            other => Err(BadRow {
                place: self.place.clone(),
                problem: format!("expected a JSON object, got {}", kind(&other)),
            }),
        })
    }

    fn of_object(&mut self, whole: Map<String, Value>) -> Result<()> {
        let lists: Vec<&String> = whole
            .iter()
            .filter(|(_, value)| matches!(value, Value::Array(items) if items.iter().all(Value::is_object)))
            .map(|(key, _)| key)
            .collect();
        match lists.as_slice() {
            // a single row, which has a list of messages of its own
            [key] if !matches!(key.as_str(), "messages" | "conversations" | "prompt" | "chosen") => {
                let key = (*key).clone();
                let Some(Value::Array(items)) =
                    whole.into_iter().find(|(name, _)| *name == key).map(|(_, value)| value)
                else {
                    return Ok(());
                };
                items.into_iter().zip(1..).try_for_each(|(item, row)| self.hand_over(item, row))
            }
            _ => self.hand_over(Value::Object(whole), 1),
        }
    }
}

impl<'de> DeserializeSeed<'de> for &mut List<'_, '_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for &mut List<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while let Some((item, line)) = items.next_element_seed(WithLine(&self.progress.clone()))? {
            if let Err(failure) = self.hand_over(item, line) {
                self.failure = Some(failure);
                return Err(serde::de::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}

/// An item, and the line that it begins in.
struct WithLine<'a>(&'a Progress);

impl<'de> DeserializeSeed<'de> for WithLine<'_> {
    type Value = (Value, u64);

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        let line = self.0.line.get(); // the item's first byte has been looked at
        self.0.bytes.set(0);
        Ok((serde::Deserialize::deserialize(deserializer)?, line))
    }
}

fn csv_rows(path: &Arc<PathBuf>, file: File, separator: u8, sink: &mut Sink<'_>) -> Result<()> {
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).from_reader(BufReader::new(file));
    let whole = |error: &csv::Error| Error::input(format!("{}: expected a CSV header, got {error}", path.display()));
    let names: Vec<String> = reader.headers().map_err(|error| whole(&error))?.iter().map(str::to_owned).collect();
    for record in reader.into_records() {
        let line = |position: Option<&csv::Position>| position.map_or(0, csv::Position::line);
        let place = |line| Place { file: path.clone(), line, column: 0, counts_rows: false };
        sink(match record {
            Ok(record) => Ok(Row {
                place: place(line(record.position())),
                columns: names
                    .iter()
                    .zip(record.iter())
                    .filter(|(_, value)| !value.is_empty())
                    .map(|(name, value)| (name.clone(), csv_value(value)))
                    .collect(),
            }),
            Err(error) => {
                let at = line(error.position());
                let problem = match error.kind() {
                    csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                        format!("expected {expected_len} columns, got {len}")
                    }
                    csv::ErrorKind::Utf8 { err, .. } => format!("expected UTF-8 text, got {err}"),
                    csv::ErrorKind::Io(error) => return Err(Error::io(path, error)),
                    _ => format!("expected a CSV record, got {error}"),
                };
                Err(BadRow { place: place(at), problem })
            }
        })?;
    }
    Ok(())
}

/// A cell: text, or the list of messages that it holds as JSON.
fn csv_value(cell: &str) -> Value {
    match serde_json::from_str(cell) {
        Ok(list @ Value::Array(_)) if cell.trim_start().starts_with("[{") => list,
        _ => Value::String(cell.to_owned()),
    }
}

fn parquet_rows(path: &Arc<PathBuf>, file: File, sink: &mut Sink<'_>) -> Result<()> {
    let wrong = |what: String| {
        let what = what.replace("Parquet error: ", "");
        Error::input(format!("{}: expected a Parquet file, got {what}", path.display()))
    };
    let mut line = 0;
    // The library's decoder panics on some damaged pages; to the user that is a damaged file like any other.
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| -> Result<()> {
        let reader = SerializedFileReader::new(file).map_err(|error| wrong(error.to_string()))?;
        for row in reader.get_row_iter(None).map_err(|error| wrong(error.to_string()))? {
            line += 1;
            let place = Place { file: path.clone(), line, column: 0, counts_rows: true };
            let row = row.map_err(|error| wrong(format!("a damaged row {line}: {error}")))?;
            sink(match row.to_json_value() {
                Value::Object(columns) => {
                    Ok(Row { place, columns: columns.into_iter().filter(|(_, value)| !value.is_null()).collect() })
                }
                other => Err(BadRow { place, problem: format!("expected columns, got {}", kind(&other)) }),
            })?;
        }
        Ok(())
    }));
    outcome.unwrap_or_else(|_| Err(wrong(format!("damaged data after row {line}"))))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use std::io::{Seek, Write};

    fn read(name: &str, content: &[u8]) -> Result<Vec<Result<Row, BadRow>>> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        let format = match name {
            "csv" => Format::Csv(b','),
            "json" => Format::Json,
            "parquet" => Format::Parquet,
            "txt" => Format::Text,
            _ => Format::JsonLines,
        };
        let source = Source { path: Arc::new(PathBuf::from(name)), format, file };
        let mut found = Vec::new();
        rows(source, &mut |row| {
            found.push(row);
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn bad_lines_have_their_line_and_column() {
        let found = read("jsonl", b"{\"a\": 1}\n\n{\"a\": }\n[1]\n{\"a\": \"\xff\"}\n{\"b\": 2}").unwrap();
        let shown: Vec<String> = found
            .iter()
            .map(|row| match row {
                Ok(row) => format!("{} ok", row.place),
                Err(bad) => bad.to_string(),
            })
            .collect();
        assert_eq!(
            shown,
            [
                "jsonl:1 ok",
                "jsonl:3:7: expected a JSON object, got expected value",
                "jsonl:4:1: expected a JSON object, got a list",
                "jsonl:5:8: expected UTF-8 text, got the byte 0xff",
                "jsonl:6 ok",
            ]
        );
    }

    #[test]
    fn a_list_an_object_with_a_list_and_one_row_are_json() {
        assert_eq!(read("json", b" [{\"a\": 1}, {\"a\": 2}] ").unwrap().len(), 2);
        assert_eq!(read("json", b"{\"version\": 3, \"data\": [{\"a\": 1}, {\"a\": 2}, {}]}").unwrap().len(), 3);
        assert_eq!(read("json", b"{\n\"messages\": [{\"role\": \"user\"}]}").unwrap().len(), 1);
    }

    #[test]
    fn rows_of_a_json_list_have_the_line_they_begin_in() {
        let found = read("json", b"\n[\n{\n\"a\": 1}, {\"a\": 2},\n\n7\n, {\"a\":\n3}]").unwrap();
        let lines: Vec<u64> =
            found.iter().map(|row| row.as_ref().map_or_else(|bad| bad.place.line, |row| row.place.line)).collect();
        assert_eq!(lines, [3, 4, 6, 7]);
        assert_eq!(found[2].as_ref().unwrap_err().to_string(), "json:6: expected a JSON object, got a number");
    }

    #[test]
    fn a_row_of_a_json_list_has_a_limit_of_its_own() {
        let long = |size: usize| format!("{{\"a\": \"{}\"}}", "x".repeat(size));
        let half = long((LINE_BYTES / 2) as usize);
        assert_eq!(read("json", format!("[{half},{half},{half}]").as_bytes()).unwrap().len(), 3);
        let error = read("json", format!("[{{}},\n{}]", long(LINE_BYTES as usize)).as_bytes()).unwrap_err();
        assert!(error.message.ends_with("got a row of more than 64 MiB"), "{}", error.message);
    }

    #[test]
    fn a_json_object_has_a_limit() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"{").unwrap();
        file.set_len(OBJECT_BYTES + 2).unwrap(); // the rest is zeros, which take no room on the disk
        std::io::Seek::rewind(&mut file).unwrap();
        let path = Arc::new(PathBuf::from("object"));
        let error = json(&path, BufReader::new(file), &mut |_| Ok(())).unwrap_err();
        assert_eq!(error.message, "object: expected a JSON object of at most 256 MiB, got a longer one");
    }

    #[test]
    fn half_a_json_document_is_an_error_with_its_place() {
        let error = read("json", b"[{\"a\": 1},\n {\"a\": ").unwrap_err();
        assert_eq!(error.message, "json:2:7: expected a JSON list of rows, got EOF while parsing a value");
    }

    #[test]
    fn csv_counts_lines_and_columns() {
        let found = read("csv", b"prompt,completion\n\"a\nb\",c\nonly\nd,e\n").unwrap();
        assert_eq!(found[0].as_ref().unwrap().columns["prompt"], "a\nb");
        assert_eq!(found[1].as_ref().unwrap_err().to_string(), "csv:4: expected 2 columns, got 1");
        assert_eq!(found[2].as_ref().unwrap().place.line, 5);
    }

    #[test]
    fn a_text_is_one_row_as_it_is() {
        let found = read("txt", b"\xef\xbb\xbfOne.\r\n\n  Two.\n").unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].as_ref().unwrap().columns["text"], "One.\r\n\n  Two.\n");
        let found = read("txt", b"\xef\xbb\xbfOne.\n\nTw\xff.\n").unwrap();
        assert_eq!(found[0].as_ref().unwrap_err().to_string(), "txt:3: expected UTF-8 text, got the byte 0xff");
        let error = read("txt", "x".repeat(LINE_BYTES as usize + 1).as_bytes()).unwrap_err();
        assert_eq!(error.message, "txt: expected a text of at most 64 MiB, got a longer one");
    }

    proptest! {
        // Whatever the bytes are, reading ends, with rows or with an error in words.
        #[test]
        fn no_bytes_make_a_reader_panic(content in prop::collection::vec(any::<u8>(), 0..300), format in 0..5) {
            let name = ["jsonl", "json", "csv", "parquet", "txt"][format as usize];
            if let Err(error) = read(name, &content) {
                prop_assert!(error.message.contains("expected"), "{}", error.message);
            }
        }

        #[test]
        fn what_json_writes_is_read_back(rows in prop::collection::vec(prop::collection::hash_map("\\PC{0,9}", "\\PC*", 0..4), 0..6)) {
            let lines: String = rows.iter().map(|row| serde_json::to_string(row).unwrap() + "\n").collect();
            let list = serde_json::to_string(&rows).unwrap();
            for (name, content) in [("jsonl", lines), ("json", list)] {
                let found = read(name, content.as_bytes()).unwrap();
                prop_assert_eq!(found.len(), rows.len());
                for (row, expected) in found.into_iter().zip(&rows) {
                    prop_assert_eq!(Value::Object(row.unwrap().columns), serde_json::to_value(expected).unwrap());
                }
            }
        }
    }
}
