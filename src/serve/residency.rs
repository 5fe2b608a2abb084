//! Which adapters are in the pool, which are on their way, and which stay on disk.
//!
//! ```text
//! on disk ─ fetch, on a thread of its own ─→ staged ─ pages taken, weights written ─→ here ⇄ parked ─→ on disk
//! ```
//! A request for an adapter that is not here lets others pass; meanwhile its adapter is fetched. An adapter stays while a
//! sequence runs under it; then it is parked, and stands in the pool's one line of what has not been used for longest.
//! An adapter's number stands for one content: what is loaded anew under an old name has a new number, and sequences that
//! run keep the old one until they end.

use std::collections::{HashMap, HashSet};

use super::pool::{BlockPool, BlockTable};
use super::prefix::Key;
use crate::{Error, Result};

/// Adapters that are fetched or staged at the same time: they take memory outside of the pool.
const ON_THE_WAY: usize = 4;

/// An adapter that was read from disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Pages that it takes.
    pub pages: usize,
    /// Where the keys of pages of keys and values under it begin.
    pub root: Key,
}

#[derive(Debug)]
enum State {
    Disk,
    Fetching,
    Staged(Fetched),
    Here(BlockTable),
    Parked,
}

#[derive(Debug)]
struct Entry {
    state: State,
    root: Option<Key>,
    users: usize,
    /// To be forgotten when nobody uses it.
    doomed: bool,
}

/// What the model has to do before the next step, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// Adapters whose pages are another's now.
    pub evicted: Vec<i32>,
    /// Adapters that were fetched, and the pages for their weights.
    pub installed: Vec<(i32, Vec<u32>)>,
    /// Adapters that nobody will ask for again.
    pub forgotten: Vec<i32>,
    /// How many of the evicted had to make room for something else.
    pub pushed_out: u64,
}

/// The adapters that live in the pool.
#[derive(Debug, Default)]
pub struct Residency {
    entries: HashMap<i32, Entry>,
    /// Those that were forgotten; their numbers are never given again.
    gone: HashSet<i32>,
    fetches: Vec<i32>,
    moves: Moves,
}

impl Residency {
    /// An adapter on disk that requests may name. Those that are not known here are always on the model.
    pub fn know(&mut self, adapter: i32) {
        self.entries.insert(adapter, Entry { state: State::Disk, root: None, users: 0, doomed: false });
    }

    /// Nobody will ask for the adapter again; those who did may end.
    pub fn forget(&mut self, adapter: i32) {
        if let Some(entry) = self.entries.get_mut(&adapter) {
            entry.doomed = true;
        }
    }

    /// Forgets the doomed that nobody uses or waits for.
    pub fn bury(&mut self, pool: &mut BlockPool, mut wanted: impl FnMut(i32) -> bool) {
        self.sync(pool);
        let idle = |entry: &Entry| entry.users == 0 && !matches!(entry.state, State::Fetching);
        let dead = self.entries.iter().filter(|(id, entry)| entry.doomed && idle(entry) && !wanted(**id));
        for adapter in dead.map(|(id, _)| *id).collect::<Vec<_>>() {
            if let Some(mut table) = pool.unpark(adapter) {
                table.release(pool);
                self.moves.evicted.push(adapter);
            }
            self.entries.remove(&adapter);
            self.gone.insert(adapter);
            self.moves.forgotten.push(adapter);
        }
    }

    /// Whether any adapter is to be forgotten.
    pub fn doomed(&self) -> bool {
        self.entries.values().any(|entry| entry.doomed)
    }

    /// Whether the adapter was forgotten before a request for it came.
    pub fn gone(&self, adapter: i32) -> bool {
        self.gone.contains(&adapter)
    }

    /// Takes note of what the pool has evicted.
    pub fn sync(&mut self, pool: &mut BlockPool) {
        for adapter in pool.evicted() {
            if let Some(entry) = self.entries.get_mut(&adapter) {
                entry.state = State::Disk;
            }
            self.moves.evicted.push(adapter);
            self.moves.pushed_out += 1;
        }
    }

    /// Whether a sequence under the adapter may run, as soon as there are pages for both.
    pub fn ready(&self, adapter: i32) -> bool {
        self.entries.get(&adapter).is_none_or(|entry| !matches!(entry.state, State::Disk | State::Fetching))
    }

    /// Has adapters fetched that are on disk, as many as may be on their way; `wanted` are those of all that wait, in
    /// order. What was fetched for requests that have left since is let go.
    pub fn wish(&mut self, wanted: &[i32]) {
        if self.entries.is_empty() {
            return;
        }
        let mut on_the_way = 0;
        for (adapter, entry) in &mut self.entries {
            match entry.state {
                State::Staged(_) if !wanted.contains(adapter) => {
                    entry.state = State::Disk;
                    self.moves.evicted.push(*adapter);
                }
                State::Fetching | State::Staged(_) => on_the_way += 1,
                _ => {}
            }
        }
        for &adapter in wanted {
            if on_the_way == ON_THE_WAY {
                break;
            }
            if let Some(entry) = self.entries.get_mut(&adapter)
                && matches!(entry.state, State::Disk)
            {
                entry.state = State::Fetching;
                self.fetches.push(adapter);
                on_the_way += 1;
            }
        }
    }

    /// The adapters to fetch since the last call.
    pub fn fetches(&mut self) -> Vec<i32> {
        std::mem::take(&mut self.fetches)
    }

    /// An adapter was fetched, or could not be.
    pub fn fetched(&mut self, adapter: i32, outcome: &Result<Fetched>) {
        if let Some(entry) = self.entries.get_mut(&adapter) {
            entry.state = State::Disk;
            if let Ok(fetched) = outcome {
                entry.root = Some(fetched.root);
                entry.state = State::Staged(*fetched);
            }
        }
    }

    /// Where the keys under the adapter begin, if it was fetched before.
    pub fn root(&self, adapter: i32) -> Option<Key> {
        self.entries.get(&adapter).and_then(|entry| entry.root)
    }

    /// Pages of an adapter, which is ready.
    pub fn pages(&self, adapter: i32, pool: &BlockPool) -> usize {
        match self.entries.get(&adapter).map(|entry| &entry.state) {
            Some(State::Here(table)) => table.pages().len(),
            Some(State::Staged(fetched)) => fetched.pages,
            Some(State::Parked) => pool.parked_pages(adapter),
            _ => 0,
        }
    }

    /// Pages of the adapters that others run under.
    pub fn held_beside(&self, adapter: i32) -> usize {
        let pages = |(id, entry): (&i32, &Entry)| match &entry.state {
            State::Here(table) if *id != adapter => table.pages().len(),
            _ => 0,
        };
        self.entries.iter().map(pages).sum()
    }

    /// A sequence begins under the adapter, which is ready; `false` when there are no pages for it.
    #[must_use]
    pub fn enter(&mut self, adapter: i32, pool: &mut BlockPool) -> bool {
        let Some(entry) = self.entries.get_mut(&adapter) else { return true };
        match &entry.state {
            State::Here(_) => {}
            State::Parked => match pool.unpark(adapter) {
                Some(table) => entry.state = State::Here(table),
                None => return false,
            },
            State::Staged(fetched) => {
                let mut table = BlockTable::default();
                if !table.reserve(pool, fetched.pages * pool.block_tokens()) {
                    return false;
                }
                self.moves.installed.push((adapter, table.pages().to_vec()));
                entry.state = State::Here(table);
            }
            State::Disk | State::Fetching => return false,
        }
        entry.users += 1;
        true
    }

    /// A sequence under the adapter has ended, or gives its place up.
    pub fn leave(&mut self, adapter: i32, pool: &mut BlockPool) {
        let Some(entry) = self.entries.get_mut(&adapter) else { return };
        entry.users = entry.users.saturating_sub(1);
        if let (0, State::Here(table)) = (entry.users, &mut entry.state) {
            pool.park(adapter, std::mem::take(table));
            entry.state = State::Parked;
        }
    }

    /// What is to be done before the next step, since the last call.
    pub fn moves(&mut self, pool: &mut BlockPool) -> Moves {
        self.sync(pool);
        std::mem::take(&mut self.moves)
    }

    /// The weights could not be written: the adapter is on disk again, once its sequences have ended.
    pub fn lost(&mut self, adapter: i32, pool: &mut BlockPool) {
        if let Some(mut table) = pool.unpark(adapter) {
            table.release(pool);
        }
        if let Some(entry) = self.entries.get_mut(&adapter) {
            entry.state = State::Disk;
        }
    }

    /// Whether the adapter is one that comes from disk.
    pub fn knows(&self, adapter: i32) -> bool {
        self.entries.contains_key(&adapter)
    }

    /// Adapters in the pool, used or not, and their pages.
    pub fn resident(&self, pool: &BlockPool) -> (usize, usize) {
        self.entries.iter().fold((0, 0), |(count, pages), (&adapter, entry)| match &entry.state {
            State::Here(_) | State::Parked => (count + 1, pages + self.pages(adapter, pool)),
            _ => (count, pages),
        })
    }

    /// The error of a request that the pool is too small for.
    pub fn too_large(pages: usize, pool: &BlockPool) -> Error {
        let message = format!("adapter: expected one that leaves room in {} pages, got {pages}", pool.pages());
        Error::input(message).hint("make the pool larger")
    }
}
