//! Attention of new tokens over the pages of their sequences, on the CPU.
//!
//! For a row t with position p, over the positions s ≤ p of its sequence (s > p − window where there is a window):
//!
//! ```text
//! y_t = Σ_s softmax_s(scale · q_t · k_s) v_s
//! ```
//!
//! A page holds `[layers, 2, block_tokens, key_value_heads, head_dim]`: first the keys of a layer, then its values.
//! Sums run over s in order, so a row's result depends on its own sequence and on nothing else in the batch, whatever
//! the number of threads. Sums are in float32.

use std::cell::RefCell;
use std::ops::Range;

use bytemuck::Pod;

use super::math;
use crate::quant::matmul::{Path, ROWS};
use crate::team::{Shared, Team};
use crate::{Error, Result};

/// A number as the cache keeps it.
pub trait Value: Pod + Send + Sync {
    /// As float32.
    fn wide(self) -> f32;
    /// From float32, rounded to nearest.
    fn narrow(value: f32) -> Self;
    /// Several as float32; `room` has as many numbers, and is used where they are not there already.
    fn widen<'a>(values: &'a [Self], room: &'a mut [f32]) -> &'a [f32];
}

impl Value for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
    fn widen<'a>(values: &'a [Self], _room: &'a mut [f32]) -> &'a [f32] {
        values
    }
}

impl Value for half::bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        half::bf16::from_f32(value)
    }
    fn widen<'a>(values: &'a [Self], room: &'a mut [f32]) -> &'a [f32] {
        room.iter_mut().zip(values).for_each(|(room, value)| *room = value.wide());
        &room[..values.len()]
    }
}

/// What the numbers in a page mean, and which layer is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The layer.
    pub layer: usize,
    /// Number of layers.
    pub layers: usize,
    /// Tokens in a page.
    pub block_tokens: usize,
    /// Query heads; a multiple of the key and value heads.
    pub heads: usize,
    /// Heads of keys and values.
    pub key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Layout {
    fn token(&self) -> usize {
        self.key_value_heads * self.head_dim
    }

    /// Values in a page.
    pub fn page(&self) -> usize {
        self.layers * 2 * self.block_tokens * self.token()
    }
}

/// The rows of the batch, as in [`crate::serve::Batch`].
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Each row's position `[rows]`.
    pub positions: &'a [i32],
    /// Where each sequence's rows begin, and the end `[sequences + 1]`.
    pub cu_seqlens: &'a [i32],
    /// The sequences' pages `[sequences, blocks]`.
    pub block_table: &'a [i32],
}

/// Attends from `q` `[rows, heads, head_dim]` to the pages and writes `out`, of the same shape.
#[allow(clippy::too_many_arguments)]
pub fn paged_attention<T: Value>(
    team: &Team,
    q: &[T],
    pool: &[T],
    rows: Rows<'_>,
    layout: Layout,
    scale: f32,
    window: Option<usize>,
    out: &mut [T],
) -> Result<()> {
    check(q.len(), out.len(), pool.len(), rows, layout)?;
    if window == Some(0) {
        return Err(Error::failure("paged attention: expected a window of at least 1 token, got 0"));
    }
    let blocks = rows.block_table.len() / rows.cu_seqlens.len().saturating_sub(1).max(1);
    let group = layout.heads / layout.key_value_heads;
    let mut tasks = Vec::new();
    for (sequence, ends) in rows.cu_seqlens.windows(2).enumerate() {
        let ends = ends[0] as usize * group..ends[1] as usize * group;
        for first in ends.clone().step_by(QUERIES) {
            let queries = first..ends.end.min(first + QUERIES);
            tasks.extend((0..layout.key_value_heads).map(|head| (sequence, queries.clone(), head)));
        }
    }
    let out = Shared::new(out);
    team.each(tasks.len(), &|index| {
        let (sequence, queries, head) = &tasks[index];
        let table = &rows.block_table[sequence * blocks..][..blocks];
        let head = Head { pool, table, layout, head: *head };
        // of a row, the query heads that share a head of keys and values stand side by side
        let at = |query: usize| (query / group * layout.heads + head.head * group + query % group) * layout.head_dim;
        let spans = queries.clone().map(|query| {
            let end = rows.positions[query / group] as usize + 1;
            (window.map_or(0, |window| end.saturating_sub(window)), end)
        });
        let mut scaled = Vec::with_capacity(queries.len() * layout.head_dim);
        for query in queries.clone() {
            scaled.extend(q[at(query)..][..layout.head_dim].iter().map(|value| value.wide() * scale));
        }
        let found = head.attend(Path::best(), &scaled, &spans.collect::<Vec<_>>());
        for (query, found) in queries.clone().zip(found.chunks_exact(layout.head_dim)) {
            // SAFETY: each query of each head is one task's.
            let out = unsafe { out.part(at(query)..at(query) + layout.head_dim) };
            out.iter_mut().zip(found).for_each(|(out, &value)| *out = T::narrow(value));
        }
    });
    Ok(())
}

/// Queries of a task: enough that its keys are used often once they are in the cache.
const QUERIES: usize = 8 * ROWS;
/// Positions that are looked at together, by all queries of a task.
const CHUNK: usize = 64;

/// Checks every length and index, so that what follows cannot leave its slices.
fn check(q: usize, out: usize, pool: usize, rows: Rows<'_>, layout: Layout) -> Result<()> {
    let wrong = |what: &str| Err(Error::failure(format!("paged attention: {what}")));
    let sizes = [layout.layers, layout.block_tokens, layout.heads, layout.key_value_heads, layout.head_dim];
    let page = sizes.iter().try_fold(2usize, |product, &size| product.checked_mul(size)).unwrap_or(0);
    if page == 0 || layout.layer >= layout.layers || !layout.heads.is_multiple_of(layout.key_value_heads) {
        return wrong(&format!("expected sizes that agree, got {layout:?}"));
    }
    let expected = rows.positions.len() * layout.heads * layout.head_dim;
    if q != expected || out != expected {
        return wrong(&format!("expected {expected} values of q and of out, got {q} and {out}"));
    }
    let pages = pool / layout.page();
    let sequences = rows.cu_seqlens.len().saturating_sub(1);
    if sequences == 0 && !rows.positions.is_empty() || !rows.block_table.len().is_multiple_of(sequences.max(1)) {
        return wrong(&format!("expected a page table row for each of {sequences} sequences"));
    }
    let blocks = rows.block_table.len() / sequences.max(1);
    let mut seen = 0;
    for (sequence, ends) in rows.cu_seqlens.windows(2).enumerate() {
        if ends[0] as usize != seen || ends[1] < ends[0] || ends[1] as usize > rows.positions.len() {
            return wrong(&format!("expected rising cu_seqlens from 0 to {}, got {ends:?}", rows.positions.len()));
        }
        let positions = &rows.positions[ends[0] as usize..ends[1] as usize];
        let Some(&largest) = positions.iter().max() else { continue };
        let needed = largest as usize / layout.block_tokens + 1;
        if positions.iter().any(|&position| position < 0) || needed > blocks {
            return wrong(&format!("expected positions in {blocks} pages, got up to {largest}"));
        }
        let table = &rows.block_table[sequence * blocks..][..needed];
        if let Some(page) = table.iter().find(|&&page| page < 0 || page as usize >= pages) {
            return wrong(&format!("expected pages below {pages}, got {page}"));
        }
        seen = ends[1] as usize;
    }
    if seen != rows.positions.len() {
        return wrong(&format!("expected cu_seqlens to end at {}, got {}", rows.positions.len(), seen));
    }
    Ok(())
}

/// What a thread writes before it reads, kept from one task to the next.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    columns: Vec<f32>,
    wide: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// One head of one sequence's keys and values.
struct Head<'a, T> {
    pool: &'a [T],
    table: &'a [i32],
    layout: Layout,
    head: usize,
}

impl<T: Value> Head<'_, T> {
    /// The sums `[queries, dim]` for queries `[queries, dim]`, already scaled, over their spans of positions.
    fn attend(&self, path: Path, queries: &[f32], spans: &[(usize, usize)]) -> Vec<f32> {
        let dim = self.layout.head_dim;
        let low = spans.iter().map(|span| span.0).min().unwrap_or(0);
        let high = spans.iter().map(|span| span.1).max().unwrap_or(0);
        let count = high - low;
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { scores, columns, wide } = scratch;
            scores.resize(scores.len().max(spans.len() * count), 0.0);
            columns.resize(dim * CHUNK, 0.0);
            wide.resize(dim * CHUNK, 0.0);
            self.attend_with(path, queries, spans, low..high, &mut scores[..spans.len() * count], columns, wide)
        })
    }

    /// The same, with room for scores `[queries, positions]`, for keys by columns, and for values in float32.
    #[allow(clippy::too_many_arguments)]
    fn attend_with(
        &self,
        path: Path,
        queries: &[f32],
        spans: &[(usize, usize)],
        positions: Range<usize>,
        scores: &mut [f32],
        columns: &mut [f32],
        wide: &mut [f32],
    ) -> Vec<f32> {
        let (dim, low, high) = (self.layout.head_dim, positions.start, positions.end);
        let count = high - low;
        self.chunks(low..high, 0, wide, |positions, keys| {
            path.transpose(keys, dim, columns, CHUNK);
            let columns: Vec<&[f32]> = columns.chunks_exact(CHUNK).collect();
            let at = positions.start - low;
            for (tile, (queries, spans)) in queries.chunks(ROWS * dim).zip(spans.chunks(ROWS)).enumerate() {
                if spans.iter().all(|span| span.1 <= positions.start || span.0 >= positions.end) {
                    continue;
                }
                let mut found = [0.0; ROWS * CHUNK];
                path.weighted(queries, dim, &columns, CHUNK, &mut found[..spans.len() * CHUNK]);
                for (query, found) in found.chunks_exact(CHUNK).take(spans.len()).enumerate() {
                    let scores = &mut scores[(tile * ROWS + query) * count + at..];
                    scores[..keys.len()].copy_from_slice(&found[..keys.len()]);
                }
            }
        });
        for (scores, &(first, end)) in scores.chunks_exact_mut(count).zip(spans) {
            math::softmax(&mut scores[first - low..end - low]);
        }
        let mut sums = vec![0.0; spans.len() * dim];
        self.chunks(low..high, 1, wide, |positions, values| {
            let tiles = sums.chunks_mut(ROWS * dim).zip(spans.chunks(ROWS)).zip(scores.chunks(ROWS * count));
            for ((sums, spans), shares) in tiles {
                // what all queries see at once, and before and after that each what it sees alone
                let (first, end) =
                    spans.iter().fold((0, usize::MAX), |all, span| (all.0.max(span.0), all.1.min(span.1)));
                let first = first.clamp(positions.start, positions.end);
                let common = first..end.clamp(first, positions.end);
                let part = |from: usize, to: usize| &values[from - positions.start..to - positions.start];
                let alone = |sums: &mut [f32], from: usize, to: usize| {
                    for (query, (sums, span)) in sums.chunks_exact_mut(dim).zip(spans).enumerate() {
                        let (from, to) = (from.max(span.0), to.min(span.1));
                        if from < to {
                            path.weighted(&shares[query * count + from - low..], count, part(from, to), dim, sums);
                        }
                    }
                };
                alone(sums, positions.start, common.start);
                path.weighted(&shares[common.start - low..], count, part(common.start, common.end), dim, sums);
                alone(sums, common.end, positions.end);
            }
        });
        sums
    }

    /// Calls `each` with runs of the positions and their keys (`side` 0) or values (1), in order.
    fn chunks(
        &self,
        positions: Range<usize>,
        side: usize,
        wide: &mut [f32],
        mut each: impl FnMut(Range<usize>, &[&[f32]]),
    ) {
        let Layout { layer, block_tokens, head_dim: dim, .. } = self.layout;
        let (token, page) = (self.layout.token(), self.layout.page());
        let base = (2 * layer + side) * block_tokens * token + self.head * dim;
        let row = |position: usize| {
            let start = self.table[position / block_tokens] as usize * page + base;
            &self.pool[start + position % block_tokens * token..][..dim]
        };
        for start in positions.clone().step_by(CHUNK) {
            let mut rows: [&[f32]; CHUNK] = [&[]; CHUNK];
            let end = positions.end.min(start + CHUNK);
            let found = rows.iter_mut().zip(wide.chunks_exact_mut(dim));
            found.zip(start..end).for_each(|((found, wide), position)| *found = T::widen(row(position), wide));
            each(start..end, &rows[..end - start]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { layer: 1, layers: 2, block_tokens: 3, heads: 4, key_value_heads: 2, head_dim: 5 };

    #[test]
    fn tables_and_positions_that_lead_outside_are_errors() {
        let pool = vec![0.0f32; 2 * LAYOUT.page()];
        let run = |positions: &[i32], cu_seqlens: &[i32], block_table: &[i32]| {
            let q = vec![0.0f32; positions.len() * 20];
            let mut out = q.clone();
            let rows = Rows { positions, cu_seqlens, block_table };
            Team::run(|team| paged_attention(team, &q, &pool, rows, LAYOUT, 1.0, None, &mut out))
        };
        assert!(run(&[5], &[0, 1], &[1, 0]).is_ok());
        assert!(run(&[], &[0], &[]).is_ok());
        for (positions, cu_seqlens, block_table) in [
            (&[6][..], &[0, 1][..], &[1, 0][..]),
            (&[-1], &[0, 1], &[1, 0]),
            (&[5], &[0, 1], &[1, 2]),
            (&[5], &[0, 1], &[-1, 0]),
            (&[5], &[0, 2], &[1, 0]),
            (&[5], &[0], &[1, 0]),
            (&[5], &[0, 0], &[1, 0]),
            (&[5, 5], &[0, 2, 1], &[1, 0, 0, 0]),
            (&[5, 5], &[0, 1, 2], &[1, 0, 0]),
        ] {
            assert!(run(positions, cu_seqlens, block_table).is_err(), "{positions:?} {cu_seqlens:?} {block_table:?}");
        }
    }

    #[test]
    fn one_visible_token_gives_its_value() {
        let mut pool = vec![0.0f32; 2 * LAYOUT.page()];
        // Layer 1, value of slot 2 in page 1, both heads.
        let at = LAYOUT.page() + (3 * 3 + 2) * 10;
        for (index, value) in pool[at..at + 10].iter_mut().enumerate() {
            *value = index as f32;
        }
        let (q, mut out) = (vec![1.0f32; 20], vec![0.0f32; 20]);
        let rows = Rows { positions: &[5], cu_seqlens: &[0, 1], block_table: &[0, 1] };
        Team::run(|team| paged_attention(team, &q, &pool, rows, LAYOUT, 1.0, Some(1), &mut out)).unwrap();
        let expected: Vec<f32> =
            [0, 0, 5, 5].iter().flat_map(|&from| (from..from + 5).map(|value| value as f32)).collect();
        assert_eq!(out, expected);
    }
}
