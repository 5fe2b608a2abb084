//! What adapters add to linear layers: the matrices of each row's own adapter, for all layers of one input in one loop.
//!
//! ```text
//! y_t += B (scale · A x_t),   A [rank, in],  B [out, rank]
//! ```
//! A row's sums have an order of their own, so its result does not depend on what else is in the batch. With B stored by
//! columns, `[rank, out]`, as adapters in the pool are, a row of y is the sum of `rank` of them, with no lanes left to
//! add up; stored by rows, it is turned around first, with the same result to the bit.
//!
//! An adapter that is alone is not merged into the weights for as long: of a token's time it takes three to six parts of a
//! hundred (rank 16 on attention's layers of SmolLM2 in Q4_1, `bench serve_adapters`). Blocks of few bits cannot hold the
//! merged weights, with dense ones a token takes longer than with the adapter beside the blocks, and what is subtracted
//! again when others come leaves other bits than there were.
//!
//! Source: Chen et al., Punica: Multi-Tenant LoRA Serving, 2023, arXiv 2310.18547.

use std::cell::RefCell;
use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::quant::matmul::{Path, ROWS};
use crate::team::{Shared, Team};

/// A LoRA on a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Lora<'a> {
    a: &'a [f32],
    b: &'a [f32],
    by_columns: bool,
    inputs: usize,
    outputs: usize,
    scale: f32,
}

impl<'a> Lora<'a> {
    /// A `[rank, inputs]`, B `[outputs, rank]`, or `[rank, outputs]` where it is stored by columns, and the factor.
    ///
    /// # Errors
    /// Sizes that don't agree.
    pub fn new(
        (a, inputs): (&'a [f32], usize),
        (b, outputs): (&'a [f32], usize),
        by_columns: bool,
        scale: f32,
    ) -> Result<Self> {
        let rank = a.len().checked_div(inputs).unwrap_or(0);
        if a.len() != rank * inputs || outputs == 0 || b.len() != rank * outputs {
            return Err(Error::failure("adapter: expected a pair of matrices of one rank, got others"));
        }
        Ok(Self { a, b, by_columns, inputs, outputs, scale })
    }

    /// Whether it is one on a linear layer of this shape.
    pub fn fits(&self, outputs: usize, inputs: usize) -> bool {
        (self.outputs, self.inputs) == (outputs, inputs)
    }
}

/// What adapters add to linear layers from a number on.
#[derive(Clone, Copy)]
pub(super) struct Added<'b, 'a> {
    /// Of each adapter, what it adds to each linear layer.
    pub loras: &'b HashMap<i32, Vec<Option<Lora<'a>>>>,
    /// The first layer's number.
    pub first: usize,
}

impl<'a> Added<'_, 'a> {
    fn get(&self, adapter: i32, linear: usize) -> Option<Lora<'a>> {
        self.loras.get(&adapter).and_then(|loras| loras.get(self.first + linear).copied().flatten())
    }
}

/// Rows of a task: few, so that both a batch of single tokens and a long prompt make work for all threads.
const TASK_ROWS: usize = 32;

/// What a thread writes before it reads, kept from one task to the next.
#[derive(Default)]
struct Scratch {
    /// Rows of x that are not neighbours.
    x: Vec<f32>,
    /// scale · A x.
    low: Vec<f32>,
    /// Rows of y.
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Adds what the adapters of the spans add to layers with so many `outputs`, side by side in y `[T, Σ outputs]`.
///
/// Rows under one adapter are computed together wherever they are in the batch: its matrices are read once for them.
pub(super) fn add_loras(
    team: &Team,
    outputs: impl Iterator<Item = usize>,
    added: Added<'_, '_>,
    x: &[f32],
    spans: &[(i32, usize, usize)],
    y: &mut [f32],
) {
    let known = spans.iter().filter(|(adapter, ..)| added.loras.contains_key(adapter));
    let mut order: Vec<(i32, usize)> =
        known.flat_map(|&(adapter, first, end)| (first..end).map(move |row| (adapter, row))).collect();
    if order.is_empty() {
        return;
    }
    order.sort_unstable();
    let (mut tasks, mut width) = (Vec::new(), 0);
    for (number, outputs) in outputs.enumerate() {
        for rows in order.chunk_by(|one, other| one.0 == other.0) {
            let Some(lora) = added.get(rows[0].0, number) else { continue };
            tasks.extend(rows.chunks(TASK_ROWS).map(|rows| (lora, rows, width)));
        }
        width += outputs;
    }
    let (path, y) = (Path::best(), Shared::new(y));
    team.each(tasks.len(), &|index| {
        let (lora, rows, begin) = &tasks[index];
        let (rank, inputs, outputs) = (lora.a.len() / lora.inputs, lora.inputs, lora.outputs);
        let turned: Vec<f32>;
        let b = if lora.by_columns {
            lora.b
        } else {
            turned = by_columns(path, lora.b, rank, outputs);
            &turned
        };
        let b: Vec<&[f32]> = b.chunks_exact(outputs).collect();
        SCRATCH.with_borrow_mut(|scratch| {
            for rows in rows.chunks(ROWS) {
                let (first, last) = (rows[0].1, rows[rows.len() - 1].1);
                let x = if last - first == rows.len() - 1 {
                    &x[first * inputs..(last + 1) * inputs]
                } else {
                    scratch.x.clear();
                    rows.iter().for_each(|&(_, row)| scratch.x.extend_from_slice(&x[row * inputs..][..inputs]));
                    &scratch.x
                };
                low(path, lora, rank, x, &mut scratch.low);
                // SAFETY: these columns of a row are one task's.
                let part = |row: usize| unsafe { y.part(row * width + begin..row * width + begin + outputs) };
                if let [(_, row)] = rows {
                    path.weighted(&scratch.low, rank, &b, rank, outputs, part(*row));
                    continue;
                }
                scratch.sums.clear();
                rows.iter().for_each(|&(_, row)| scratch.sums.extend_from_slice(part(row)));
                path.weighted(&scratch.low, rank, &b, rank, outputs, &mut scratch.sums);
                for (&(_, row), sums) in rows.iter().zip(scratch.sums.chunks_exact(outputs)) {
                    part(row).copy_from_slice(sums);
                }
            }
        });
    });
}

/// scale · A x for a few rows `[up to ROWS, in]`: `[rows, rank]`.
fn low(path: Path, lora: &Lora<'_>, rank: usize, x: &[f32], low: &mut Vec<f32>) {
    low.clear();
    low.resize(x.len() / lora.inputs * rank, 0.0);
    let mut found = [[0.0; 4]; ROWS];
    for first in (0..rank).step_by(4) {
        let rows = &lora.a[first * lora.inputs..rank.min(first + 4) * lora.inputs];
        path.dots(x, rows, lora.inputs, &mut found);
        for (low, found) in low.chunks_exact_mut(rank).zip(&found) {
            low[first..].iter_mut().zip(found).for_each(|(low, found)| *low = lora.scale * found);
        }
    }
}

/// B `[out, rank]` as `[rank, out]`.
fn by_columns(path: Path, b: &[f32], rank: usize, outputs: usize) -> Vec<f32> {
    let mut turned = vec![0.0; b.len()];
    let rows: Vec<&[f32]> = b.chunks_exact(rank.max(1)).collect();
    path.transpose(&rows, rank, &mut turned, outputs);
    turned
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A, B and the factor.
    type Given = (Vec<f32>, Vec<f32>, f32);

    /// Numbers that look random.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|index| ((index * 7919 + seed * 104_729) % 1009) as f32 / 500.0 - 1.0).collect()
    }

    #[test]
    fn each_row_gets_its_own_whatever_the_others_and_however_b_lies() {
        let (inputs, outputs) = (19, [7, 23]);
        let made: Vec<(i32, Vec<Given>)> = [(3, 5), (8, 1), (9, 16)]
            .into_iter()
            .map(|(adapter, rank)| {
                let one = |outputs: usize| {
                    (numbers(rank * inputs, rank), numbers(outputs * rank, rank + outputs), 0.5 * rank as f32)
                };
                (adapter, outputs.map(one).to_vec())
            })
            .collect();
        let turned: Vec<Vec<Vec<f32>>> = made
            .iter()
            .map(|(_, pair)| {
                let turn = |(number, (a, b, _)): (usize, &Given)| {
                    by_columns(Path::Portable, b, a.len() / inputs, outputs[number])
                };
                pair.iter().enumerate().map(turn).collect()
            })
            .collect();
        let of = |columns: bool| -> HashMap<i32, Vec<Option<Lora<'_>>>> {
            let adapters = made.iter().zip(&turned).map(|((adapter, pair), turned)| {
                let one = |number: usize| {
                    let (a, b, scale) = &pair[number];
                    let b = if columns { &turned[number] } else { b };
                    Lora::new((a, inputs), (b, outputs[number]), columns, *scale).unwrap()
                };
                // the second adapter leaves the first layer alone
                (*adapter, vec![(*adapter != 8).then(|| one(0)), Some(one(1))])
            });
            adapters.collect()
        };
        let width: usize = outputs.iter().sum();
        let spans =
            [(3, 0, 1), (-1, 1, 4), (8, 4, 12), (9, 12, 52), (77, 52, 53), (3, 53, 54), (9, 54, 57), (3, 57, 58)];
        let x = numbers(58 * inputs, 1);
        let before = numbers(58 * width, 2);
        let run = |loras: &HashMap<i32, Vec<Option<Lora<'_>>>>, x: &[f32], spans: &[(i32, usize, usize)], y: &[f32]| {
            let mut y = y.to_vec();
            Team::run(|team| add_loras(team, outputs.into_iter(), Added { loras, first: 0 }, x, spans, &mut y));
            y
        };
        let together = run(&of(true), &x, &spans, &before);
        assert_eq!(together, run(&of(false), &x, &spans, &before));
        for (adapter, first, end) in spans {
            for row in first..end {
                let alone = (&x[row * inputs..][..inputs], &before[row * width..][..width]);
                let found = &together[row * width..][..width];
                assert_eq!(found, run(&of(true), alone.0, &[(adapter, 0, 1)], alone.1));
                let pair = made.iter().find(|made| made.0 == adapter).map(|made| &made.1);
                for (column, found) in found.iter().enumerate() {
                    let (number, output) = if column < outputs[0] { (0, column) } else { (1, column - outputs[0]) };
                    let more = pair.filter(|_| adapter != 8 || number == 1).map_or(0.0, |pair| {
                        let (a, b, scale) = &pair[number];
                        let rank = a.len() / inputs;
                        let low = |r: usize| -> f64 {
                            (0..inputs).map(|i| f64::from(a[r * inputs + i]) * f64::from(alone.0[i])).sum()
                        };
                        f64::from(*scale) * (0..rank).map(|r| f64::from(b[output * rank + r]) * low(r)).sum::<f64>()
                    });
                    let expected = f64::from(alone.1[column]) + more;
                    assert!((f64::from(*found) - expected).abs() < 1e-3, "{row} {column}: {found} {expected}");
                }
            }
        }
    }

    #[test]
    fn sizes_that_do_not_agree_are_errors() {
        let numbers = numbers(60, 0);
        assert!(Lora::new((&numbers[..20], 10), (&numbers[..6], 3), false, 1.0).unwrap().fits(3, 10));
        for (a, inputs, b, outputs) in [(21, 10, 6, 3), (20, 10, 7, 3), (20, 0, 6, 3), (20, 10, 6, 0)] {
            assert!(Lora::new((&numbers[..a], inputs), (&numbers[..b], outputs), true, 1.0).is_err());
        }
    }
}
