//! Writing a file, tensor by tensor, so that it is there whole or not at all.

use std::fs::File as SystemFile;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::metadata::types;
use super::{Array, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMENSIONS, Value};
use crate::error::{Error, Result};
use crate::quant::Kind;

/// A tensor that a file will hold.
#[derive(Clone, Debug)]
pub struct Declared {
    /// Its name.
    pub name: String,
    /// Its shape in torch's order.
    pub shape: Vec<usize>,
    /// The format of its blocks.
    pub kind: Kind,
}

impl Declared {
    /// The bytes of its blocks.
    ///
    /// # Errors
    /// Its rows don't divide into blocks, it has too many dimensions, or more bytes than an address can say.
    pub fn nbytes(&self) -> Result<usize> {
        let Self { name, shape, kind } = self;
        if shape.len() > MAX_DIMENSIONS as usize {
            return Err(Error::input(format!(
                "tensor {name:?}: expected at most {MAX_DIMENSIONS} dimensions, got {}",
                shape.len()
            )));
        }
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(kind.block_size()) {
            return Err(Error::input(format!(
                "tensor {name:?}: expected rows of a multiple of {} values for {}, got {row}",
                kind.block_size(),
                kind.name()
            )));
        }
        let values = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        values.and_then(|values| (values / kind.block_size()).checked_mul(kind.block_bytes())).ok_or_else(|| {
            Error::input(format!("tensor {name:?}: expected a size below 2^63 bytes, got the shape {shape:?}"))
        })
    }
}

/// Writes a file: everything is declared first, then the tensors' bytes follow in the order of their declaration.
///
/// The bytes go to a temporary file beside the target, which takes its name in [`Writer::finish`]. A writer that is
/// dropped before leaves nothing behind.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    overwrite: bool,
    file: BufWriter<NamedTempFile>,
    tensors: Vec<(String, usize)>,
    /// Index of the tensor that bytes go to now, and how many it has already.
    at: (usize, usize),
    position: u64,
}

impl Writer {
    /// Starts a file with its metadata and the entries of its tensors.
    ///
    /// # Errors
    /// The target exists and may not be overwritten, a key or name comes twice, a tensor's shape doesn't fit its format,
    /// or the file can't be written.
    pub fn create(path: &Path, overwrite: bool, metadata: &[(String, Value)], tensors: &[Declared]) -> Result<Self> {
        if !overwrite && path.symlink_metadata().is_ok() {
            return Err(exists(path));
        }
        if path.is_dir() {
            return Err(Error::input(format!("{}: expected the path of a file, got a directory", path.display())));
        }
        check_unique("metadata", metadata.iter().map(|(key, _)| key))?;
        check_unique("tensor", tensors.iter().map(|tensor| &tensor.name))?;
        let sizes = tensors.iter().map(Declared::nbytes).collect::<Result<Vec<_>>>()?;
        let header = header(metadata, tensors, &sizes)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = temporary(folder).map_err(|error| Error::io(path, &error))?;
        let tensors = tensors.iter().map(|tensor| tensor.name.clone()).zip(sizes).collect();
        let mut writer = Self {
            path: path.to_owned(),
            overwrite,
            file: BufWriter::with_capacity(1 << 20, file),
            tensors,
            at: (0, 0),
            position: 0,
        };
        writer.put(&header)?;
        writer.pad()?;
        writer.skip_empty()?;
        Ok(writer)
    }

    /// Adds bytes to the tensor `name`, which must be the next that isn't complete.
    ///
    /// # Errors
    /// Another tensor comes next, the bytes are more than it has left, or the file can't be written.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (index, written) = self.at;
        let Some((expected, size)) = self.tensors.get(index) else {
            return Err(Error::failure(format!("expected no tensor after the last, got {name:?}")));
        };
        if expected != name || bytes.len() > size - written {
            return Err(Error::failure(format!(
                "expected at most {} bytes of tensor {expected:?}, got {} of {name:?}",
                size - written,
                bytes.len()
            )));
        }
        self.put(bytes)?;
        self.at.1 += bytes.len();
        self.skip_empty()
    }

    /// Syncs the file to the disk and gives it its name.
    ///
    /// # Errors
    /// A tensor isn't complete, the target came to exist meanwhile, or the file can't be written.
    pub fn finish(mut self) -> Result<u64> {
        if let Some((name, size)) = self.tensors.get(self.at.0) {
            return Err(Error::failure(format!("expected {size} bytes of tensor {name:?}, got {}", self.at.1)));
        }
        self.file.flush().map_err(|error| Error::io(&self.path, &error))?;
        let path = self.path;
        let file = self.file.into_inner().map_err(|error| Error::io(&path, error.error()))?;
        file.as_file().sync_all().map_err(|error| Error::io(&path, &error))?;
        let renamed = if self.overwrite { file.persist(&path) } else { file.persist_noclobber(&path) };
        renamed.map_err(|error| match error.error.kind() {
            std::io::ErrorKind::AlreadyExists => exists(&path),
            _ => Error::io(&path, &error.error),
        })?;
        // the new name is safe once its folder is; where folders can't be synced, the system does so by itself
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            let _ = SystemFile::open(folder).and_then(|folder| folder.sync_all());
        }
        Ok(self.position)
    }

    /// Goes on to the next tensor that lacks bytes, padding each that is complete.
    fn skip_empty(&mut self) -> Result<()> {
        while self.tensors.get(self.at.0).is_some_and(|(_, size)| *size == self.at.1) {
            self.pad()?;
            self.at = (self.at.0 + 1, 0);
        }
        Ok(())
    }

    fn pad(&mut self) -> Result<()> {
        let missing = self.position.next_multiple_of(DEFAULT_ALIGNMENT) - self.position;
        self.put(&vec![0; missing as usize]) // below the alignment
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io(&self.path, &error))?;
        self.position += bytes.len() as u64;
        Ok(())
    }
}

fn exists(path: &Path) -> Error {
    Error::input(format!("{}: expected a path that is free, got one that exists", path.display()))
        .hint("--overwrite replaces it")
}

/// A temporary file beside the target, with the permissions that a new file has.
fn temporary(folder: &Path) -> std::io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".ftkit-").suffix(".gguf.tmp");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666)); // the process's mask applies
    }
    builder.tempfile_in(folder)
}

fn check_unique<'a>(what: &str, names: impl Iterator<Item = &'a String>) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    for name in names {
        if name.is_empty() {
            return Err(Error::input(format!("{what}: expected a name, got an empty one")));
        }
        if !seen.insert(name) {
            return Err(Error::input(format!("{what} {name:?}: expected the name once, got it twice")));
        }
    }
    Ok(())
}

fn header(metadata: &[(String, Value)], tensors: &[Declared], sizes: &[usize]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        if key == "general.alignment" {
            return Err(Error::failure("metadata \"general.alignment\": expected the writer's own, got one to write"));
        }
        put_string(&mut out, key);
        put_value(&mut out, value);
    }
    let mut offset = 0u64;
    for (tensor, &size) in tensors.iter().zip(sizes) {
        put_string(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for &size in tensor.shape.iter().rev() {
            out.extend((size as u64).to_le_bytes());
        }
        out.extend(tensor.kind.id().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset = offset
            .checked_add(size as u64)
            .and_then(|end| end.checked_next_multiple_of(DEFAULT_ALIGNMENT))
            .ok_or_else(|| Error::input("tensors: expected a sum below 2^64 bytes, got more"))?;
    }
    Ok(out)
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    macro_rules! number {
        ($kind:expr, $value:expr) => {{
            out.extend($kind.to_le_bytes());
            out.extend($value.to_le_bytes());
        }};
    }
    match value {
        Value::U8(value) => number!(types::U8, value),
        Value::I8(value) => number!(types::I8, value),
        Value::U16(value) => number!(types::U16, value),
        Value::I16(value) => number!(types::I16, value),
        Value::U32(value) => number!(types::U32, value),
        Value::I32(value) => number!(types::I32, value),
        Value::F32(value) => number!(types::F32, value),
        Value::Bool(value) => number!(types::BOOL, u8::from(*value)),
        Value::U64(value) => number!(types::U64, value),
        Value::I64(value) => number!(types::I64, value),
        Value::F64(value) => number!(types::F64, value),
        Value::String(value) => {
            out.extend(types::STRING.to_le_bytes());
            put_string(out, value);
        }
        Value::Array(value) => {
            out.extend(types::ARRAY.to_le_bytes());
            put_array(out, value);
        }
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    let length = array.len() as u64;
    macro_rules! numbers {
        ($kind:expr, $items:expr) => {{
            out.extend($kind.to_le_bytes());
            out.extend(length.to_le_bytes());
            out.extend($items.iter().flat_map(|item| item.to_le_bytes()));
        }};
    }
    match array {
        Array::U8(items) => numbers!(types::U8, items),
        Array::I8(items) => numbers!(types::I8, items),
        Array::U16(items) => numbers!(types::U16, items),
        Array::I16(items) => numbers!(types::I16, items),
        Array::U32(items) => numbers!(types::U32, items),
        Array::I32(items) => numbers!(types::I32, items),
        Array::F32(items) => numbers!(types::F32, items),
        Array::Bool(items) => numbers!(types::BOOL, items.iter().map(|&item| u8::from(item)).collect::<Vec<_>>()),
        Array::U64(items) => numbers!(types::U64, items),
        Array::I64(items) => numbers!(types::I64, items),
        Array::F64(items) => numbers!(types::F64, items),
        Array::String(items) => {
            out.extend(types::STRING.to_le_bytes());
            out.extend(length.to_le_bytes());
            for item in items {
                put_string(out, item);
            }
        }
        Array::Array(items) => {
            out.extend(types::ARRAY.to_le_bytes());
            out.extend(length.to_le_bytes());
            for item in items {
                put_array(out, item);
            }
        }
    }
}
