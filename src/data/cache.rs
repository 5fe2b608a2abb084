//! The cache of a prepared dataset: its sequences in two files, mapped into memory, there whole or not at all.
//!
//! `tokens.bin` has one u32 a token: the id, with the highest bit set where the token is trained on. `index.bin` has one
//! [`Sequence`] a sequence. `meta.json` has the counts and the hashes of both; a cache that doesn't match them is
//! made anew.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytemuck::{Pod, Zeroable};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::encode::Tokens;
use super::statistics::Statistics;
use crate::error::{Error, Result};

const TOKENS: &str = "tokens.bin";
const INDEX: &str = "index.bin";
const META: &str = "meta.json";
/// How the folder of a cache that is not yet whole begins.
const MAKING: &str = ".making-";
/// Set in a token that is trained on.
const TRAINED: u32 = 1 << 31;

/// Where a sequence stands in `tokens.bin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Sequence {
    /// Its first token.
    pub start: u64,
    /// Its unit's content, hashed: equal for equal rows.
    pub content: u64,
    /// Its tokens.
    pub length: u32,
    /// Its unit: sequences that stay in one row, numbered from 0 in the order of the file.
    pub unit: u32,
    /// Its task: 1 for an answer that is not wanted, and for a rationale; or the number of its name in [`Cache::tasks`].
    pub task: u32,
    /// How many tokens it has in common with its unit's first sequence, all before the first that predicts one it learns.
    pub shared: u32,
}

#[derive(Serialize, Deserialize)]
struct Meta {
    key: String,
    statistics: Statistics,
    tasks: Vec<String>,
    tokens_hash: String,
    index_hash: String,
}

/// An open cache.
#[derive(Debug)]
pub struct Cache {
    tokens: Option<Mmap>,
    index: Vec<Sequence>,
    /// What was counted when it was made.
    pub statistics: Statistics,
    /// The names of tasks, where they were asked for.
    pub tasks: Vec<String>,
    /// What it was made from, hashed.
    pub key: String,
}

impl Cache {
    /// Opens the cache in `folder`; `None` when there is none, or it is not what was written.
    pub fn open(folder: &Path, key: &str) -> Option<Self> {
        let meta: Meta = serde_json::from_slice(&fs::read(folder.join(META)).ok()?).ok()?;
        // Read, not mapped: checking must not leave the whole file among the process' resident pages.
        let tokens = blake3::Hasher::new().update_reader(File::open(folder.join(TOKENS)).ok()?).ok()?.finalize();
        let index = fs::read(folder.join(INDEX)).ok()?;
        let whole = meta.key == key
            && tokens.to_hex().as_str() == meta.tokens_hash
            && blake3::hash(&index).to_hex().as_str() == meta.index_hash;
        let tokens = map(&folder.join(TOKENS)).ok()?;
        let index = bytemuck::try_cast_slice::<u8, Sequence>(&index)
            .map(<[Sequence]>::to_vec)
            .or_else(|_| unaligned(&index))
            .ok()?;
        whole.then_some(Self { tokens, index, statistics: meta.statistics, tasks: meta.tasks, key: meta.key })
    }

    /// The sequences, in the order of the files.
    pub fn sequences(&self) -> &[Sequence] {
        &self.index
    }

    /// A sequence's tokens: ids, and whether they are trained on.
    pub fn tokens(&self, sequence: &Sequence) -> impl ExactSizeIterator<Item = (u32, bool)> + '_ {
        let all: &[u32] = bytemuck::try_cast_slice(self.tokens.as_deref().unwrap_or_default()).unwrap_or_default();
        let start = usize::try_from(sequence.start).unwrap_or(usize::MAX);
        let end = start.saturating_add(sequence.length as usize);
        all.get(start..end).unwrap_or_default().iter().map(|&token| (token & !TRAINED, token & TRAINED != 0))
    }
}

fn unaligned(bytes: &[u8]) -> Result<Vec<Sequence>> {
    let size = size_of::<Sequence>();
    if !bytes.len().is_multiple_of(size) {
        return Err(Error::failure("an index of sequences that ends in the middle of one"));
    }
    Ok(bytes.chunks_exact(size).map(bytemuck::pod_read_unaligned).collect())
}

/// Maps a file; an empty one cannot be mapped and is `None`.
fn map(path: &Path) -> std::io::Result<Option<Mmap>> {
    let file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(None);
    }
    // SAFETY: the file was written whole and renamed into place, and nobody writes to it afterwards; a stranger who
    // cuts it while we read can end the process, but not make it read other memory.
    unsafe { Mmap::map(&file) }.map(Some)
}

/// Writes a cache next to its final place, and puts it there when it is whole.
pub(super) struct Writer {
    folder: tempfile::TempDir,
    place: PathBuf,
    tokens: Hashed,
    index: Hashed,
    written: u64,
    units: u32,
}

/// A file that is hashed while it is written.
struct Hashed {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
}

impl Hashed {
    fn create(path: PathBuf) -> Result<Self> {
        let file = File::create_new(&path).map_err(|error| Error::io(&path, &error))?;
        Ok(Self { path, file: BufWriter::with_capacity(1 << 20, file), hasher: blake3::Hasher::new() })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(|error| Error::io(&self.path, &error))
    }

    fn finish(mut self) -> Result<String> {
        let done = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        done.map_err(|error| Error::io(&self.path, &error))?;
        Ok(self.hasher.finalize().to_hex().to_string())
    }
}

impl Writer {
    /// A writer for the cache at `place`.
    pub fn create(place: &Path) -> Result<Self> {
        let parent = place.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(|error| Error::io(parent, &error))?;
        sweep(parent);
        let folder = tempfile::Builder::new().prefix(MAKING).tempdir_in(parent);
        let folder = folder.map_err(|error| Error::io(parent, &error))?;
        let tokens = Hashed::create(folder.path().join(TOKENS))?;
        // held until the file is closed, even by a kill; a file system without locks leaves remains, no more
        let _ = tokens.file.get_ref().try_lock();
        Ok(Self {
            tokens,
            index: Hashed::create(folder.path().join(INDEX))?,
            folder,
            place: place.to_owned(),
            written: 0,
            units: 0,
        })
    }

    /// Appends a unit.
    pub fn unit(&mut self, sequences: &[Tokens], content: u64) -> Result<()> {
        for sequence in sequences {
            let pairs = sequence.ids.iter().zip(&sequence.trained);
            let tokens: Vec<u32> = pairs.map(|(&id, &trained)| id | if trained { TRAINED } else { 0 }).collect();
            let length =
                u32::try_from(tokens.len()).map_err(|_| Error::input("a sequence of more than 2^32 tokens"))?;
            let entry = Sequence {
                start: self.written,
                content,
                length,
                unit: self.units,
                task: sequence.task,
                shared: sequence.shared,
            };
            self.tokens.write(bytemuck::cast_slice(&tokens))?;
            self.index.write(bytemuck::bytes_of(&entry))?;
            self.written += u64::from(length);
        }
        self.units = self.units.checked_add(1).ok_or_else(|| Error::input("expected at most 2^32 rows, got more"))?;
        Ok(())
    }

    /// Syncs everything and puts the cache in its place.
    pub fn finish(self, key: &str, statistics: &Statistics, tasks: Vec<String>) -> Result<()> {
        let meta = Meta {
            key: key.to_owned(),
            statistics: statistics.clone(),
            tasks,
            tokens_hash: self.tokens.finish()?,
            index_hash: self.index.finish()?,
        };
        let mut file = Hashed::create(self.folder.path().join(META))?;
        file.write(&serde_json::to_vec_pretty(&meta).map_err(|error| Error::failure(error.to_string()))?)?;
        file.finish()?;
        let made = self.folder.keep();
        let moved = fs::rename(&made, &self.place).or_else(|_| {
            // something is in its place: an older cache that is no longer whole, or another process' equal one
            fs::remove_dir_all(&self.place).and_then(|()| fs::rename(&made, &self.place))
        });
        moved.map_err(|error| {
            let _ = fs::remove_dir_all(&made); // the error that counts is the other one
            Error::io(&self.place, &error)
        })
    }
}

/// Removes what killed processes left unfinished in `parent`: older than a minute, and locked by nobody.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(MAKING)) {
        let age = entry.metadata().and_then(|about| about.modified()).ok().and_then(|time| time.elapsed().ok());
        let tokens = File::open(entry.path().join(TOKENS));
        if age.is_some_and(|age| age > Duration::from_secs(60)) && tokens.is_ok_and(|file| file.try_lock().is_ok()) {
            let _ = fs::remove_dir_all(entry.path()); // if it can't be removed, it stays
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn tokens(ids: &[u32]) -> Tokens {
        let mut tokens = Tokens { trained: ids.iter().map(|id| id % 2 == 0).collect(), ..Tokens::default() };
        tokens.ids = ids.to_vec();
        tokens
    }

    fn written(place: &Path) {
        let mut writer = Writer::create(place).unwrap();
        writer.unit(&[tokens(&[1, 2, 3])], 7).unwrap();
        writer.unit(&[tokens(&[4]), tokens(&[5, 6])], 8).unwrap();
        writer.finish("key", &Statistics { rows: 2, ..Statistics::default() }, vec!["a".to_owned()]).unwrap();
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("a/b");
        written(&place);
        written(&place); // again, over it
        let cache = Cache::open(&place, "key").unwrap();
        let units: Vec<u32> = cache.sequences().iter().map(|sequence| sequence.unit).collect();
        assert_eq!(units, [0, 1, 1]);
        assert_eq!((cache.statistics.rows, cache.tasks.len()), (2, 1));
        let last: Vec<_> = cache.tokens(&cache.sequences()[2]).collect();
        assert_eq!(last, [(5, false), (6, true)]);
        assert!(Cache::open(&place, "other key").is_none());
        assert_eq!(fs::read_dir(place.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn what_a_kill_left_is_removed_and_what_is_being_made_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - Duration::from_secs(3600);
        let left = folder.path().join(".making-left");
        fs::create_dir(&left).unwrap();
        fs::write(left.join(TOKENS), b"some").unwrap();
        let running = Writer::create(&folder.path().join("a")).unwrap();
        for unfinished in [&left, running.folder.path()] {
            File::open(unfinished).unwrap().set_modified(old).unwrap();
        }
        written(&folder.path().join("b"));
        assert!(!left.exists());
        running.finish("key", &Statistics::default(), Vec::new()).unwrap();
    }

    #[test]
    fn a_damaged_cache_is_none() {
        for name in [TOKENS, INDEX, META] {
            for cut in [true, false] {
                let folder = tempfile::tempdir().unwrap();
                let place = folder.path().join("cache");
                written(&place);
                let mut bytes = fs::read(place.join(name)).unwrap();
                if cut {
                    bytes.truncate(bytes.len() - 1);
                } else {
                    bytes[3] ^= 0x40;
                }
                fs::write(place.join(name), bytes).unwrap();
                assert!(Cache::open(&place, "key").is_none(), "{name}, cut: {cut}");
            }
        }
    }

    #[test]
    fn an_abandoned_writer_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&folder.path().join("cache")).unwrap();
        writer.unit(&[tokens(&[1, 2])], 0).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
