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

use bytemuck::Pod;

use super::math::exp;
use crate::quant::matmul::{Path, ROWS};

use crate::team::Team;
use crate::{Error, Result};

/// A number as the cache keeps it.
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
    let width = layout.heads * layout.head_dim;
    let sequence_of = check(q.len(), out.len(), pool.len(), rows, layout)?;
    if window == Some(0) {
        return Err(Error::failure("paged attention: expected a window of at least 1 token, got 0"));
    }
    let blocks = rows.block_table.len() / rows.cu_seqlens.len().saturating_sub(1).max(1);
    let group = layout.heads / layout.key_value_heads;
    // Neighbouring rows of a sequence read the same keys: together as many queries as the products take at once.
    let most = (ROWS / group).max(1);
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for row in 0..sequence_of.len() {
        match runs.last_mut() {
            Some(run) if run.len() < most && sequence_of[run.start] == sequence_of[row] => run.end += 1,
            _ => runs.push(row..row + 1),
        }
    }
    let out = &Out(out.as_mut_ptr());
    let task = |index: usize| {
        let (run, head) = (runs[index / layout.key_value_heads].clone(), index % layout.key_value_heads);
        let table = &rows.block_table[sequence_of[run.start] * blocks..][..blocks];
        let span = |row: usize| {
            let end = rows.positions[row] as usize + 1;
            (window.map_or(0, |window| end.saturating_sub(window)), end)
        };
        let (heads, dim) = (head * group..(head + 1) * group, layout.head_dim);
        let places: Vec<(usize, (usize, usize))> =
            run.flat_map(|row| heads.clone().map(move |head| (row * width + head * dim, span(row)))).collect();
        for places in places.chunks(ROWS) {
            let mut queries = [0.0; ROWS * MOST_DIM];
            for (query, (place, _)) in queries.chunks_exact_mut(dim).zip(places) {
                query.iter_mut().zip(&q[*place..]).for_each(|(query, q)| *query = q.wide() * scale);
            }
            let spans: Vec<_> = places.iter().map(|&(_, span)| span).collect();
            let mut sums = [0.0; ROWS * MOST_DIM];
            attend(&queries[..places.len() * dim], pool, table, layout, head, &spans, &mut sums);
            for (sum, (place, _)) in sums.chunks_exact(dim).zip(places) {
                for (at, &sum) in sum.iter().enumerate() {
                    // SAFETY: `place` is the beginning of a row's head in `out`, which is as long as q; a row's head
                    // belongs to one task.
                    unsafe { *out.at(place + at) = T::narrow(sum) };
                }
            }
        }
    };
    let work: usize = rows.positions.iter().map(|&position| position as usize + 1).sum::<usize>() * width;
    let count = runs.len() * layout.key_value_heads;
    if work < TASK {
        (0..count).for_each(task);
    } else {
        team.each(count, &task);
    }
    Ok(())
}

/// Where the tasks write, each to heads of rows of its own.
struct Out<T>(*mut T);
// SAFETY: tasks write disjoint elements (see there), and the slice behind outlives them.
unsafe impl<T: Send> Sync for Out<T> {}

impl<T> Out<T> {
    /// Element `index`.
    fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

/// The widest head.
const MOST_DIM: usize = 512;
/// Multiplications from which other threads are worth it: some microseconds.
const TASK: usize = 1 << 15;

/// Checks every length and index, so that what follows cannot leave its slices. The sequence of each row.
fn check(q: usize, out: usize, pool: usize, rows: Rows<'_>, layout: Layout) -> Result<Vec<usize>> {
    let wrong = |what: &str| Err(Error::failure(format!("paged attention: {what}")));
    let sizes = [layout.layers, layout.block_tokens, layout.heads, layout.key_value_heads, layout.head_dim];
    let page = sizes.iter().try_fold(2usize, |product, &size| product.checked_mul(size)).unwrap_or(0);
    if page == 0
        || layout.head_dim > MOST_DIM
        || layout.layer >= layout.layers
        || !layout.heads.is_multiple_of(layout.key_value_heads)
    {
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
    let mut sequence_of = Vec::with_capacity(rows.positions.len());
    for (sequence, ends) in rows.cu_seqlens.windows(2).enumerate() {
        if ends[0] as usize != sequence_of.len() || ends[1] < ends[0] || ends[1] as usize > rows.positions.len() {
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
        sequence_of.resize(ends[1] as usize, sequence);
    }
    if sequence_of.len() != rows.positions.len() {
        return wrong(&format!("expected cu_seqlens to end at {}, got {}", rows.positions.len(), sequence_of.len()));
    }
    Ok(sequence_of)
}

/// Up to [`ROWS`] queries `[n, head_dim]`, already scaled, of one head of keys and values: `sums` of the same shape.
fn attend<T: Value>(
    queries: &[f32],
    pool: &[T],
    table: &[i32],
    layout: Layout,
    head: usize,
    spans: &[(usize, usize)],
    sums: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn avx2<T: Value>(
            queries: &[f32],
            pool: &[T],
            table: &[i32],
            layout: Layout,
            head: usize,
            spans: &[(usize, usize)],
            sums: &mut [f32],
        ) {
            body(queries, pool, table, layout, head, spans, sums);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the machine has the features that the function is compiled for, as was just asked.
            return unsafe { avx2(queries, pool, table, layout, head, spans, sums) };
        }
    }
    body(queries, pool, table, layout, head, spans, sums);
}

#[inline(always)]
fn body<T: Value>(
    queries: &[f32],
    pool: &[T],
    table: &[i32],
    layout: Layout,
    head: usize,
    spans: &[(usize, usize)],
    sums: &mut [f32],
) {
    thread_local! {
        static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let (dim, token, page) = (layout.head_dim, layout.token(), layout.page());
    let half = layout.block_tokens * token;
    let base = layout.layer * 2 * half + head * dim;
    let place = |position: usize| {
        table[position / layout.block_tokens] as usize * page + base + position % layout.block_tokens * token
    };
    let low = spans.iter().map(|span| span.0).min().unwrap_or(0);
    let high = spans.iter().map(|span| span.1).max().unwrap_or(0);
    let (count, path) = (high - low, Path::best());
    SCORES.with_borrow_mut(|scores| {
        scores.clear();
        scores.resize(spans.len() * count, 0.0);
        let (mut keys, mut found) = ([[0.0; MOST_DIM]; 4], [[0.0; 4]; ROWS]);
        for position in (low..high).step_by(4) {
            let kept = (high - position).min(4);
            for (key, position) in keys.iter_mut().zip(position..position + kept) {
                let stored = &pool[place(position)..][..dim];
                key.iter_mut().zip(stored).for_each(|(key, stored)| *key = stored.wide());
            }
            path.dots(queries, keys.each_ref().map(|key| &key[..dim]), dim, &mut found);
            for (scores, found) in scores.chunks_exact_mut(count).zip(&found) {
                scores[position - low..][..kept].copy_from_slice(&found[..kept]);
            }
        }
        for (scores, span) in scores.chunks_exact_mut(count).zip(spans) {
            softmax(&mut scores[span.0 - low..span.1 - low]);
        }
        // what all queries see, they go through together; what only some see, before and after that, one by one
        let common =
            spans.iter().map(|span| span.0).max().unwrap_or(0)..spans.iter().map(|span| span.1).min().unwrap_or(0);
        let common = common.start..common.end.max(common.start);
        for part in (0..dim).step_by(16) {
            let value = |position: usize| {
                let stored = &pool[place(position) + half + part..][..(dim - part).min(16)];
                let mut wide = [0.0; 16];
                wide.iter_mut().zip(stored).for_each(|(wide, stored)| *wide = stored.wide());
                wide
            };
            let mut lanes = [[0.0f32; 16]; ROWS];
            let one = |lanes: &mut [f32; 16], index: usize, positions: std::ops::Range<usize>| {
                for position in positions {
                    add(lanes, scores[index * count + position - low], &value(position));
                }
            };
            for (index, (lanes, span)) in lanes.iter_mut().zip(spans).enumerate() {
                one(lanes, index, span.0..common.start.min(span.1));
            }
            if spans.len() == ROWS {
                for position in common.clone() {
                    let value = value(position);
                    for (index, lanes) in lanes.iter_mut().enumerate() {
                        add(lanes, scores[index * count + position - low], &value);
                    }
                }
            } else {
                (0..spans.len()).for_each(|index| one(&mut lanes[index], index, common.clone()));
            }
            for (index, (lanes, span)) in lanes.iter_mut().zip(spans).enumerate() {
                one(lanes, index, common.end.max(span.0)..span.1);
            }
            for (sum, lanes) in sums.chunks_exact_mut(dim).zip(&lanes[..spans.len()]) {
                sum[part..].iter_mut().zip(lanes).for_each(|(sum, lane)| *sum = *lane);
            }
        }
    });
}

#[inline(always)]
fn add(lanes: &mut [f32; 16], share: f32, value: &[f32; 16]) {
    for lane in 0..16 {
        lanes[lane] = share.mul_add(value[lane], lanes[lane]);
    }
}

#[inline(always)]
fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for score in scores.iter_mut() {
        *score = exp(*score - largest);
    }
    let (whole, rest) = scores.as_chunks::<16>();
    let mut lanes = [0.0f32; 16];
    for scores in whole {
        for lane in 0..16 {
            lanes[lane] += scores[lane];
        }
    }
    let sum = lanes.iter().sum::<f32>() + rest.iter().sum::<f32>();
    for score in scores.iter_mut() {
        *score /= sum;
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
