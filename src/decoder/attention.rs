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

use std::sync::{Mutex, PoisonError};

use bytemuck::Pod;

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
    // One task: a row's query heads that share a head of keys and values.
    let task = |index: usize, out: &mut [T], scores: &mut Vec<f32>| {
        let (row, head) = (index / layout.key_value_heads, index % layout.key_value_heads);
        let table = &rows.block_table[sequence_of[row] * blocks..][..blocks];
        let end = rows.positions[row] as usize + 1;
        let span = (window.map_or(0, |window| end.saturating_sub(window)), end);
        let q = &q[row * width + head * group * layout.head_dim..][..group * layout.head_dim];
        attend(q, pool, table, layout, head, span, scale, out, scores);
    };
    // Heads are dealt out in runs that take about as long; each run is one thread's, and so are its outputs.
    let work: usize = rows.positions.iter().map(|&position| position as usize + 1).sum::<usize>() * width;
    let chunk = group * layout.head_dim;
    let heads = out.len() / chunk;
    let runs = (work / TASK).clamp(1, (8 * team.threads()).min(heads.max(1)));
    let mut parts: Vec<Mutex<&mut [T]>> = Vec::with_capacity(runs);
    let mut rest = out;
    for run in 0..runs {
        let (part, after) = rest.split_at_mut((heads * (run + 1) / runs - heads * run / runs) * chunk);
        parts.push(Mutex::new(part));
        rest = after;
    }
    team.each(runs, &|run| {
        let mut scores = Vec::new();
        let mut part = parts[run].lock().unwrap_or_else(PoisonError::into_inner);
        let first = heads * run / runs;
        part.chunks_exact_mut(chunk).enumerate().for_each(|(index, out)| task(first + index, out, &mut scores));
    });
    Ok(())
}

/// Multiplications that are worth a task of their own: some microseconds.
const TASK: usize = 1 << 15;

/// Checks every length and index, so that what follows cannot leave its slices. The sequence of each row.
fn check(q: usize, out: usize, pool: usize, rows: Rows<'_>, layout: Layout) -> Result<Vec<usize>> {
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

/// One row, the query heads of one head of keys and values.
#[allow(clippy::too_many_arguments)]
fn attend<T: Value>(
    q: &[T],
    pool: &[T],
    table: &[i32],
    layout: Layout,
    head: usize,
    span: (usize, usize),
    scale: f32,
    out: &mut [T],
    scores: &mut Vec<f32>,
) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        #[target_feature(enable = "avx2,fma")]
        #[allow(clippy::too_many_arguments)]
        fn wide<T: Value>(
            q: &[T],
            pool: &[T],
            table: &[i32],
            layout: Layout,
            head: usize,
            span: (usize, usize),
            scale: f32,
            out: &mut [T],
            scores: &mut Vec<f32>,
        ) {
            body(q, pool, table, layout, head, span, scale, out, scores);
        }
        // SAFETY: the machine has the features that the function is compiled for, as was just asked.
        return unsafe { wide(q, pool, table, layout, head, span, scale, out, scores) };
    }
    body(q, pool, table, layout, head, span, scale, out, scores);
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn body<T: Value>(
    q: &[T],
    pool: &[T],
    table: &[i32],
    layout: Layout,
    head: usize,
    (first, end): (usize, usize),
    scale: f32,
    out: &mut [T],
    scores: &mut Vec<f32>,
) {
    let (dim, token, page) = (layout.head_dim, layout.token(), layout.page());
    let half = layout.block_tokens * token;
    let base = layout.layer * 2 * half + head * dim;
    let group = q.len() / dim;
    let count = end - first;
    scores.clear();
    scores.resize(group * count, 0.0);
    let queries: Vec<f32> = q.iter().map(|value| value.wide() * scale).collect();
    let mut sums = vec![0.0f32; group * dim];
    let place = |position: usize| {
        table[position / layout.block_tokens] as usize * page + base + position % layout.block_tokens * token
    };
    for position in first..end {
        let key = &pool[place(position)..][..dim];
        for (query, scores) in queries.chunks_exact(dim).zip(scores.chunks_exact_mut(count)) {
            scores[position - first] = dot(query, key);
        }
    }
    for scores in scores.chunks_exact_mut(count) {
        softmax(scores);
    }
    for position in first..end {
        let value = &pool[place(position) + half..][..dim];
        for (sum, scores) in sums.chunks_exact_mut(dim).zip(scores.chunks_exact(count)) {
            let share = scores[position - first];
            for (sum, value) in sum.iter_mut().zip(value) {
                *sum += share * value.wide();
            }
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = T::narrow(sum);
    }
}

/// In 16 lanes, added up in a fixed order.
#[inline(always)]
fn dot<T: Value>(a: &[f32], b: &[T]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a, b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b.wide()).sum();
    for (a, b) in a.zip(b) {
        for lane in 0..16 {
            lanes[lane] += a[lane] * b[lane].wide();
        }
    }
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0] + rest
}

#[inline(always)]
fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - largest).exp();
        sum += *score;
    }
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
