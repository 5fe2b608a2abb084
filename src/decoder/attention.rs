//! Attention of new tokens over the pages of their sequences, on the CPU.
//!
//! For a row t with position p, over the positions s ≤ p of its sequence (s > p − window where there is a window):
//!
//! ```text
//! y_t = Σ_s softmax_s(scale · q_t · k_s) v_s
//! ```
//!
//! A page holds `[layers, 2, block_tokens, key_value_heads, head_dim]`: first the keys of a layer, then its values, as
//! [`Kept`] has them.
//! Sums run over s in order, so a row's result depends on its own sequence and on nothing else in the batch, whatever
//! the number of threads. Sums are in float32.

use std::cell::RefCell;
use std::ops::Range;

use bytemuck::Pod;

use super::kept::Kept;
use super::math;
use crate::quant::matmul::{Path, ROWS};
use crate::team::{Shared, Team};
use crate::{Error, Result};

/// A number of queries and results.
pub trait Value: Pod + Send + Sync {
    /// As float32.
    fn wide(self) -> f32;
    /// From float32, rounded to nearest.
    fn narrow(value: f32) -> Self;
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
    /// Elements of a token's keys, or values.
    pub fn token<P: Kept>(&self) -> usize {
        self.key_value_heads * P::room(self.head_dim)
    }

    /// Elements of a page.
    pub fn page<P: Kept>(&self) -> usize {
        self.layers * 2 * self.block_tokens * self.token::<P>()
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
pub fn paged_attention<T: Value, P: Kept>(
    team: &Team,
    q: &[T],
    pool: &[P],
    rows: Rows<'_>,
    layout: Layout,
    scale: f32,
    window: Option<usize>,
    out: &mut [T],
) -> Result<()> {
    check::<P>(q.len(), out.len(), pool.len(), rows, layout)?;
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
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.queries.clear();
            scratch.spans.clear();
            for query in queries.clone() {
                scratch.queries.extend(q[at(query)..][..layout.head_dim].iter().map(|value| value.wide() * scale));
                let end = rows.positions[query / group] as usize + 1;
                scratch.spans.push((window.map_or(0, |window| end.saturating_sub(window)), end));
            }
            head.attend(Path::best(), scratch);
            for (query, found) in queries.clone().zip(scratch.sums.chunks_exact(layout.head_dim)) {
                // SAFETY: each query of each head is one task's.
                let out = unsafe { out.part(at(query)..at(query) + layout.head_dim) };
                out.iter_mut().zip(found).for_each(|(out, &value)| *out = T::narrow(value));
            }
        });
    });
    Ok(())
}

/// Queries of a task: enough that its keys are used often once they are in the cache.
const QUERIES: usize = 8 * ROWS;
/// Positions that are looked at together, by all queries of a task.
const CHUNK: usize = 64;
/// Positions that are asked for ahead of a chunk's end.
const AHEAD: usize = 16;

/// Checks every length and index, so that what follows cannot leave its slices.
fn check<P: Kept>(q: usize, out: usize, pool: usize, rows: Rows<'_>, layout: Layout) -> Result<()> {
    let wrong = |what: &str| Err(Error::failure(format!("paged attention: {what}")));
    let room = P::room(layout.head_dim);
    let sizes = [layout.layers, layout.block_tokens, layout.heads, layout.key_value_heads, layout.head_dim, room];
    let page = sizes.iter().try_fold(2usize, |product, &size| product.checked_mul(size)).unwrap_or(0);
    if page == 0 || layout.layer >= layout.layers || !layout.heads.is_multiple_of(layout.key_value_heads) {
        return wrong(&format!("expected sizes that agree, got {layout:?}"));
    }
    let expected = rows.positions.len() * layout.heads * layout.head_dim;
    if q != expected || out != expected {
        return wrong(&format!("expected {expected} values of q and of out, got {q} and {out}"));
    }
    let pages = pool / layout.page::<P>();
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
    /// Queries `[queries, dim]`, already scaled.
    queries: Vec<f32>,
    /// The positions that each sees: from, and to before.
    spans: Vec<(usize, usize)>,
    /// What comes of it `[queries, dim]`.
    sums: Vec<f32>,
    /// `[queries, positions]`.
    scores: Vec<f32>,
    /// Keys by columns `[dim, CHUNK]`.
    columns: Vec<f32>,
    /// Keys or values in float32 `[CHUNK, dim]`.
    wide: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// One head of one sequence's keys and values.
struct Head<'a, P> {
    pool: &'a [P],
    table: &'a [i32],
    layout: Layout,
    head: usize,
}

impl<P: Kept> Head<'_, P> {
    /// The sums for the queries over their spans of positions.
    fn attend(&self, path: Path, scratch: &mut Scratch) {
        let Scratch { queries, spans, sums, scores, columns, wide } = scratch;
        let dim = self.layout.head_dim;
        let low = spans.iter().map(|span| span.0).min().unwrap_or(0);
        let high = spans.iter().map(|span| span.1).max().unwrap_or(0);
        let count = high - low;
        scores.resize(scores.len().max(spans.len() * count), 0.0);
        let scores = &mut scores[..spans.len() * count];
        columns.resize(dim * CHUNK, 0.0);
        wide.resize(dim * CHUNK, 0.0);
        self.chunks(low..high, 0, wide, |positions, keys| {
            let at = positions.start - low;
            // columns in memory are worth their while where they are used more than once
            if spans.len() <= ROWS {
                return path.scores(queries, keys, positions.len(), dim, &mut scores[at..], count);
            }
            path.transpose(&keys[..positions.len()], dim, columns, CHUNK);
            let columns: Vec<&[f32]> = columns.chunks_exact(CHUNK).collect();
            for (tile, (queries, spans)) in queries.chunks(ROWS * dim).zip(spans.chunks(ROWS)).enumerate() {
                if spans.iter().all(|span| span.1 <= positions.start || span.0 >= positions.end) {
                    continue;
                }
                let mut found = [0.0; ROWS * CHUNK];
                path.weighted(queries, dim, &columns, dim, CHUNK, &mut found[..spans.len() * CHUNK]);
                for (query, found) in found.chunks_exact(CHUNK).take(spans.len()).enumerate() {
                    let scores = &mut scores[(tile * ROWS + query) * count + at..];
                    scores[..positions.len()].copy_from_slice(&found[..positions.len()]);
                }
            }
        });
        for (scores, &(first, end)) in scores.chunks_exact_mut(count).zip(spans.iter()) {
            math::softmax(&mut scores[first - low..end - low]);
        }
        sums.clear();
        sums.resize(spans.len() * dim, 0.0);
        self.chunks(low..high, 1, wide, |positions, values| {
            let tiles = sums.chunks_mut(ROWS * dim).zip(spans.chunks(ROWS)).zip(scores.chunks(ROWS * count));
            for ((sums, spans), shares) in tiles {
                // what all queries see at once, and before and after that each what it sees alone
                let (first, end) =
                    spans.iter().fold((0, usize::MAX), |all, span| (all.0.max(span.0), all.1.min(span.1)));
                let first = first.clamp(positions.start, positions.end);
                let common = first..end.clamp(first, positions.end);
                let weigh = |shares: &[f32], seen: Range<usize>, sums: &mut [f32]| {
                    let values = &values[seen.start - positions.start..];
                    path.weighted(&shares[seen.start - low..], count, values, seen.len(), dim, sums);
                };
                let alone = |sums: &mut [f32], from: usize, to: usize| {
                    for (query, (sums, span)) in sums.chunks_exact_mut(dim).zip(spans).enumerate() {
                        let (from, to) = (from.max(span.0), to.min(span.1));
                        if from < to {
                            weigh(&shares[query * count..], from..to, sums);
                        }
                    }
                };
                alone(sums, positions.start, common.start);
                weigh(shares, common.clone(), sums);
                alone(sums, common.end, positions.end);
            }
        });
    }

    /// Calls `each` with runs of the positions and their keys (`side` 0) or values (1), in order, and behind those
    /// perhaps what comes next.
    fn chunks(
        &self,
        positions: Range<usize>,
        side: usize,
        wide: &mut [f32],
        mut each: impl FnMut(Range<usize>, &[&[f32]]),
    ) {
        for start in positions.clone().step_by(CHUNK) {
            let end = positions.end.min(start + CHUNK);
            let (mut kept, mut rows): ([&[P]; CHUNK + AHEAD], [&[f32]; CHUNK]) = ([&[]; CHUNK + AHEAD], [&[]; CHUNK]);
            let mut count = 0;
            let mut add = |place| {
                kept[count] = place;
                count += 1;
            };
            self.places(start..end, side).for_each(&mut add);
            if end < positions.end {
                self.places(end..positions.end.min(end + AHEAD), side).for_each(add);
            } else if side == 0 {
                self.places(positions.start..positions.end.min(positions.start + AHEAD), 1).for_each(add);
            }
            each(start..end, P::widen(&kept[..count], end - start, self.layout.head_dim, wide, &mut rows));
        }
    }

    /// Where the keys (`side` 0) or values (1) of some positions are, in order.
    fn places(&self, positions: Range<usize>, side: usize) -> impl Iterator<Item = &[P]> {
        let Layout { layer, block_tokens, head_dim, .. } = self.layout;
        let (token, page, room) = (self.layout.token::<P>(), self.layout.page::<P>(), P::room(head_dim));
        let base = (2 * layer + side) * block_tokens * token + self.head * room;
        let blocks = positions.start / block_tokens..positions.end.div_ceil(block_tokens);
        blocks.flat_map(move |block| {
            let begin = block * block_tokens;
            let slots = positions.start.max(begin) - begin..(positions.end - begin).min(block_tokens);
            let start = self.table[block] as usize * page + base + slots.start * token;
            self.pool[start..].chunks(token).take(slots.len()).map(move |place| &place[..room])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { layer: 1, layers: 2, block_tokens: 3, heads: 4, key_value_heads: 2, head_dim: 5 };

    #[test]
    fn tables_and_positions_that_lead_outside_are_errors() {
        let pool = vec![0.0f32; 2 * LAYOUT.page::<f32>()];
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
        let mut pool = vec![0.0f32; 2 * LAYOUT.page::<f32>()];
        // Layer 1, value of slot 2 in page 1, both heads.
        let at = LAYOUT.page::<f32>() + (3 * 3 + 2) * 10;
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
