//! The block pool's books: which page of the one tensor belongs to whom, and what it holds.
//!
//! The bytes are a single `uint8` torch tensor that Python made; the core never touches them here. A page holds
//! `block_tokens` tokens of every layer's keys and values, so that one table a sequence serves all layers. Pages are
//! counted: several sequences may hold the same one (a shared prompt), and it is free when the last lets go.
//!
//! A full page whose content is known by a [`Key`] is kept when nobody holds it any more, and found again by that key,
//! until its room is needed: then the one that was let go longest ago goes first. Only full pages have keys, so nobody
//! ever writes to a page that is shared. Adapters' weights lie in pages of the same pool; one that nobody uses is parked
//! and stands in the same line.

use std::collections::{BTreeMap, HashMap};

use super::prefix::Key;

#[derive(Clone, Copy, Debug)]
enum Idle {
    Page(u32),
    Adapter(i32),
}

/// Which pages are free, how many hold on to each of the others, and what can be found again.
#[derive(Debug)]
pub struct BlockPool {
    references: Vec<u32>,
    free: Vec<u32>,
    block_tokens: usize,
    /// Pages by what they hold.
    known: HashMap<Key, u32>,
    /// The other way round.
    keys: Vec<Option<Key>>,
    /// Known pages and adapters that nobody holds, by when they were let go.
    idle: BTreeMap<u64, Idle>,
    /// The parked adapters: since when, and their pages.
    parked: HashMap<i32, (u64, Vec<u32>)>,
    parked_pages: usize,
    /// Adapters that had to give their pages up.
    evicted: Vec<i32>,
    /// When each page was let go last.
    let_go: Vec<u64>,
    clock: u64,
}

impl BlockPool {
    /// A pool of `pages` free pages, each for `block_tokens` tokens.
    pub fn new(pages: usize, block_tokens: usize) -> Self {
        let pages = u32::try_from(pages).unwrap_or(u32::MAX >> 1);
        // Taken from the end: low pages first, so a small load touches little memory.
        Self {
            references: vec![0; pages as usize],
            free: (0..pages).rev().collect(),
            block_tokens: block_tokens.max(1),
            known: HashMap::new(),
            keys: vec![None; pages as usize],
            idle: BTreeMap::new(),
            parked: HashMap::new(),
            parked_pages: 0,
            evicted: Vec::new(),
            let_go: vec![0; pages as usize],
            clock: 0,
        }
    }

    /// Number of pages, free or not.
    pub fn pages(&self) -> usize {
        self.references.len()
    }

    /// Number of pages that can be had: nobody holds them.
    pub fn free(&self) -> usize {
        self.free.len() + self.idle() + self.parked_pages
    }

    /// Number of pages that somebody holds.
    pub fn used(&self) -> usize {
        self.pages() - self.free()
    }

    /// Number of pages that nobody holds and that can be found again by what they hold.
    pub fn idle(&self) -> usize {
        self.idle.len() - self.parked.len()
    }

    /// Number of pages of adapters that nobody uses.
    pub fn parked(&self) -> usize {
        self.parked_pages
    }

    /// Tokens a page has room for.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Pages that `tokens` tokens need.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    /// How many hold the page.
    pub fn holders(&self, page: u32) -> u32 {
        self.references[page as usize]
    }

    /// How many of the keys, from the first on, lead to a page.
    pub fn found(&self, keys: &[Key]) -> usize {
        keys.iter().take_while(|key| self.known.contains_key(*key)).count()
    }

    fn take(&mut self) -> Option<u32> {
        while self.free.is_empty() {
            match self.idle.pop_first()?.1 {
                Idle::Page(page) => {
                    if let Some(key) = self.keys[page as usize].take() {
                        self.known.remove(&key);
                    }
                    self.free.push(page);
                }
                Idle::Adapter(adapter) => {
                    let (_, pages) = self.parked.remove(&adapter)?;
                    self.parked_pages -= pages.len();
                    self.free.extend(pages.into_iter().rev());
                    self.evicted.push(adapter);
                }
            }
        }
        let page = self.free.pop()?;
        self.references[page as usize] = 1;
        Some(page)
    }

    /// Nobody uses the adapter for now: its pages are another's when they are needed.
    pub fn park(&mut self, adapter: i32, mut table: BlockTable) {
        self.clock += 1;
        for &page in &table.pages {
            self.references[page as usize] = 0;
        }
        self.parked_pages += table.pages.len();
        self.idle.insert(self.clock, Idle::Adapter(adapter));
        self.parked.insert(adapter, (self.clock, std::mem::take(&mut table.pages)));
    }

    /// The pages of a parked adapter, which is used again.
    pub fn unpark(&mut self, adapter: i32) -> Option<BlockTable> {
        let (since, pages) = self.parked.remove(&adapter)?;
        self.idle.remove(&since);
        self.parked_pages -= pages.len();
        for &page in &pages {
            self.references[page as usize] = 1;
        }
        Some(BlockTable { pages })
    }

    /// Number of pages of a parked adapter.
    pub fn parked_pages(&self, adapter: i32) -> usize {
        self.parked.get(&adapter).map_or(0, |(_, pages)| pages.len())
    }

    /// The adapters that have lost their pages since the last call.
    pub fn evicted(&mut self) -> Vec<i32> {
        std::mem::take(&mut self.evicted)
    }

    fn share(&mut self, page: u32) {
        if self.references[page as usize] == 0 {
            self.idle.remove(&self.let_go[page as usize]);
        }
        self.references[page as usize] += 1;
    }

    fn release(&mut self, page: u32) {
        let count = &mut self.references[page as usize];
        debug_assert!(*count > 0, "page {page} is released more often than it was taken");
        *count = count.saturating_sub(1);
        if *count > 0 {
            return;
        }
        if self.keys[page as usize].is_some() {
            self.clock += 1;
            self.let_go[page as usize] = self.clock;
            self.idle.insert(self.clock, Idle::Page(page));
        } else {
            self.free.push(page);
        }
    }

    /// The page is full and holds what the key says. Where another is known by the key, that one stays it.
    fn learn(&mut self, page: u32, key: Key) {
        if self.keys[page as usize].is_none() && !self.known.contains_key(&key) {
            self.known.insert(key, page);
            self.keys[page as usize] = Some(key);
        }
    }
}

/// A sequence's pages, in the order of its tokens. Must be given back with [`BlockTable::release`].
#[derive(Debug, Default)]
pub struct BlockTable {
    pages: Vec<u32>,
}

impl BlockTable {
    /// The pages, in the order of the tokens.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Grows the table to hold `tokens` tokens. Takes nothing and says `false` when the pool has too few pages.
    #[must_use]
    pub fn reserve(&mut self, pool: &mut BlockPool, tokens: usize) -> bool {
        let missing = pool.pages_for(tokens).saturating_sub(self.pages.len());
        if missing > pool.free() {
            return false;
        }
        self.pages.extend((0..missing).map_while(|_| pool.take()));
        true
    }

    /// Gives every page back.
    pub fn release(&mut self, pool: &mut BlockPool) {
        // Backwards, so that a sequence which comes again gets the same pages in the same order.
        for page in self.pages.drain(..).rev() {
            pool.release(page);
        }
    }

    /// Starts an empty table with the pages that hold what the keys say, from the first key on; how many there are.
    pub fn adopt(&mut self, pool: &mut BlockPool, keys: &[Key]) -> usize {
        debug_assert!(self.pages.is_empty(), "only an empty table can begin with known pages");
        for key in keys {
            let Some(&page) = pool.known.get(key) else { break };
            pool.share(page);
            self.pages.push(page);
        }
        self.pages.len()
    }

    /// The page of this number is full, and holds what the key says.
    pub fn learn(&self, pool: &mut BlockPool, number: usize, key: Key) {
        pool.learn(self.pages[number], key);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_reservation_that_does_not_fit_takes_nothing() {
        let mut pool = BlockPool::new(3, 4);
        let mut table = BlockTable::default();
        assert!(table.reserve(&mut pool, 5));
        assert!(!table.reserve(&mut pool, 13));
        assert_eq!((table.pages(), pool.free()), (&[0, 1][..], 1));
    }

    fn key(number: usize) -> Key {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&number.to_le_bytes());
        key
    }

    #[test]
    fn a_known_page_is_shared_kept_and_forgotten_last() {
        let mut pool = BlockPool::new(4, 4);
        let mut first = BlockTable::default();
        assert!(first.reserve(&mut pool, 10));
        (0..2).for_each(|number| first.learn(&mut pool, number, key(number)));
        let mut second = BlockTable::default();
        assert_eq!(second.adopt(&mut pool, &[key(0), key(1), key(2)]), 2);
        assert_eq!(second.pages(), &first.pages()[..2]);
        first.release(&mut pool);
        assert_eq!((pool.used(), pool.idle()), (2, 0));
        second.release(&mut pool);
        assert_eq!((pool.used(), pool.idle()), (0, 2));
        // What is free goes first, then the end of the prefix, then its beginning.
        let mut third = BlockTable::default();
        assert!(third.reserve(&mut pool, 12));
        assert_eq!(pool.found(&[key(0), key(1)]), 1);
        assert!(third.reserve(&mut pool, 16));
        assert_eq!(pool.found(&[key(0)]), 0);
    }

    #[test]
    fn what_was_let_go_longest_ago_goes_first() {
        let mut pool = BlockPool::new(3, 1);
        let mut tables: Vec<BlockTable> = (0..3).map(|_| BlockTable::default()).collect();
        for (number, table) in tables.iter_mut().enumerate() {
            assert!(table.reserve(&mut pool, 1));
            table.learn(&mut pool, 0, key(number));
        }
        tables.iter_mut().for_each(|table| table.release(&mut pool));
        // Used again: now the youngest.
        assert_eq!(tables[0].adopt(&mut pool, &[key(0)]), 1);
        tables[0].release(&mut pool);
        assert!(tables[1].reserve(&mut pool, 1));
        assert_eq!([0, 1, 2].map(|number| pool.found(&[key(number)])), [1, 0, 1]);
    }

    proptest! {
        /// Whatever is taken, shared, found again and released: nobody gets a page that another may write to, a key leads
        /// to what was written under it, and nothing leaks.
        #[test]
        fn pages_are_neither_lost_nor_given_twice(actions in prop::collection::vec((0u8..6, 0usize..40), 0..120)) {
            let mut pool = BlockPool::new(13, 3);
            let mut tables: Vec<BlockTable> = Vec::new();
            // What each page holds, as the test remembers it.
            let mut content = [usize::MAX; 13];
            let mut written = 0;
            let (mut parked, mut adapter) = (Vec::new(), 0);
            for (action, amount) in actions {
                match action {
                    0 => {
                        let mut table = BlockTable::default();
                        let _ = table.reserve(&mut pool, amount);
                        for &page in table.pages() {
                            written += 1;
                            content[page as usize] = written;
                        }
                        tables.push(table);
                    }
                    1 if !tables.is_empty() => {
                        let table = &tables[amount % tables.len()];
                        for (number, &page) in table.pages().iter().enumerate() {
                            table.learn(&mut pool, number, key(content[page as usize]));
                        }
                    }
                    2 => {
                        let mut table = BlockTable::default();
                        let keys: Vec<Key> = (amount..=written).map(key).collect();
                        let count = table.adopt(&mut pool, &keys);
                        for (&page, expected) in table.pages().iter().zip(amount..) {
                            prop_assert_eq!(content[page as usize], expected);
                        }
                        prop_assert_eq!(count, table.pages().len());
                        tables.push(table);
                    }
                    3 if !tables.is_empty() => tables.swap_remove(amount % tables.len()).release(&mut pool),
                    4 if !tables.is_empty() => {
                        let mut table = tables.swap_remove(amount % tables.len());
                        // An adapter's pages are its own.
                        if table.pages().iter().all(|&page| pool.holders(page) == 1 && pool.keys[page as usize].is_none()) {
                            parked.push((adapter, table.pages().to_vec()));
                            pool.park(adapter, table);
                            adapter += 1;
                        } else {
                            table.release(&mut pool);
                        }
                    }
                    5 if !parked.is_empty() => {
                        let (adapter, pages) = parked.swap_remove(amount % parked.len());
                        let table = pool.unpark(adapter);
                        prop_assert_eq!(table.as_ref().map(|table| table.pages().to_vec()), Some(pages));
                        tables.extend(table);
                    }
                    _ => {}
                }
                let evicted = pool.evicted();
                parked.retain(|(adapter, _)| !evicted.contains(adapter));
                prop_assert_eq!(parked.iter().map(|(_, pages)| pages.len()).sum::<usize>(), pool.parked());
                let mut held = vec![0u32; pool.pages()];
                for &page in tables.iter().flat_map(BlockTable::pages) {
                    held[page as usize] += 1;
                }
                prop_assert_eq!(&held, &pool.references);
                prop_assert_eq!(held.iter().filter(|&&count| count == 0).count(), pool.free());
            }
            for mut table in tables {
                table.release(&mut pool);
            }
            prop_assert_eq!(pool.used(), 0);
        }
    }
}
