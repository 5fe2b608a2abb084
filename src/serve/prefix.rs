//! By what a page of keys and values is known: a hash of all that they depend on.
//!
//! ```text
//! key of page i = blake3(key of page i − 1, the tokens of page i)
//! key of page −1 = blake3(base, content of the adapter)
//! ```
//! A token's keys and values depend on the model, the adapter and every token before it, and on nothing else, to the bit:
//! the kernels compute a row in an order that depends on its own sequence alone. The tokens are those after the template,
//! which is thus part of the key. An adapter counts by its content, not by its name: one that is loaded anew under an old
//! name finds nothing of the old one's, and the same one under two names finds its own.

/// What a page is known by.
pub type Key = [u8; 32];

/// Where the chain of a model's pages begins: the content of the base and of the adapter on it.
pub fn root(base: &str, adapter: &str) -> Key {
    let mut hasher = blake3::Hasher::new_derive_key("ftkit prefix cache 1");
    // The length keeps the two apart.
    hasher.update(&(base.len() as u64).to_le_bytes()).update(base.as_bytes()).update(adapter.as_bytes());
    hasher.finalize().into()
}

/// The keys of a sequence's full pages, made as it grows.
#[derive(Clone, Debug)]
pub struct Chain {
    root: Option<Key>,
    keys: Vec<Key>,
}

impl Chain {
    /// A chain that begins at `root`; without one there are no keys, and nothing is ever found or kept.
    pub fn new(root: Option<Key>) -> Self {
        Self { root, keys: Vec::new() }
    }

    /// Makes the keys of the full pages of the tokens, of which those before are the beginning.
    pub fn extend(&mut self, tokens: &[u32], block_tokens: usize) {
        let Some(root) = self.root else { return };
        for block in tokens.chunks_exact(block_tokens).skip(self.keys.len()) {
            let mut hasher = blake3::Hasher::new();
            hasher.update(self.keys.last().unwrap_or(&root));
            let bytes: Vec<u8> = block.iter().flat_map(|token| token.to_le_bytes()).collect();
            hasher.update(&bytes);
            self.keys.push(hasher.finalize().into());
        }
    }

    /// The keys of the first pages, as many as there are.
    pub fn first(&self, count: usize) -> &[Key] {
        &self.keys[..count.min(self.keys.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(root: Option<Key>, tokens: &[u32], block_tokens: usize) -> Vec<Key> {
        let mut chain = Chain::new(root);
        chain.extend(tokens, block_tokens);
        chain.first(usize::MAX).to_vec()
    }

    #[test]
    fn a_key_depends_on_everything_before_it() {
        let keys = |base: &str, adapter: &str, tokens: &[u32]| made(Some(root(base, adapter)), tokens, 2);
        let whole = keys("b", "a", &[1, 2, 3, 4, 5]);
        assert_eq!(whole.len(), 2);
        assert_eq!(keys("b", "a", &[1, 2, 3]), whole[..1]);
        assert_eq!(keys("b", "a", &[1, 2, 9, 4])[0], whole[0]);
        for other in [keys("b", "", &[1, 2, 3, 4]), keys("ba", "", &[1, 2, 3, 4]), keys("b", "a", &[2, 1, 3, 4])] {
            assert!(other[0] != whole[0] && other[1] != whole[1]);
        }
        assert_ne!(keys("b", "a", &[1, 2, 4, 3])[1], whole[1]);
        assert!(made(None, &[1, 2, 3], 2).is_empty());
    }

    #[test]
    fn a_chain_grows_with_its_tokens() {
        let mut chain = Chain::new(Some(root("", "")));
        let tokens: Vec<u32> = (0..20).collect();
        for end in 0..20 {
            chain.extend(&tokens[..end], 3);
            assert_eq!(chain.first(9), made(Some(root("", "")), &tokens[..end], 3));
        }
    }
}
