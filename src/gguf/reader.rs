//! Opening a file: everything is checked here, so that afterwards a tensor's bytes are a slice that exists.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::cursor::Cursor;
use super::metadata::Metadata;
use super::{DEFAULT_ALIGNMENT, MAGIC, MAX_DIMENSIONS};
use crate::error::{Error, Result};
use crate::quant::Kind;

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Its shape in torch's order: the last dimension is the contiguous one.
    pub shape: Vec<usize>,
    /// The format of its blocks.
    pub kind: Kind,
    /// Its bytes in the file.
    pub nbytes: usize,
    /// Where its bytes begin in the file.
    offset: usize,
}

impl TensorInfo {
    /// Number of values.
    pub fn len(&self) -> usize {
        // from the bytes, which are in the file; the product of the shape may overflow on its way to zero
        self.nbytes / self.kind.block_bytes() * self.kind.block_size()
    }

    /// Where its bytes begin in the file.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.nbytes == 0
    }
}

/// An open, memory-mapped and checked file.
///
/// The file must not be shortened while it is open: the operating system would end the process when bytes that are
/// gone are read. (The writer replaces files by renaming, which is safe.)
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
}

impl File {
    /// Opens and checks the file. Its tensor data isn't read.
    pub fn open(path: &Path) -> Result<Self> {
        let file = std::fs::File::open(path).map_err(|error| Error::io(path, &error))?;
        let kind = file.metadata().map_err(|error| Error::io(path, &error))?;
        if !kind.is_file() {
            return Err(Error::input(format!("{}: expected a GGUF file, got a directory or device", path.display())));
        }
        if kind.len() == 0 {
            return Err(Error::input(format!("{}: expected a GGUF file, got an empty file", path.display())));
        }
        // SAFETY: the map is read only; that nobody shortens the file meanwhile is the documented condition of use.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io(path, &error))?;
        let (metadata, tensors) = parse(&map)
            .map_err(|error| Error { message: format!("{}: {}", path.display(), error.message), ..error })?;
        Ok(Self { path: path.to_owned(), map, metadata, tensors })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says about itself.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// The bytes of a tensor of this file: whole blocks, `nbytes` of them.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        // an entry of another file gives what this file has there, at most nothing
        tensor.offset.checked_add(tensor.nbytes).and_then(|end| self.map.get(tensor.offset..end)).unwrap_or(&[])
    }

    /// Gives the pages of a tensor's bytes back to the system, which reads them again when they are asked for.
    pub fn let_go(&self, tensor: &TensorInfo) {
        #[cfg(unix)]
        if !self.data(tensor).is_empty() {
            // SAFETY: nobody writes to the map, so what is read again from the file is what was there.
            let advised = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, tensor.offset, tensor.nbytes)
            };
            drop(advised); // where the system doesn't take advice, it keeps the pages
        }
    }
}

/// Reads everything before the tensor data and checks that all tensor data is there.
pub(super) fn parse(bytes: &[u8]) -> Result<(Metadata, Vec<TensorInfo>)> {
    let mut cursor = Cursor::new(bytes);
    let magic = cursor.take(4, "magic")?;
    if magic != MAGIC {
        return Err(Error::input(format!(
            "expected a GGUF file that begins with \"GGUF\", got {:?}",
            String::from_utf8_lossy(magic)
        )));
    }
    let version = cursor.u32("version")?;
    if version & 0xffff == 0 && version != 0 {
        return Err(Error::input(format!(
            "expected little-endian GGUF, got big-endian (version {})",
            version.swap_bytes()
        ))
        .hint("convert the file with gguf_convert_endian of the `gguf` package"));
    }
    if !(2..=3).contains(&version) {
        return Err(Error::input(format!("expected GGUF version 2 or 3, got {version}")));
    }
    let tensor_count = cursor.u64("number of tensors")?;
    let entry_count = cursor.u64("number of metadata entries")?;
    let metadata = Metadata::read(&mut cursor, entry_count)?;
    if let Some(count) = metadata.u32("split.count")?.filter(|&count| count > 1) {
        return Err(Error::input(format!("expected the whole model in one file, got one of {count} parts"))
            .hint("join the parts with llama.cpp's llama-gguf-split --merge"));
    }
    let alignment = match metadata.u32("general.alignment")? {
        Some(value) if value.is_power_of_two() => u64::from(value),
        Some(value) => {
            return Err(Error::input(format!("metadata \"general.alignment\": expected a power of two, got {value}")));
        }
        None => DEFAULT_ALIGNMENT,
    };
    let entries = read_entries(&mut cursor, tensor_count)?;
    let data_start = (cursor.at as u64).next_multiple_of(alignment); // both far below 2^63: a file's size and 2^31
    let tensors = locate(entries, data_start, bytes.len() as u64, alignment)?;
    check_apart(&tensors)?;
    Ok((metadata, tensors))
}

/// A tensor's entry as it stands in the file.
struct Entry {
    name: String,
    shape: Vec<usize>,
    kind: Kind,
    nbytes: u64,
    offset: u64,
}

fn read_entries(cursor: &mut Cursor<'_>, count: u64) -> Result<Vec<Entry>> {
    // the least entry: an empty name's length, number of dimensions, type, offset
    let count = cursor.expect_items(count, 8 + 4 + 4 + 8, "number of tensors")?;
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    for number in 0..count {
        let name = cursor.string(format_args!("name of tensor {number}"))?;
        if !names.insert(name) {
            return Err(Error::input(format!("tensor {name:?}: expected the name once, got it twice")));
        }
        entries.push(read_entry(cursor, name)?);
    }
    Ok(entries)
}

fn read_entry(cursor: &mut Cursor<'_>, name: &str) -> Result<Entry> {
    let what = format_args!("tensor {name:?}").to_string();
    let dimensions = cursor.u32(&what)?;
    if dimensions > MAX_DIMENSIONS {
        return Err(Error::input(format!("{what}: expected at most {MAX_DIMENSIONS} dimensions, got {dimensions}")));
    }
    let sizes = (0..dimensions).map(|_| cursor.u64(&what)).collect::<Result<Vec<_>>>()?;
    let id = cursor.u32(&what)?;
    let kind = Kind::from_id(id).ok_or_else(|| {
        let known = Kind::ALL.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
        let got = Kind::unread_name(id).map_or_else(String::new, |name| format!(" ({name})"));
        Error::input(format!("{what}: expected one of the block formats {known}, got type {id}{got}"))
    })?;
    let offset = cursor.u64(&what)?;
    let too_large = || Error::input(format!("{what}: expected a size below 2^63 bytes, got the dimensions {sizes:?}"));
    let values = sizes.iter().try_fold(1u64, |product, &size| product.checked_mul(size)).ok_or_else(too_large)?;
    let row = sizes.first().copied().unwrap_or(1);
    if !row.is_multiple_of(kind.block_size() as u64) {
        return Err(Error::input(format!(
            "{what}: expected rows of a multiple of {} values for {}, got {row}",
            kind.block_size(),
            kind.name()
        )));
    }
    let nbytes = (values / kind.block_size() as u64)
        .checked_mul(kind.block_bytes() as u64)
        .filter(|&bytes| bytes < 1 << 63)
        .ok_or_else(too_large)?;
    let shape = sizes.iter().rev().map(|&size| usize::try_from(size)).collect::<Result<_, _>>();
    Ok(Entry { name: name.to_owned(), shape: shape.map_err(|_| too_large())?, kind, nbytes, offset })
}

/// Turns offsets relative to the data into places in the file, which must have them.
fn locate(entries: Vec<Entry>, data_start: u64, file_bytes: u64, alignment: u64) -> Result<Vec<TensorInfo>> {
    entries
        .into_iter()
        .map(|entry| {
            if !entry.offset.is_multiple_of(alignment) {
                return Err(Error::input(format!(
                    "tensor {:?}: expected an offset that is a multiple of {alignment}, got {}",
                    entry.name, entry.offset
                )));
            }
            let start = data_start.checked_add(entry.offset);
            let end = start.and_then(|start| start.checked_add(entry.nbytes)).filter(|&end| end <= file_bytes);
            let (Some(start), Some(_)) = (start, end) else {
                return Err(Error::input(format!(
                    "tensor {:?}: expected its {} bytes inside the file of {file_bytes}, got offset {} from {data_start}",
                    entry.name, entry.nbytes, entry.offset
                ))
                .hint("the file is truncated or damaged: compare its size with the original's"));
            };
            // both at most the size of a file that is mapped, which is a usize
            let (offset, nbytes) = (start as usize, entry.nbytes as usize);
            Ok(TensorInfo { name: entry.name, shape: entry.shape, kind: entry.kind, nbytes, offset })
        })
        .collect()
}

/// No two tensors share bytes: otherwise a small file could claim any amount of weights.
fn check_apart(tensors: &[TensorInfo]) -> Result<()> {
    let mut order: Vec<&TensorInfo> = tensors.iter().filter(|tensor| tensor.nbytes > 0).collect();
    order.sort_by_key(|tensor| tensor.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].nbytes > pair[1].offset {
            return Err(Error::input(format!(
                "tensors {:?} and {:?}: expected bytes of their own, got overlapping ones: {} bytes at {} and {} at {}",
                pair[0].name, pair[1].name, pair[0].nbytes, pair[0].offset, pair[1].nbytes, pair[1].offset
            )));
        }
    }
    Ok(())
}
