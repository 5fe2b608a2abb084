//! The block pool's books: which page of the one tensor belongs to whom.
//!
//! The bytes are a single `uint8` torch tensor that Python made; the core never touches them here. A page holds
//! `block_tokens` tokens of every layer's keys and values, so that one table a sequence serves all layers. Pages are
//! counted: several sequences may hold the same one (a shared prompt), and it is free when the last lets go.

/// Which pages are free, and how many hold on to each of the others.
#[derive(Debug)]
pub struct BlockPool {
    references: Vec<u32>,
    free: Vec<u32>,
    block_tokens: usize,
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
        }
    }

    /// Number of pages, free or not.
    pub fn pages(&self) -> usize {
        self.references.len()
    }

    /// Number of free pages.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Number of pages that somebody holds.
    pub fn used(&self) -> usize {
        self.pages() - self.free()
    }

    /// Tokens a page has room for.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Pages that `tokens` tokens need.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    fn take(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        self.references[page as usize] = 1;
        Some(page)
    }

    fn share(&mut self, page: u32) {
        self.references[page as usize] += 1;
    }

    fn release(&mut self, page: u32) {
        let count = &mut self.references[page as usize];
        debug_assert!(*count > 0, "page {page} is released more often than it was taken");
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.free.push(page);
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

    /// A second table on the full pages of the first `tokens` tokens; a page that is not full is not shared, because
    /// both would write to it.
    #[must_use]
    pub fn fork(&self, pool: &mut BlockPool, tokens: usize) -> Self {
        let full = (tokens / pool.block_tokens).min(self.pages.len());
        let pages = self.pages[..full].to_vec();
        for &page in &pages {
            pool.share(page);
        }
        Self { pages }
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

    #[test]
    fn a_shared_page_is_free_only_after_both_let_go() {
        let mut pool = BlockPool::new(4, 4);
        let mut first = BlockTable::default();
        assert!(first.reserve(&mut pool, 10));
        let mut second = first.fork(&mut pool, 10);
        assert_eq!(second.pages(), &first.pages()[..2]);
        first.release(&mut pool);
        assert_eq!(pool.used(), 2);
        second.release(&mut pool);
        assert_eq!(pool.used(), 0);
    }

    proptest! {
        /// Whatever is taken, shared and released: nobody gets a page that another may write to, and nothing leaks.
        #[test]
        fn pages_are_neither_lost_nor_given_twice(actions in prop::collection::vec((0u8..3, 0usize..40), 0..80)) {
            let mut pool = BlockPool::new(13, 3);
            let mut tables: Vec<BlockTable> = Vec::new();
            for (action, amount) in actions {
                match action {
                    0 => {
                        let mut table = BlockTable::default();
                        let _ = table.reserve(&mut pool, amount);
                        tables.push(table);
                    }
                    1 if !tables.is_empty() => {
                        let table = tables[amount % tables.len()].fork(&mut pool, amount);
                        tables.push(table);
                    }
                    2 if !tables.is_empty() => tables.swap_remove(amount % tables.len()).release(&mut pool),
                    _ => {}
                }
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
