//! A decoder's layers for serving, as one call: the same steps as the model's definition, without gradients.
//!
//! ```text
//! x ← x + o(attention(rope(q h), rope(k h), v h)),   h = norm(x)
//! x ← x + down(silu(gate h) ⊙ up h),                 h = norm(x)
//! ```
//! Every row is computed by itself, in an order that depends on its own sequence alone (see [`crate::quant::matmul`] and
//! [`attention`]), so a row's result is the same bits whatever else is in the batch.

pub mod attention;
pub mod kept;
pub mod lora;
pub(crate) mod math;
pub mod pages;
pub mod step;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use self::attention::{Layout, Rows, paged_attention};
use self::kept::Kept;
use self::lora::{Added, Lora, add_loras};
use crate::error::{Error, Result};
use crate::quant::int8::{self, Packed};
use crate::quant::matmul::{Matrix, matmul};
use crate::team::{Shared, Team};

/// The matrix of a linear layer.
#[derive(Clone, Debug)]
pub enum Weight<'a> {
    /// Multiplied with x as it is.
    Exact(Matrix<'a>),
    /// Multiplied with x rounded to 8 bits.
    Packed(Arc<Packed>),
}

impl Weight<'_> {
    fn rows(&self) -> usize {
        match self {
            Self::Exact(matrix) => matrix.rows(),
            Self::Packed(packed) => packed.rows(),
        }
    }

    fn columns(&self) -> usize {
        match self {
            Self::Exact(matrix) => matrix.columns(),
            Self::Packed(packed) => packed.columns(),
        }
    }
}

/// A linear layer: y = x Wᵀ + b.
#[derive(Clone, Debug)]
pub struct Linear<'a> {
    /// W `[out, in]`.
    pub weight: Weight<'a>,
    /// b `[out]`.
    pub bias: Option<&'a [f32]>,
}

/// A layer's weights.
#[derive(Clone, Debug)]
pub struct Layer<'a> {
    /// Weights of the norms before attention and before the feed-forward layer `[d]`.
    pub norms: [&'a [f32]; 2],
    /// Weights of the norms of queries and of keys `[head_dim]`.
    pub head_norms: Option<[&'a [f32]; 2]>,
    /// Tokens that a token sees, itself included.
    pub window: Option<usize>,
    /// Queries, keys, values.
    pub qkv: [Linear<'a>; 3],
    /// Attention's output.
    pub o: Linear<'a>,
    /// Gate and up.
    pub gate_up: [Linear<'a>; 2],
    /// Back to the width of the model.
    pub down: Linear<'a>,
}

/// Linear layers of a layer.
const LINEARS: usize = 7;

impl<'a> Layer<'a> {
    fn linears(&self) -> impl Iterator<Item = &Linear<'a>> {
        self.qkv.iter().chain([&self.o]).chain(&self.gate_up).chain([&self.down])
    }
}

/// What turns hidden states into logits.
#[derive(Clone, Debug)]
pub struct Head<'a> {
    /// The weight of the last norm `[d]`.
    pub norm: &'a [f32],
    /// From the width of the model to the vocabulary.
    pub linear: Linear<'a>,
}

/// All layers and their sizes.
#[derive(Debug)]
pub struct Layers<'a> {
    layers: Vec<Layer<'a>>,
    head: Option<Head<'a>>,
    /// What adapters add to each linear layer, from the first layer's q to its down, and so on, the head's last.
    loras: HashMap<i32, Vec<Option<Lora<'a>>>>,
    width: usize,
    inner: usize,
    heads: usize,
    key_value_heads: usize,
    head_dim: usize,
    epsilon: f32,
}

/// What is computed: T rows of sequences that continue in a cache.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The rotary table of each row's position `[T, head_dim / 2]`.
    pub cos: &'a [f32],
    /// The same.
    pub sin: &'a [f32],
    /// Positions, sequences and pages.
    pub rows: Rows<'a>,
    /// Spans of rows under one adapter: (adapter, first row, row after the last).
    pub spans: &'a [(i32, usize, usize)],
}

impl<'a> Layers<'a> {
    /// # Errors
    /// Sizes that don't agree.
    pub fn new(
        layers: Vec<Layer<'a>>,
        head: Option<Head<'a>>,
        heads: usize,
        key_value_heads: usize,
        head_dim: usize,
        epsilon: f32,
    ) -> Result<Self> {
        let (width, inner) = layers.first().map_or((0, 0), |layer| (layer.norms[0].len(), layer.down.weight.columns()));
        let loras = HashMap::new();
        let made = Self { layers, head, loras, width, inner, heads, key_value_heads, head_dim, epsilon };
        made.layers.iter().enumerate().try_for_each(|(index, layer)| {
            made.check(layer).map_err(|error| Error::failure(format!("layer {index}: {}", error.message)))
        })?;
        if let Some(head) = &made.head {
            check_linear(&head.linear, head.linear.weight.rows(), width)?;
            if head.norm.len() != width {
                return Err(Error::failure(format!("head: expected a norm of {width}, got {}", head.norm.len())));
            }
        }
        if key_value_heads == 0 || !heads.is_multiple_of(key_value_heads) || !head_dim.is_multiple_of(2) {
            return Err(Error::failure(format!(
                "expected heads in groups and of even width, got {heads}, {key_value_heads} and {head_dim}"
            )));
        }
        Ok(made)
    }

    /// Puts an adapter on the layers: what it adds to each linear layer, from the first layer's q to its down, and so on,
    /// the head's last where there is one.
    ///
    /// # Errors
    /// Sizes that don't agree.
    pub fn add_adapter(&mut self, adapter: i32, loras: Vec<Option<Lora<'a>>>) -> Result<()> {
        let linears = self.layers.iter().flat_map(Layer::linears).chain(self.head.iter().map(|head| &head.linear));
        let (mut count, mut right) = (0, true);
        for (linear, lora) in linears.zip(&loras) {
            count += 1;
            right &= lora.is_none_or(|lora| {
                let (outputs, inputs) = (linear.weight.rows(), linear.weight.columns());
                lora.fits(outputs, inputs)
            });
        }
        if !right || count != self.linears() || count != loras.len() {
            return Err(Error::failure("adapter: expected a pair of matrices that fit each linear layer, got others"));
        }
        self.loras.insert(adapter, loras);
        Ok(())
    }

    /// Linear layers, the head's among them where there is one.
    pub fn linears(&self) -> usize {
        LINEARS * self.layers.len() + usize::from(self.head.is_some())
    }

    /// Takes an adapter off the layers.
    pub fn remove_adapter(&mut self, adapter: i32) {
        self.loras.remove(&adapter);
    }

    /// Whether rows under this adapter can be computed: -1 is none.
    pub fn knows(&self, adapter: i32) -> bool {
        adapter < 0 || self.loras.contains_key(&adapter)
    }

    /// What the adapters of the spans add to the linear layers from this number on.
    fn added(&self, first: usize) -> Added<'_, 'a> {
        Added { loras: &self.loras, first }
    }

    /// Whether there is a head.
    pub fn has_head(&self) -> bool {
        self.head.is_some()
    }

    fn check(&self, layer: &Layer<'_>) -> Result<()> {
        let (q, kv) = (self.heads * self.head_dim, self.key_value_heads * self.head_dim);
        let [w_q, w_k, w_v] = &layer.qkv;
        let [gate, up] = &layer.gate_up;
        for (linear, outputs, inputs) in [
            (w_q, q, self.width),
            (w_k, kv, self.width),
            (w_v, kv, self.width),
            (&layer.o, self.width, q),
            (gate, self.inner, self.width),
            (up, self.inner, self.width),
            (&layer.down, self.width, self.inner),
        ] {
            check_linear(linear, outputs, inputs)?;
        }
        let norms = layer.norms.iter().all(|norm| norm.len() == self.width);
        if !norms || layer.head_norms.iter().flatten().any(|norm| norm.len() != self.head_dim) {
            return Err(Error::failure("expected norms as wide as what they norm, got others"));
        }
        Ok(())
    }

    /// The hidden states `[T, d]` after all layers, in place; keys and values of the rows go to `pool`.
    ///
    /// # Errors
    /// Sizes that don't agree, or pages outside the pool.
    pub fn forward<P: Kept>(
        &self,
        team: &Team,
        batch: Batch<'_>,
        block_tokens: usize,
        pool: &mut [P],
        x: &mut [f32],
    ) -> Result<()> {
        let count = batch.rows.positions.len();
        let half = count * self.head_dim / 2;
        if x.len() != count * self.width || batch.cos.len() != half || batch.sin.len() != half {
            return Err(Error::failure(format!(
                "expected {count} rows of {} and their angles, got others",
                self.width
            )));
        }
        if batch.spans.iter().any(|&(_, first, end)| first > end || end > count) {
            return Err(Error::failure(format!("expected spans of {count} rows, got {:?}", batch.spans)));
        }
        let (q, kv) = (self.heads * self.head_dim, self.key_value_heads * self.head_dim);
        let mut layout = Layout {
            layer: 0,
            layers: self.layers.len(),
            block_tokens,
            heads: self.heads,
            key_value_heads: self.key_value_heads,
            head_dim: self.head_dim,
        };
        let slots = slots::<P>(batch.rows, layout, pool.len())?;
        let (place_room, half_page) = (P::room(self.head_dim), block_tokens * layout.token::<P>());
        let sizes = [self.width, self.width, q + 2 * kv, q, q, 2 * self.inner, self.inner].map(|size| count * size);
        let mut room = Room::of(sizes.iter().sum());
        let [h, more, qkv, queries, mixed, gate_up, acted] = room.parts(sizes);
        if let Some(first) = self.layers.first() {
            self.add_and_norm(team, None, Some(first.norms[0]), x, h);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            layout.layer = index;
            let first = index * LINEARS;
            apply(team, &layer.qkv, self.added(first), h, batch.spans, qkv)?;
            self.turn(team, layer, batch, qkv, queries);
            for (parts, slot) in qkv.chunks_exact(q + 2 * kv).zip(&slots) {
                let at = slot + index * 2 * half_page;
                for (side, numbers) in [&parts[q..q + kv], &parts[q + kv..]].into_iter().enumerate() {
                    let places = pool[at + side * half_page..].chunks_exact_mut(place_room);
                    numbers.chunks_exact(self.head_dim).zip(places).for_each(|(head, place)| P::keep(head, place));
                }
            }
            let scale = (self.head_dim as f32).powf(-0.5);
            paged_attention(team, queries, pool, batch.rows, layout, scale, layer.window, mixed)?;
            apply(team, std::slice::from_ref(&layer.o), self.added(first + 3), mixed, batch.spans, more)?;
            self.add_and_norm(team, Some(more), Some(layer.norms[1]), x, h);
            apply(team, &layer.gate_up, self.added(first + 4), h, batch.spans, gate_up)?;
            swiglu(team, self.inner, gate_up, acted);
            apply(team, std::slice::from_ref(&layer.down), self.added(first + 6), acted, batch.spans, more)?;
            let next = self.layers.get(index + 1).map(|next| next.norms[0]);
            self.add_and_norm(team, Some(more), next, x, h);
        }
        Ok(())
    }

    /// x ← x + more, then h = norm(x) by the weight of a norm.
    fn add_and_norm(&self, team: &Team, more: Option<&[f32]>, norm: Option<&[f32]>, x: &mut [f32], h: &mut [f32]) {
        let (count, width) = (x.len() / self.width.max(1), self.width);
        let (all_x, all_h) = (Shared::new(x), Shared::new(h));
        by_rows(team, count, &|rows| {
            let places = rows.start * width..rows.end * width;
            // SAFETY: each row is one task's.
            let (x, h) = unsafe { (all_x.part(places.clone()), all_h.part(places.clone())) };
            if let Some(more) = more {
                add(x, &more[places]);
            }
            if let Some(norm) = norm {
                math::rms_norm(x, norm, self.epsilon, h);
            }
        });
    }

    /// Norms the heads of queries and keys where there are such norms, and rotates them; queries go to a place of their own.
    fn turn(&self, team: &Team, layer: &Layer<'_>, batch: Batch<'_>, qkv: &mut [f32], queries: &mut [f32]) {
        let (q, kv) = (self.heads * self.head_dim, self.key_value_heads * self.head_dim);
        let (width, half) = (q + 2 * kv, self.head_dim / 2);
        let count = batch.rows.positions.len();
        let (all, all_queries) = (Shared::new(qkv), Shared::new(queries));
        by_rows(team, count, &|rows| {
            for row in rows {
                // SAFETY: each row is one task's.
                let heads = unsafe { all.part(row * width..row * width + q + kv) };
                if let Some([q_norm, k_norm]) = layer.head_norms {
                    math::norm_heads(&mut heads[..q], q_norm, self.epsilon);
                    math::norm_heads(&mut heads[q..], k_norm, self.epsilon);
                }
                let angles = row * half..(row + 1) * half;
                math::rotate(heads, self.head_dim, &batch.cos[angles.clone()], &batch.sin[angles]);
                // SAFETY: as above.
                unsafe { all_queries.write(row * q, &heads[..q]) };
            }
        });
    }

    /// The logits `[rows, vocabulary]` of some rows of hidden states `x` `[T, d]`, as [`Layers::forward`] leaves them.
    ///
    /// # Errors
    /// Layers that were made without a head, sizes that don't agree, or rows that don't rise within `x`.
    pub fn logits(
        &self,
        team: &Team,
        spans: &[(i32, usize, usize)],
        rows: &[i32],
        x: &[f32],
        logits: &mut [f32],
    ) -> Result<()> {
        let head = self.head.as_ref().ok_or_else(|| Error::failure("logits: expected a head, got none"))?;
        let vocabulary = head.linear.weight.rows();
        let inside = rows.iter().all(|&row| row >= 0 && (row as usize) < x.len() / self.width.max(1));
        if !inside || !rows.is_sorted() || logits.len() != rows.len() * vocabulary {
            return Err(Error::failure(format!(
                "logits: expected {} rising rows of {vocabulary}, got {rows:?} and room for {}",
                rows.len(),
                logits.len()
            )));
        }
        let chosen: Vec<f32> =
            rows.iter().flat_map(|&row| &x[row as usize * self.width..][..self.width]).copied().collect();
        let mut h = vec![0.0; chosen.len()];
        math::rms_norm(&chosen, head.norm, self.epsilon, &mut h);
        let before = |end: usize| rows.partition_point(|&row| (row as usize) < end);
        let spans: Vec<_> = spans.iter().map(|&(adapter, first, end)| (adapter, before(first), before(end))).collect();
        let added = self.added(self.layers.len() * LINEARS);
        apply(team, std::slice::from_ref(&head.linear), added, &h, &spans, logits)
    }
}

/// Numbers between a layer's steps. A thread keeps those of a short step for the next one: fresh memory comes from the
/// system page by page, each of them cleared.
struct Room(Vec<f32>);

/// Numbers that a thread keeps at most.
const KEPT_ROOM: usize = 1 << 22;

thread_local! {
    static ROOM: RefCell<Vec<f32>> = RefCell::default();
}

impl Room {
    /// At least so many numbers, of any value.
    fn of(count: usize) -> Self {
        let mut kept = ROOM.take();
        if kept.len() < count {
            kept = vec![0.0; count];
        }
        Self(kept)
    }

    /// Parts of these sizes.
    fn parts<const N: usize>(&mut self, sizes: [usize; N]) -> [&mut [f32]; N] {
        let mut rest = &mut self.0[..];
        sizes.map(|size| {
            let part;
            (part, rest) = std::mem::take(&mut rest).split_at_mut(size);
            part
        })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.0.len() <= KEPT_ROOM {
            ROOM.set(std::mem::take(&mut self.0));
        }
    }
}

fn check_linear(linear: &Linear<'_>, outputs: usize, inputs: usize) -> Result<()> {
    let right = linear.weight.rows() == outputs
        && linear.weight.columns() == inputs
        && linear.bias.is_none_or(|bias| bias.len() == outputs);
    if right {
        return Ok(());
    }
    Err(Error::failure(format!("expected a linear layer from {inputs} to {outputs}, got another")))
}

/// Where the keys of each row in layer 0 stand in the pool; what is checked here, attention relies on as well.
fn slots<P: Kept>(rows: Rows<'_>, layout: Layout, pool: usize) -> Result<Vec<usize>> {
    let sequences = rows.cu_seqlens.len().saturating_sub(1);
    let blocks = rows.block_table.len() / sequences.max(1);
    let wrong = || Error::failure("expected rows whose pages are in the pool, got others");
    let mut found = Vec::with_capacity(rows.positions.len());
    for (sequence, ends) in rows.cu_seqlens.windows(2).enumerate() {
        for _ in ends[0]..ends[1] {
            let position =
                rows.positions.get(found.len()).and_then(|&at| usize::try_from(at).ok()).ok_or_else(wrong)?;
            let block = position / layout.block_tokens.max(1);
            let page = (block < blocks).then(|| rows.block_table.get(sequence * blocks + block)).flatten();
            let page = page.and_then(|&page| usize::try_from(page).ok()).ok_or_else(wrong)?;
            if (page + 1).checked_mul(layout.page::<P>()).is_none_or(|end| end > pool) {
                return Err(wrong());
            }
            found.push(page * layout.page::<P>() + position % layout.block_tokens * layout.token::<P>());
        }
    }
    if found.len() != rows.positions.len() {
        return Err(wrong());
    }
    Ok(found)
}

/// The outputs of several layers of one input, side by side: y `[T, Σ out]`.
fn apply(
    team: &Team,
    linears: &[Linear<'_>],
    added: Added<'_, '_>,
    x: &[f32],
    spans: &[(i32, usize, usize)],
    y: &mut [f32],
) -> Result<()> {
    let width: usize = linears.iter().map(|linear| linear.weight.rows()).sum();
    multiply(team, linears, x, width, y)?;
    let mut begin = 0;
    for linear in linears {
        let outputs = linear.weight.rows();
        if let Some(bias) = linear.bias {
            y.chunks_exact_mut(width).for_each(|y| add(&mut y[begin..begin + outputs], bias));
        }
        begin += outputs;
    }
    add_loras(team, linears.iter().map(|linear| linear.weight.rows()), added, x, spans, y);
    Ok(())
}

/// The products alone: together where all matrices are of one sort, as they mostly are.
fn multiply(team: &Team, linears: &[Linear<'_>], x: &[f32], width: usize, y: &mut [f32]) -> Result<()> {
    let (mut exact, mut packed) = (Vec::new(), Vec::new());
    for linear in linears {
        match &linear.weight {
            Weight::Exact(matrix) => exact.push(*matrix),
            Weight::Packed(matrix) => packed.push(&**matrix),
        }
    }
    match (exact.len(), packed.len()) {
        (_, 0) => return matmul(team, &exact, x, y),
        (0, _) => return int8::matmul(team, &packed, x, y),
        _ => {}
    }
    let mut begin = 0;
    for linear in linears {
        let (inputs, outputs) = (linear.weight.columns(), linear.weight.rows());
        let mut alone = vec![0.0; x.len() / inputs.max(1) * outputs];
        multiply(team, std::slice::from_ref(linear), x, outputs, &mut alone)?;
        for (y, alone) in y.chunks_exact_mut(width).zip(alone.chunks_exact(outputs)) {
            y[begin..begin + outputs].copy_from_slice(alone);
        }
        begin += outputs;
    }
    Ok(())
}

fn add(x: &mut [f32], more: &[f32]) {
    x.iter_mut().zip(more).for_each(|(x, more)| *x += more);
}

/// silu(gate) ⊙ up.
fn swiglu(team: &Team, inner: usize, gate_up: &[f32], acted: &mut [f32]) {
    let count = acted.len() / inner.max(1);
    let all = Shared::new(acted);
    by_rows(team, count, &|rows| {
        for row in rows {
            // SAFETY: each row is one task's.
            let acted = unsafe { all.part(row * inner..(row + 1) * inner) };
            math::swiglu(&gate_up[2 * row * inner..2 * (row + 1) * inner], acted);
        }
    });
}

/// Deals out rows in runs.
fn by_rows(team: &Team, count: usize, work: &(dyn Fn(Range<usize>) + Sync)) {
    let run = count.div_ceil(2 * team.threads()).max(8);
    team.each(count.div_ceil(run), &|index| work(index * run..count.min((index + 1) * run)));
}
