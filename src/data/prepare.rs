//! Preparing a dataset: read, recognise, encode in parallel, and write to the cache; or find it there.
//!
//! While rows are encoded, the next ones are read and the ones before are written, all in the order of the files: what
//! is written depends on no thread.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::cache::{Cache, Writer};
use super::encode::{Encoder, Outcome};
use super::read;
use super::rows::{BadRow, Row};
use super::schema::{Mapping, Schema, renamed};
use super::source;
use super::statistics::Statistics;
use crate::error::{Error, Result};
use crate::text::on_deep_stack;

/// Changes whenever the same inputs would give other sequences.
const VERSION: u32 = 6;
/// Rows that are encoded together: enough work for all threads, few enough to be nothing in memory.
const CHUNK: usize = 1024;
/// Portions of so many rows that are encoded or wait for it, while the next one is read.
const UNDER_WAY: usize = 2;
/// Rows that a thread encodes one after another.
const TOGETHER: usize = 16;
/// Names of tasks; more of them are another kind of column.
const TASKS: usize = 256;
/// Bad rows that an error shows.
const SHOWN: usize = 20;

/// What to prepare, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Files, folders, or `-`.
    pub paths: Vec<PathBuf>,
    /// How rows are laid out; `None` looks at them, file by file.
    pub schema: Option<Schema>,
    /// The data's names for our columns.
    pub mapping: Mapping,
    /// Every row names its task in a column `task`.
    pub tasks: bool,
    /// Bad rows that are allowed.
    pub skip_bad_rows: u64,
    /// Where caches are kept.
    pub cache: PathBuf,
}

/// A prepared dataset.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Its sequences.
    pub cache: Arc<Cache>,
    /// The first problems among the rows that were skipped; empty when the cache was there already.
    pub problems: Vec<String>,
}

/// Prepares a dataset, or opens what an equal call has prepared.
///
/// `progress` is called now and then with the number of rows so far; an error from it ends the work.
///
/// # Errors
/// A source that cannot be read, more bad rows than allowed, nothing left to train on, or a disk that is full.
pub fn prepare(
    settings: &Settings,
    encoder: &Encoder,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Prepared> {
    let mut sources = Vec::new();
    for path in &settings.paths {
        sources.extend(source::open(path)?);
    }
    let key = key(settings, encoder, &source::fingerprint(&mut sources)?);
    let place = settings.cache.join("data").join(&key);
    if let Some(cache) = Cache::open(&place, &key).filter(|cache| cache.statistics.bad_rows <= settings.skip_bad_rows) {
        return Ok(Prepared { cache: Arc::new(cache), problems: Vec::new() });
    }
    let writer = Writer::create(&place)?;
    let problems = std::thread::scope(|scope| {
        let (to_encode, waiting) = sync_channel(UNDER_WAY);
        let (encoded, outcomes) = channel();
        scope.spawn(move || {
            for rows in waiting {
                if encoded.send(encode(rows, settings, encoder)).is_err() {
                    break; // nobody waits for them: an error ended the work
                }
            }
        });
        let mut work = Work {
            settings,
            encoder,
            progress,
            writer,
            statistics: Statistics::default(),
            problems: Vec::new(),
            seen: HashSet::new(),
            tasks: Vec::new(),
            chunk: Vec::with_capacity(CHUNK),
            to_encode,
            outcomes,
            under_way: 0,
            schema: settings.schema,
            // those two are fields of a message
            unseen: settings
                .mapping
                .clone()
                .into_iter()
                .filter(|(ours, _)| ours != "role" && ours != "content")
                .collect(),
        };
        for source in sources {
            work.schema = settings.schema;
            read::rows(source, &mut |row| work.take(row))?;
            work.hand_over()?;
        }
        work.write_until(0)?;
        work.finish(&key)
    })?;
    let cache = Cache::open(&place, &key)
        .ok_or_else(|| Error::failure(format!("{}: what was just written reads back differently", place.display())))?;
    Ok(Prepared { cache: Arc::new(cache), problems })
}

fn key(settings: &Settings, encoder: &Encoder, data: &str) -> String {
    let template = encoder.template.as_ref().map(crate::text::Template::hash).unwrap_or_default();
    let said = format!(
        "{VERSION}\n{data}\n{template}\n{}\n{:?}\n{:?}\n{:?}\n{}\n{:?}\n{}",
        encoder.tokenizer.hash(),
        settings.schema,
        settings.mapping,
        encoder.train_on,
        encoder.max_tokens,
        encoder.long_rows,
        settings.tasks
    );
    blake3::hash(said.as_bytes()).to_hex().to_string()
}

/// What a row calls its task.
fn task(columns: &Map<String, Value>) -> Result<String, String> {
    match columns.get("task") {
        Some(Value::String(name)) if !name.trim().is_empty() => Ok(name.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(Value::String(_)) => Err("task: expected a name, got an empty one".to_owned()),
        Some(other) => Err(format!("task: expected a name, got {}", read::kind(other))),
        None => Err("expected a column task, which names the row's, got none".to_owned()),
    }
}

/// Rows that are recognised, and bad ones among them, so that problems are told in the order of the file.
type Rows = Vec<Result<(Schema, Row), BadRow>>;
/// What they became.
type Outcomes = Vec<Result<Outcome, BadRow>>;

/// Encodes rows in parallel.
fn encode(rows: Rows, settings: &Settings, encoder: &Encoder) -> Outcomes {
    let encode_row = |row: Result<(Schema, Row), BadRow>| -> Result<Outcome, BadRow> {
        let (schema, Row { place, columns }) = row?;
        let outcome = settings.tasks.then(|| task(&columns)).transpose().and_then(|task| {
            let example = schema.read(&columns, &settings.mapping)?;
            let outcome = encoder.encode(&example).map_err(|error| error.to_string())?;
            Ok(Outcome { task, ..outcome })
        });
        outcome.map_err(|problem| BadRow { place, problem })
    };
    let groups = rows.into_par_iter().chunks(TOGETHER);
    // their templates share a stack
    let groups: Vec<Outcomes> =
        groups.map(|rows| on_deep_stack(|| rows.into_iter().map(encode_row).collect())).collect();
    groups.into_iter().flatten().collect()
}

struct Work<'a> {
    settings: &'a Settings,
    encoder: &'a Encoder,
    progress: &'a mut dyn FnMut(u64) -> Result<()>,
    writer: Writer,
    statistics: Statistics,
    problems: Vec<String>,
    seen: HashSet<u64>,
    /// Names of tasks, as they come.
    tasks: Vec<String>,
    /// Rows that are read, and not yet handed over.
    chunk: Rows,
    /// Where they are encoded, and what comes back from there.
    to_encode: SyncSender<Rows>,
    outcomes: Receiver<Outcomes>,
    /// Portions that are not yet written.
    under_way: usize,
    schema: Option<Schema>,
    /// Names that were given for columns, and were in no row so far.
    unseen: Mapping,
}

impl Work<'_> {
    /// Takes a row from a reader.
    fn take(&mut self, row: Result<Row, BadRow>) -> Result<()> {
        self.statistics.rows += 1;
        let recognised = row.and_then(|Row { place, columns }| {
            self.unseen.retain(|_, theirs| !columns.contains_key(theirs));
            let columns = renamed(columns, &self.settings.mapping);
            match self.schema.map_or_else(|| Schema::recognise(&columns), Ok) {
                Ok(schema) => Ok((schema, Row { place, columns })),
                Err(problem) => Err(BadRow { place, problem }),
            }
        });
        if let Ok((schema, _)) = recognised {
            self.schema = Some(schema);
        }
        self.chunk.push(recognised);
        if self.chunk.len() == CHUNK { self.hand_over() } else { Ok(()) }
    }

    fn bad(&mut self, bad: &BadRow) {
        self.statistics.bad_rows += 1;
        if self.problems.len() < SHOWN {
            self.problems.push(bad.to_string());
        }
    }

    /// Gives the rows that were read to be encoded, and writes some of those before.
    fn hand_over(&mut self) -> Result<()> {
        self.write_until(UNDER_WAY)?;
        self.under_way += 1;
        let rows = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK));
        self.to_encode.send(rows).map_err(|_| Error::failure("the thread that encodes rows has ended"))?;
        (self.progress)(self.statistics.rows)
    }

    /// Writes what was encoded, until no more than `most` portions are under way.
    fn write_until(&mut self, most: usize) -> Result<()> {
        while self.under_way > most {
            let outcomes = self.outcomes.recv();
            for outcome in outcomes.map_err(|_| Error::failure("the thread that encodes rows has ended"))? {
                match outcome {
                    Ok(outcome) => self.write(outcome)?,
                    Err(bad) => self.bad(&bad),
                }
            }
            self.under_way -= 1;
        }
        Ok(())
    }

    fn write(&mut self, mut outcome: Outcome) -> Result<()> {
        if let Some(name) = outcome.task.take().filter(|_| !outcome.units.is_empty()) {
            let number = self.number(name)?;
            outcome.units.iter_mut().flatten().for_each(|sequence| sequence.task = number);
        }
        let counts = &mut self.statistics;
        counts.longest_row = counts.longest_row.max(outcome.length as u64);
        counts.truncated_rows += u64::from(outcome.truncated);
        counts.split_rows += u64::from(outcome.split);
        counts.masked_rows += u64::from(outcome.units.is_empty());
        for (index, unit) in outcome.units.iter().enumerate() {
            counts.labelled += u64::from(outcome.wanted.is_some());
            counts.wanted += u64::from(outcome.wanted == Some(true));
            counts.explained += u64::from(outcome.explained);
            if let ([chosen, rejected], true) = (unit.as_slice(), outcome.pair) {
                counts.pairs += 1;
                counts.chosen_tokens += chosen.targets();
                counts.rejected_tokens += rejected.targets();
            }
            let mut hasher = blake3::Hasher::new();
            for sequence in unit {
                hasher.update(bytemuck::cast_slice(&sequence.ids));
                hasher.update(&[0xff]);
                counts.sequences += 1;
                counts.tokens += sequence.ids.len() as u64;
                counts.trained_tokens += sequence.targets();
            }
            let content = u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().unwrap_or_default());
            counts.duplicate_rows += u64::from(!self.seen.insert(content) && index == 0);
            self.writer.unit(unit, content)?;
        }
        Ok(())
    }

    /// The number of a task.
    fn number(&mut self, name: String) -> Result<u32> {
        let number = self.tasks.iter().position(|known| *known == name).unwrap_or(self.tasks.len());
        if number == self.tasks.len() {
            self.tasks.push(name);
        }
        if self.tasks.len() > TASKS {
            let problem = format!("task: expected at most {TASKS} names, got another one: {:?}", self.tasks[TASKS]);
            return Err(Error::input(problem).hint("data.columns = { task = \"…\" } takes another column"));
        }
        u32::try_from(number).map_err(|_| Error::failure("more tasks than there may be"))
    }

    /// Closes the cache; the problems of the rows that were skipped.
    fn finish(self, key: &str) -> Result<Vec<String>> {
        let counts = &self.statistics;
        if counts.bad_rows > self.settings.skip_bad_rows {
            let more = counts.bad_rows - self.problems.len() as u64;
            let more = if more > 0 { format!("\n  … and {more} more") } else { String::new() };
            return Err(Error::input(format!(
                "expected at most {} bad rows, got {} of {}:\n  {}{more}",
                self.settings.skip_bad_rows,
                counts.bad_rows,
                counts.rows,
                self.problems.join("\n  ")
            ))
            .hint(format!("mend them, or leave them out with --skip-bad-rows {}", counts.bad_rows)));
        }
        if counts.rows == 0 {
            return Err(Error::input("expected rows to train on, got files without any"));
        }
        if let Some((ours, theirs)) = self.unseen.first_key_value() {
            return Err(Error::input(format!("column {ours}: expected {theirs} in the data, got no row that has it")));
        }
        if counts.sequences == 0 {
            return Err(Error::input(format!(
                "expected rows to train on, got none: of {} rows {} were bad and {} had nothing to train on ({} of them \
                 because no whole turn fits into {} tokens)",
                counts.rows, counts.bad_rows, counts.masked_rows, counts.truncated_rows, self.encoder.max_tokens
            ))
            .hint("ftkit data show prints what is trained on; --max-tokens and --train-on change it"));
        }
        self.writer.finish(key, counts, self.tasks)?;
        Ok(self.problems)
    }
}
