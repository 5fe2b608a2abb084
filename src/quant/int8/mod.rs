//! Products with activations rounded to 8 bits, in whole numbers: for serving, where one asks for them.
//!
//! ```text
//! x_k ≈ s_b a_k,  a_k in −127..127,  s_b = max |x_k| / 127 over 32 values b
//! w_k = d_g (c_k − z) + m_g over groups g of 16 or 32 values
//! y = Σ_g (d_g s_b) Σ_k (c_k − z) a_k + m_g (s_b Σ_k a_k)
//! ```
//! The inner sums are whole numbers and exact; the outer one runs over the groups in order, fused. So a product is the
//! same bits on every machine, on any number of threads and whatever rows are beside it, as the exact ones are
//! ([`super::matmul`]), and it differs from those by the rounding of x alone.
//!
//! Matrices are packed for it once: 16 rows side by side, so that a vector holds four codes of each.

mod bytes;
mod kernel;

use std::cell::RefCell;
use std::ops::Range;

pub use kernel::Path;

use self::bytes::Bytes;

use super::Kind;
use crate::error::{Error, Result};
use crate::team::{Shared, Team};

/// Rows that stand side by side.
const TILE: usize = 16;
/// Values of a row that stand together; x has one scale for them.
const STEP: usize = 32;
/// Steps whose nested scales share a number.
const NEST: usize = 8;
/// Bytes of one bit of a step's codes.
const PLANE: usize = TILE * STEP / 8;
/// Multiplications that are worth a task of their own.
const TASK: usize = 1 << 18;

/// How a format's blocks fall apart into whole numbers: w = scale (code − zero) + offset.
#[derive(Clone, Copy, Debug)]
pub(super) struct IntegerForm {
    /// Values that share a scale and an offset: 16 or 32.
    pub group: usize,
    /// What stands for 0 when there are no offsets.
    pub zero: u8,
    /// Whether there are offsets.
    pub offsets: bool,
    /// What codes take: 2 to 6, or 8.
    pub bits: usize,
    /// Scales and offsets are whole numbers of 8 bits, to be taken times two numbers of half precision that 256 values
    /// share; else they are numbers of half precision themselves.
    pub nested: bool,
    /// What stands for each code of 4 bits, where codes are not the numbers themselves.
    pub table: Option<&'static [u8; 16]>,
    /// Takes a block apart.
    pub split: fn(block: &[u8], parts: &mut Parts),
}

/// A block, taken apart.
#[derive(Debug)]
pub(super) struct Parts {
    /// Each value's.
    pub codes: [u8; NEST * STEP],
    /// Each group's.
    pub scales: [f32; NEST * STEP / 16],
    /// Each group's, where there are any.
    pub offsets: [f32; NEST * STEP / 16],
    /// What scales are to be taken times, where they are nested.
    pub d: f32,
    /// What offsets are to be taken times, where they are nested.
    pub d_offset: f32,
}

impl IntegerForm {
    fn groups(&self) -> usize {
        STEP / self.group
    }

    /// Whether kernels take the same numbers of x for both.
    fn same_inputs(&self, other: &Self) -> bool {
        (self.group, self.zero, self.offsets) == (other.group, other.zero, other.offsets)
    }

    /// Scales, and offsets where there are any.
    fn kinds(&self) -> usize {
        if self.offsets { 2 } else { 1 }
    }

    fn number_bytes(&self) -> usize {
        if self.nested { 1 } else { 2 }
    }

    /// Steps that share what is above their scales: 1 where nothing is.
    fn nest(&self) -> usize {
        if self.nested { NEST } else { 1 }
    }

    /// Bytes that stand above so many steps.
    fn top_bytes(&self) -> usize {
        if self.nested { 2 * TILE * self.kinds() } else { 0 }
    }

    /// Bytes of 16 scales for each group of a step, and of as many offsets.
    fn head_bytes(&self) -> usize {
        self.groups() * TILE * self.number_bytes() * self.kinds()
    }

    /// Bytes of 32 values of 16 rows.
    fn step_bytes(&self) -> usize {
        self.head_bytes() + PLANE * self.bits
    }

    /// Bytes of 16 rows of so many steps.
    fn tile_bytes(&self, steps: usize) -> usize {
        steps / self.nest() * (self.top_bytes() + self.nest() * self.step_bytes())
    }

    /// Bits of a code that stand together; the others stand in planes of one bit.
    const fn base(bits: usize) -> usize {
        match bits {
            8 => 8,
            4.. => 4,
            _ => 2,
        }
    }
}

/// W `[rows, columns]`, packed.
///
/// For each 16 rows (zeros where there are fewer) and each 32 columns: scales `[groups, 16]`, offsets `[groups, 16]` where
/// there are any, then codes `[8, 16, 4]`: four of each row, then the next four. Of 4-bit codes, a byte of `[4, 16, 4]`
/// holds one of the first 16 columns in its low half, and the one 16 columns on in its high half; of 2-bit codes, a byte
/// of `[2, 16, 4]` holds four that are 8 columns apart. Codes of 3, 5 and 6 bits have their other bits behind, a plane
/// `[8, 16, 4]` each. Above 256 columns with nested scales stand what these are to be taken times, `[16]`, and the
/// same for offsets.
#[derive(Debug)]
pub struct Packed {
    integers: IntegerForm,
    rows: usize,
    columns: usize,
    bytes: Bytes,
}

impl Packed {
    /// Packs blocks; `None` for a format that isn't whole numbers.
    ///
    /// # Errors
    /// The bytes are not those of `rows` rows of whole blocks, or of rows that 32 doesn't divide.
    pub fn new(kind: Kind, blocks: &[u8], rows: usize, columns: usize) -> Result<Option<Self>> {
        let Some(integers) = kind.integer_form() else { return Ok(None) };
        let row_bytes = columns / kind.block_size() * kind.block_bytes();
        if !columns.is_multiple_of(kind.block_size()) || rows.checked_mul(row_bytes) != Some(blocks.len()) {
            return Err(Error::failure(format!(
                "{}: expected the blocks of {rows} rows of {columns} values, got {} bytes",
                kind.name(),
                blocks.len()
            )));
        }
        let tile_bytes = integers.tile_bytes(columns / STEP);
        let mut bytes = Bytes::zeros(rows.div_ceil(TILE) * tile_bytes)?;
        if tile_bytes > 0 {
            use rayon::prelude::*;
            let tiles = bytes.as_mut_slice().par_chunks_exact_mut(tile_bytes).zip(blocks.par_chunks(TILE * row_bytes));
            tiles.for_each(|(tile, rows)| pack_tile(kind, &integers, rows, row_bytes, tile));
        }
        Ok(Some(Self { integers, rows, columns, bytes }))
    }

    /// Outputs of the product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs of the product.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes that are held.
    pub fn nbytes(&self) -> usize {
        self.bytes.as_slice().len()
    }

    fn tiles(&self, tiles: Range<usize>) -> &[u8] {
        let bytes = self.integers.tile_bytes(self.columns / STEP);
        &self.bytes.as_slice()[tiles.start * bytes..tiles.end * bytes]
    }
}

fn pack_tile(kind: Kind, integers: &IntegerForm, rows: &[u8], row_bytes: usize, tile: &mut [u8]) {
    let (size, groups, width) = (kind.block_size(), integers.groups(), integers.number_bytes());
    let mut parts = Parts {
        codes: [0; NEST * STEP],
        scales: [0.0; NEST * STEP / 16],
        offsets: [0.0; NEST * STEP / 16],
        d: 1.0,
        d_offset: 1.0,
    };
    for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
        let nests = tile.chunks_exact_mut(integers.tile_bytes(size / STEP));
        for (nest, block) in nests.zip(row.chunks_exact(kind.block_bytes())) {
            (integers.split)(block, &mut parts);
            let (top, steps) = nest.split_at_mut(integers.top_bytes());
            for (d, value) in top.chunks_exact_mut(2 * TILE).zip([parts.d, parts.d_offset]) {
                d[2 * r..2 * r + 2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
            }
            for (index, step) in steps.chunks_exact_mut(integers.step_bytes()).enumerate() {
                let (head, body) = step.split_at_mut(integers.head_bytes());
                let of_step = index * groups..(index + 1) * groups;
                let numbers = parts.scales[of_step.clone()].iter().chain(&parts.offsets[of_step]);
                for (number, value) in head.chunks_exact_mut(TILE * width).zip(numbers) {
                    if integers.nested {
                        number[r] = (*value as i8).cast_unsigned();
                    } else {
                        number[2 * r..2 * r + 2].copy_from_slice(&half::f16::from_f32(*value).to_le_bytes());
                    }
                }
                pack_codes(integers.bits, r, &parts.codes[index * STEP..(index + 1) * STEP], body);
            }
        }
    }
}

/// The codes of row r into a step's.
fn pack_codes(bits: usize, r: usize, codes: &[u8], body: &mut [u8]) {
    let base = IntegerForm::base(bits);
    for (k, &code) in codes.iter().enumerate() {
        let place = k / 4 * TILE * 4 + r * 4 + k % 4;
        // the lowest bits of columns that are far apart share a byte
        body[place % (base * PLANE)] |= (code & (0xff >> (8 - base))) << (place / (base * PLANE) * base);
        for bit in base..bits {
            body[bit * PLANE + place / 8] |= (code >> bit & 1) << (place % 8);
        }
    }
}

/// Rows of x that stand together: a kernel that takes so many finds what it needs of them side by side.
const ROWS: usize = 4;
/// Rows of x that stand together for a kernel whose registers are as high as wide.
const HIGH: usize = 16;

/// x `[count, columns]` in 8 bits, in panels of as many rows as the kernel takes; what is behind the last means nothing.
#[derive(Debug, Default)]
struct Rounded {
    /// Rows that there are.
    count: usize,
    /// Rows of a panel: [`ROWS`] or [`HIGH`].
    high: usize,
    /// a, four together: `[panels, steps, 8, ROWS]`, four of each row, then the next four; or `[panels, steps, HIGH, 8]`.
    codes: Vec<[i8; 4]>,
    /// s `[panels, steps, high]`.
    scales: Vec<f32>,
    /// Σ a over the halves of a step `[panels, steps, 2, high]`.
    sums: Vec<i32>,
}

impl Rounded {
    fn fill(&mut self, team: &Team, x: &[f32], columns: usize, high: usize) {
        (self.count, self.high) = (x.len() / columns, high);
        let (panels, steps) = (self.count.div_ceil(high), columns / STEP);
        let places = panels * steps * high;
        self.codes.resize(places * STEP / 4, [0; 4]);
        self.scales.resize(places, 0.0);
        self.sums.resize(places * 2, 0);
        let codes = Shared::new(&mut self.codes);
        let (scales, sums) = (Shared::new(&mut self.scales), Shared::new(&mut self.sums));
        let run = (TASK / 16).div_ceil(columns * high);
        team.each(panels.div_ceil(run), &|task| {
            let panels = task * run..panels.min((task + 1) * run);
            let part = |size: usize| panels.start * steps * size..panels.end * steps * size;
            // SAFETY: each panel is one task's.
            let (codes, scales, sums) =
                unsafe { (codes.part(part(8 * high)), scales.part(part(high)), sums.part(part(2 * high))) };
            for (row, x) in x.chunks_exact(columns).enumerate().take(panels.end * high).skip(panels.start * high) {
                let (panel, t) = (row / high - panels.start, row % high);
                for (step, x) in x.as_chunks::<STEP>().0.iter().enumerate() {
                    let at = panel * steps + step;
                    let (found, scale, both) = kernel::round(x);
                    for (four, found) in found.as_chunks::<4>().0.iter().enumerate() {
                        let place = if high == ROWS { four * ROWS + t } else { t * 8 + four };
                        codes[at * 8 * high + place] = *found;
                    }
                    scales[at * high + t] = scale;
                    sums[2 * at * high + t] = both[0];
                    sums[(2 * at + 1) * high + t] = both[1];
                }
            }
        });
    }
}

/// y ≈ x Wᵀ for several matrices of the same inputs: x `[count, columns]`, y `[count, Σ rows]`, side by side.
///
/// # Errors
/// Sizes that don't agree.
pub fn matmul(team: &Team, matrices: &[&Packed], x: &[f32], y: &mut [f32]) -> Result<()> {
    matmul_by(Path::best(), team, matrices, x, y)
}

/// [`matmul`] on a path of one's choice, which this machine must have.
///
/// # Errors
/// Sizes that don't agree.
pub fn matmul_by(path: Path, team: &Team, matrices: &[&Packed], x: &[f32], y: &mut [f32]) -> Result<()> {
    thread_local! {
        static ROUNDED: RefCell<Rounded> = RefCell::default();
    }
    let width: usize = matrices.iter().map(|matrix| matrix.rows).sum();
    let columns = matrices.first().map_or(0, |matrix| matrix.columns);
    let count = x.len().checked_div(columns).unwrap_or(y.len() / width.max(1));
    let same = matrices.iter().all(|matrix| matrix.columns == columns);
    if !same || x.len() != count * columns || y.len() != count * width {
        return Err(Error::failure(format!(
            "matmul: expected rows of {columns} in and {width} out, got {} and {} numbers",
            x.len(),
            y.len()
        )));
    }
    if columns == 0 {
        y.fill(0.0);
    }
    if y.is_empty() || columns == 0 {
        return Ok(());
    }
    ROUNDED.with_borrow_mut(|rounded| {
        rounded.fill(team, x, columns, path.rows(count));
        // matrices of one format mostly: their inputs are prepared once
        let mut prepared: Vec<(&IntegerForm, kernel::Inputs<'_>)> = Vec::with_capacity(1);
        // (matrix, its inputs, its tiles among those of all, its first column of y)
        let mut parts = Vec::with_capacity(matrices.len());
        let (mut begin, mut count_tiles) = (0, 0);
        for matrix in matrices {
            let form = &matrix.integers;
            let inputs = prepared.iter().position(|(other, _)| other.same_inputs(form)).unwrap_or_else(|| {
                prepared.push((form, kernel::Inputs::new(team, rounded, form)));
                prepared.len() - 1
            });
            let tiles = count_tiles..count_tiles + matrix.rows.div_ceil(TILE);
            (begin, count_tiles) = (begin + matrix.rows, tiles.end);
            parts.push((*matrix, inputs, tiles, begin - matrix.rows));
        }
        let out = Shared::new(y);
        let run = count_tiles.div_ceil(team.tasks(count * width * columns, TASK)).next_multiple_of(2);
        team.each(count_tiles.div_ceil(run), &|task| {
            for (matrix, inputs, all, begin) in &parts {
                let tiles = (task * run).clamp(all.start, all.end)..((task + 1) * run).clamp(all.start, all.end);
                let tiles = tiles.start - all.start..tiles.end - all.start;
                let (packed, inputs) = (matrix.tiles(tiles.clone()), &prepared[*inputs].1);
                path.product(&matrix.integers, packed, inputs, columns / STEP, |t, tile, found| {
                    let at = (tiles.start + tile) * TILE;
                    let place = t * width + begin + at;
                    // SAFETY: these columns of y are this task's alone.
                    unsafe {
                        match found.get(..matrix.rows - at) {
                            Some(part) => out.write(place, part),
                            None => out.write(place, found), // of a length that is known: no loop
                        }
                    }
                });
            }
        });
    });
    Ok(())
}

#[cfg(test)]
mod tests;
