//! One step of the model over a ragged batch: the seam between scheduling (here) and the forward pass (elsewhere).

use super::residency::Fetched;
use crate::Result;

/// What one step computes: a flat stream of tokens, cut in sequences. There is no padding and no batch dimension.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The new tokens of all sequences, one after the other `[tokens]`.
    pub tokens: Vec<i32>,
    /// Each token's position in its sequence `[tokens]`.
    pub positions: Vec<i32>,
    /// Where each sequence's tokens begin, and the end `[sequences + 1]`.
    pub cu_seqlens: Vec<i32>,
    /// Each sequence's adapter, -1 for none `[sequences]`.
    pub adapter: Vec<i32>,
    /// Each sequence's pages, row by row `[sequences, blocks]`; unused places hold 0 and are never read.
    pub block_table: Vec<i32>,
    /// Width of the block table.
    pub blocks: usize,
    /// The tokens of the stream whose logits are wanted, rising.
    pub rows: Vec<i32>,
    /// Whether the hidden states of all tokens are wanted, and no logits.
    pub embeds: bool,
}

impl Batch {
    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.adapter.len()
    }
}

/// A model that can take a step. It writes keys and values of the new tokens to the pages of their sequences.
pub trait Step: Send {
    /// Computes the batch and writes `[rows, vocabulary]` logits, cleared before; of one that embeds, the hidden states
    /// after the last norm, `[tokens, hidden]`. An error fails the requests of this batch and no others.
    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<()>;
    /// The same by the smaller model that makes drafts, under no adapter; its keys and values have the same pages, and
    /// `run` writes them for all that it computes. Called only where [`super::Limits::draft_model`] says so.
    fn draft(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<()>;
    /// Writes the weights of an adapter that was fetched to these pages of the pool; batches under it may follow.
    fn install(&mut self, adapter: i32, pages: &[u32]) -> Result<()>;
    /// The adapter's pages are another's from now on.
    fn evict(&mut self, adapter: i32);
}

/// The adapters on disk.
pub trait Shelf: Send {
    /// Reads one and keeps it until it is installed; on a thread of its own, while steps go on.
    fn fetch(&mut self, adapter: i32) -> Result<Fetched>;
    /// Nobody will ask for it again.
    fn forget(&mut self, adapter: i32);
}
