//! Which files a dataset is, and what format each has: by its first bytes, then by its name.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::rows::LINE_BYTES;
use crate::error::{Error, Result};

/// The format of a file of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON object a line.
    JsonLines,
    /// One JSON document: a list of rows, or an object with one.
    Json,
    /// Comma- or tab-separated values with a header; the separator.
    Csv(u8),
    /// Apache Parquet.
    Parquet,
    /// Plain text: the whole file is one row.
    Text,
}

/// A file of rows, open.
#[derive(Debug)]
pub struct Source {
    /// Its name, for messages.
    pub path: Arc<PathBuf>,
    /// Its format.
    pub format: Format,
    /// The file, at its beginning.
    pub file: File,
}

const EXTENSIONS: &str = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet or .txt";

/// The files of `path`: itself, the files below it in the order of their names, or standard input for `-`.
///
/// Plain text counts only in a folder that has no other rows: beside rows it is a licence or a note about them.
pub fn open(path: &Path) -> Result<Vec<Source>> {
    if path.as_os_str() == "-" {
        return Ok(vec![standard_input()?]);
    }
    if !path.is_dir() {
        return Ok(vec![open_file(path)?]);
    }
    let mut files = Vec::new();
    walk(path, &mut files, 0)?;
    if files.is_empty() {
        return Err(Error::input(format!("{}: expected files of rows ({EXTENSIONS}), got none", path.display())));
    }
    let is_text = |file: &PathBuf| by_name(file) == Some(Format::Text);
    if !files.iter().all(is_text) {
        files.retain(|file| !is_text(file));
    }
    files.sort();
    files.iter().map(|file| open_file(file)).collect()
}

/// A hash of the sources' contents and formats, whatever their names are.
pub fn fingerprint(sources: &mut [Source]) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for source in sources {
        let mut content = blake3::Hasher::new();
        content.update_reader(&mut source.file).map_err(|error| Error::io(&source.path, &error))?;
        source.file.seek(SeekFrom::Start(0)).map_err(|error| Error::io(&source.path, &error))?;
        hasher.update(format!("{:?} {}\n", source.format, content.finalize()).as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>, depth: usize) -> Result<()> {
    if depth > 16 {
        return Err(Error::input(format!("{}: expected at most 16 levels of folders", folder.display())));
    }
    for entry in std::fs::read_dir(folder).map_err(|error| Error::io(folder, &error))? {
        let path = entry.map_err(|error| Error::io(folder, &error))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() {
            walk(&path, files, depth + 1)?;
        } else if by_name(&path).is_some() {
            files.push(path);
        }
    }
    Ok(())
}

fn open_file(path: &Path) -> Result<Source> {
    let file = File::open(path).map_err(|error| Error::io(path, &error))?;
    let metadata = file.metadata().map_err(|error| Error::io(path, &error))?;
    if !metadata.is_file() {
        return Err(Error::input(format!("{}: expected a file or a folder, got something else", path.display())));
    }
    recognised(path.to_owned(), file)
}

fn standard_input() -> Result<Source> {
    let name = PathBuf::from("standard input");
    // two passes over the rows need a file; it has no name and goes with its last handle
    let mut file = tempfile::tempfile().map_err(|error| Error::io(&name, &error))?;
    std::io::copy(&mut std::io::stdin().lock(), &mut file).map_err(|error| Error::io(&name, &error))?;
    recognised(name, file)
}

fn recognised(path: PathBuf, mut file: File) -> Result<Source> {
    let failed = |error: std::io::Error| Error::io(&path, &error);
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let mut head = Vec::new();
    (&mut file).take(4096).read_to_end(&mut head).map_err(failed)?;
    if let Some(first) = head.iter().position(|byte| !byte.is_ascii_whitespace()).filter(|&at| head[at] == b'{') {
        // whether an object ends with its line takes the whole line to tell
        file.seek(SeekFrom::Start(first as u64)).map_err(failed)?;
        head.clear();
        let mut line = BufReader::new(&mut file).take(LINE_BYTES);
        line.read_until(b'\n', &mut head).map_err(failed)?;
        line.take(1).read_to_end(&mut head).map_err(failed)?;
    }
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let format = format_of(&path, &head)?;
    Ok(Source { path: Arc::new(path), format, file })
}

fn by_name(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "jsonl" | "ndjson" => Some(Format::JsonLines),
        "json" => Some(Format::Json),
        "csv" => Some(Format::Csv(b',')),
        "tsv" => Some(Format::Csv(b'\t')),
        "parquet" => Some(Format::Parquet),
        "txt" => Some(Format::Text),
        _ => None,
    }
}

fn format_of(path: &Path, head: &[u8]) -> Result<Format> {
    let name = path.display();
    if head.starts_with(b"PAR1") {
        return Ok(Format::Parquet);
    }
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    let Some(&first) = text.iter().find(|byte| !byte.is_ascii_whitespace()) else {
        return Err(Error::input(format!("{name}: expected rows, got an empty file")));
    };
    if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") {
        return Err(Error::input(format!("{name}: expected UTF-8 text, got UTF-16 (a byte order mark)"))
            .hint(format!("iconv -f UTF-16 -t UTF-8 {name} > converted.jsonl")));
    }
    if head.starts_with(b"\x1f\x8b") || head.starts_with(b"\x28\xb5\x2f\xfd") || head.starts_with(b"PK\x03\x04") {
        return Err(Error::input(format!("{name}: expected rows, got a compressed file")).hint("decompress it first"));
    }
    if let Some(at) = head.iter().position(|&byte| byte == 0) {
        return Err(Error::input(format!("{name}: expected text, got a binary file (a zero byte at offset {at})")));
    }
    match by_name(path) {
        Some(Format::Parquet) => {
            Err(Error::input(format!("{name}: expected a Parquet file, got one that doesn't begin with PAR1")))
        }
        Some(Format::Text) if !begins_as_json(text) => Ok(Format::Text),
        Some(Format::Text) if first == b'[' => Ok(Format::Json),
        Some(Format::Text) => Ok(whole_or_lines(text)),
        // many a `.json` has one object a line, and some a `.jsonl` is one list
        Some(Format::Json | Format::JsonLines) | None if first == b'[' => Ok(Format::Json),
        Some(Format::Json) | None if first == b'{' => Ok(whole_or_lines(text)),
        Some(format) => Ok(format),
        None => Err(Error::input(format!("{name}: expected a file of rows ({EXTENSIONS}), got something else"))),
    }
}

/// Whether text begins as rows of JSON do, `{"` or `[{`, which prose hardly does.
fn begins_as_json(text: &[u8]) -> bool {
    let mut bytes = text.iter().filter(|byte| !byte.is_ascii_whitespace());
    matches!((bytes.next(), bytes.next()), (Some(b'{'), Some(b'"')) | (Some(b'['), Some(b'{')))
}

/// Whether text that begins with `{` has an object a line, or is one object: its first line is no object, or all there is.
fn whole_or_lines(text: &[u8]) -> Format {
    let first = text.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let alone = text[first.len()..].trim_ascii().is_empty();
    if !alone && serde_json::from_slice::<serde::de::IgnoredAny>(first).is_ok() {
        Format::JsonLines
    } else {
        Format::Json
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(name: &str, head: &[u8]) -> Result<Format> {
        format_of(Path::new(name), head)
    }

    #[test]
    fn content_wins_over_the_name() {
        assert_eq!(format("a.json", b"{\"text\": 1}\n{\"text\": 2}\n").unwrap(), Format::JsonLines);
        assert_eq!(format("a.json", b"{\n \"data\": []}").unwrap(), Format::Json);
        assert_eq!(format("a.json", b"{\"data\": []}\n").unwrap(), Format::Json);
        assert_eq!(format("a.jsonl", b" [{}]").unwrap(), Format::Json);
        assert_eq!(format("a.csv", b"PAR1...").unwrap(), Format::Parquet);
        assert_eq!(format("a.csv", b"{x}, y\n").unwrap(), Format::Csv(b','));
        assert_eq!(format("a.txt", b"{\"text\": 1}\n{\"text\": 2}\n").unwrap(), Format::JsonLines);
        assert_eq!(format("a.txt", b"[{\"text\": 1}]").unwrap(), Format::Json);
        assert_eq!(format("a.txt", b"{x} is a set\n").unwrap(), Format::Text);
        assert_eq!(format("a.txt", b"[1] A note.\n").unwrap(), Format::Text);
        assert_eq!(format("a.txt", b"hello").unwrap(), Format::Text);
        assert_eq!(format("standard input", b"{\"text\": 1}\n{").unwrap(), Format::JsonLines);
    }

    #[test]
    fn what_is_no_text_is_refused_with_a_reason() {
        for (head, reason) in [
            (&b""[..], "empty"),
            (b" \n\n", "empty"),
            (b"\xff\xfe{\0", "UTF-16"),
            (b"\x1f\x8b\x08", "compressed"),
            (b"{\"a\": \0", "binary"),
            (b"hello", "expected a file of rows"),
        ] {
            let error = format("rows", head).unwrap_err();
            assert!(error.message.contains(reason), "{}", error.message);
        }
    }
}
