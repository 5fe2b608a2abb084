//! A whole step of serving as one call: from token ids to logits.

use super::attention::Rows;
use super::{Batch, Layers};
use crate::error::{Error, Result};
use crate::quant::matmul::Matrix;
use crate::team::Team;

/// What stands before the layers.
#[derive(Clone, Copy, Debug)]
pub struct Entrance<'a> {
    /// The embeddings `[vocabulary, d]`.
    pub embedding: Matrix<'a>,
    /// Of each position, the cosines of its angles `[positions, head_dim / 2]`.
    pub cos: &'a [f32],
    /// The same, their sines.
    pub sin: &'a [f32],
}

/// Tokens of sequences that continue in a cache, and the rows whose logits are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// All sequences' new tokens, one after another `[T]`.
    pub tokens: &'a [i32],
    /// Positions, sequences and pages.
    pub rows: Rows<'a>,
    /// Each sequence's adapter, -1 for none.
    pub adapters: &'a [i32],
    /// Rising rows of the stream.
    pub wanted: &'a [i32],
}

impl Layers<'_> {
    /// Computes a batch and writes the logits of the wanted rows `[wanted, vocabulary]`; keys and values go to `pool`.
    ///
    /// # Errors
    /// Tokens, positions or pages that there are not, or sizes that don't agree.
    pub fn step(
        &self,
        team: &Team,
        entrance: Entrance<'_>,
        batch: Tokens<'_>,
        block_tokens: usize,
        pool: &mut [f32],
        logits: &mut [f32],
    ) -> Result<()> {
        let Tokens { tokens, rows, adapters, wanted } = batch;
        let (vocabulary, half) = (entrance.embedding.rows(), self.head_dim / 2);
        let inside = |values: &[i32], end: usize| values.iter().all(|&value| value >= 0 && (value as usize) < end);
        let positions = entrance.cos.len().min(entrance.sin.len()) / half.max(1);
        if !inside(tokens, vocabulary) || !inside(rows.positions, positions) || tokens.len() != rows.positions.len() {
            return Err(Error::failure(format!(
                "expected tokens below {vocabulary} at positions below {positions}, one each, got {tokens:?} at {:?}",
                rows.positions
            )));
        }
        let mut x = vec![0.0; tokens.len() * self.width];
        for (&token, x) in tokens.iter().zip(x.chunks_exact_mut(self.width.max(1))) {
            entrance.embedding.row(token as usize, x)?;
        }
        let angles = |table: &[f32]| -> Vec<f32> {
            let row = |&position: &i32| &table[position as usize * half..][..half];
            rows.positions.iter().flat_map(row).copied().collect()
        };
        let (cos, sin) = (angles(entrance.cos), angles(entrance.sin));
        let spans = spans(rows.cu_seqlens, adapters)?;
        self.forward(team, Batch { cos: &cos, sin: &sin, rows, spans: &spans }, block_tokens, pool, &mut x)?;
        self.logits(team, &spans, wanted, &x, logits)
    }
}

/// Spans of rows under one adapter: of neighbours under the same, one.
fn spans(cu_seqlens: &[i32], adapters: &[i32]) -> Result<Vec<(i32, usize, usize)>> {
    if cu_seqlens.len() != adapters.len() + 1 || cu_seqlens[0] < 0 || !cu_seqlens.is_sorted() {
        return Err(Error::failure(format!("expected rising cu_seqlens of {} sequences", adapters.len())));
    }
    let mut found: Vec<(i32, usize, usize)> = Vec::with_capacity(adapters.len());
    for (ends, &adapter) in cu_seqlens.windows(2).zip(adapters) {
        match found.last_mut() {
            Some(last) if last.0 == adapter => last.2 = ends[1] as usize,
            _ => found.push((adapter, ends[0] as usize, ends[1] as usize)),
        }
    }
    Ok(found)
}
