//! LoRAs whose matrices lie in pages of the engine's pool.
//!
//! ```text
//! page 0  [ A₀ | B₀ᵀ | A₁ | B₁ᵀ | … ]   page 1  [ … ]      float32, each matrix in one page, at whole lines of the cache
//! ```
//! Adapters of the same layers and ranks, saved by the same program, have their matrices at the same places of their files
//! and get the same places in their pages. A [`Form`] says both: made once, it brings any number of adapters from their
//! files' bytes to pages, and from pages to a step, without another look at their names.

use half::{bf16, f16};

use super::lora::Lora;
use crate::error::{Error, Result};

/// Bytes to which matrices are aligned in a page: a line of the processor's cache.
const ALIGNMENT: usize = 64;

/// How a file holds numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// 32 bits.
    F32,
    /// 16 bits, 5 of them the exponent.
    F16,
    /// The upper half of 32 bits.
    BF16,
}

impl Numbers {
    fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Writes a matrix `[rows, columns]`, or its transpose, as numbers of 32 bits; whether all are finite.
    fn copy(self, source: &[u8], (rows, columns): (usize, usize), transposed: bool, target: &mut [u8]) -> bool {
        match self {
            Self::F32 => copy(source, f32::from_le_bytes, (rows, columns), transposed, target),
            Self::F16 => copy(source, |two| f16::from_le_bytes(two).to_f32(), (rows, columns), transposed, target),
            Self::BF16 => copy(source, |two| bf16::from_le_bytes(two).to_f32(), (rows, columns), transposed, target),
        }
    }
}

fn copy<const BYTES: usize>(
    source: &[u8],
    number: impl Fn([u8; BYTES]) -> f32,
    (rows, columns): (usize, usize),
    transposed: bool,
    target: &mut [u8],
) -> bool {
    let (source, target) = (source.as_chunks::<BYTES>().0, target.as_chunks_mut::<{ size_of::<f32>() }>().0);
    let mut finite = true;
    let mut put = |target: &mut [u8; size_of::<f32>()], from: [u8; BYTES]| {
        let number = number(from);
        finite &= number.is_finite();
        *target = number.to_ne_bytes();
    };
    if transposed {
        for (column, target) in target.chunks_exact_mut(rows.max(1)).enumerate() {
            target.iter_mut().enumerate().for_each(|(row, target)| put(target, source[row * columns + column]));
        }
    } else {
        target.iter_mut().zip(source).for_each(|(target, &from)| put(target, from));
    }
    finite
}

/// A LoRA on one linear layer, and where its file has it.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// The layer's number in the order of the forward pass, the head's the last.
    pub linear: usize,
    /// Rows of B.
    pub outputs: usize,
    /// Columns of A.
    pub inputs: usize,
    /// Rows of A, columns of B.
    pub rank: usize,
    /// The factor.
    pub scale: f32,
    /// A `[rank, inputs]`: its numbers, and the byte of the file at which it begins.
    pub a: (Numbers, usize),
    /// B `[outputs, rank]`, the same.
    pub b: (Numbers, usize),
}

/// A matrix in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which of the adapter's pages.
    pub page: usize,
    /// Its first byte there.
    pub at: usize,
}

/// What adapters of one shape have in common.
#[derive(Debug)]
pub struct Form {
    /// Each LoRA, and the places of A and Bᵀ.
    pairs: Vec<(Pair, [Place; 2])>,
    page_bytes: usize,
    pages: usize,
}

impl Form {
    /// Places for the matrices, one after another; None where one is larger than a page, or pages hold no whole numbers.
    pub fn new(pairs: Vec<Pair>, page_bytes: usize) -> Option<Self> {
        if !page_bytes.is_multiple_of(size_of::<f32>()) {
            return None;
        }
        let (mut page, mut at) = (0, 0);
        let mut place = |numbers: Option<usize>| -> Option<Place> {
            let bytes = numbers?.checked_mul(size_of::<f32>()).filter(|&bytes| bytes <= page_bytes)?;
            if at + bytes > page_bytes {
                (page, at) = (page + 1, 0);
            }
            let found = Place { page, at };
            at += bytes.next_multiple_of(ALIGNMENT);
            Some(found)
        };
        let mut placed = Vec::with_capacity(pairs.len());
        for pair in pairs {
            let places = [place(pair.rank.checked_mul(pair.inputs))?, place(pair.rank.checked_mul(pair.outputs))?];
            placed.push((pair, places));
        }
        Some(Self { pairs: placed, page_bytes, pages: page + 1 })
    }

    /// Pages that an adapter takes.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Each LoRA, and the places of A and Bᵀ.
    pub fn pairs(&self) -> &[(Pair, [Place; 2])] {
        &self.pairs
    }

    /// Writes an adapter from the bytes of its file to its pages, which lie one after another here; `false` when the file
    /// ends too early or has a number that is not finite.
    ///
    /// # Errors
    /// Other pages than it takes.
    pub fn write(&self, file: &[u8], pages: &mut [u8]) -> Result<bool> {
        if pages.len() != self.pages * self.page_bytes {
            let expected = self.pages * self.page_bytes;
            return Err(Error::failure(format!("pages: expected {expected} bytes, got {}", pages.len())));
        }
        let mut good = true;
        for (pair, places) in &self.pairs {
            let matrices = [(pair.a, (pair.rank, pair.inputs)), (pair.b, (pair.outputs, pair.rank))];
            for (number, ((numbers, from), shape)) in matrices.into_iter().enumerate() {
                let (count, place) = (shape.0 * shape.1, places[number]);
                let source = from.checked_add(count * numbers.bytes()).and_then(|end| file.get(from..end));
                let start = place.page * self.page_bytes + place.at;
                let target = &mut pages[start..start + count * size_of::<f32>()];
                // of B, what the core reads is its columns
                good &= source.is_some_and(|source| numbers.copy(source, shape, number == 1, target));
            }
        }
        Ok(good)
    }

    /// An adapter in these pages of a pool: what it adds to each of `linears` layers.
    ///
    /// # Errors
    /// Pages or layers that there are not, or a pool that is not aligned to numbers.
    pub fn loras<'a>(&self, pool: &'a [u8], pages: &[u32], linears: usize) -> Result<Vec<Option<Lora<'a>>>> {
        if pages.len() != self.pages {
            return Err(Error::failure(format!("adapter: expected {} pages, got {}", self.pages, pages.len())));
        }
        let matrix = |place: Place, count: usize| -> Result<&'a [f32]> {
            let start = pages[place.page] as usize * self.page_bytes + place.at;
            let bytes = pool.get(start..start + count * size_of::<f32>());
            let numbers = bytes.and_then(|bytes| bytemuck::try_cast_slice(bytes).ok());
            numbers.ok_or_else(|| Error::failure("adapter: expected pages of the pool, aligned to 4 bytes, got others"))
        };
        let mut found = vec![None; linears];
        for (pair, [a, b]) in &self.pairs {
            let lora = Lora::new(
                (matrix(*a, pair.rank * pair.inputs)?, pair.inputs),
                (matrix(*b, pair.rank * pair.outputs)?, pair.outputs),
                true,
                pair.scale,
            )?;
            let place = found.get_mut(pair.linear).filter(|place| place.is_none());
            let message =
                || format!("adapter: expected {linears} linear layers, each once, got number {}", pair.linear);
            *place.ok_or_else(|| Error::failure(message()))? = Some(lora);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pair(linear: usize, outputs: usize, inputs: usize, rank: usize) -> Pair {
        let none = (Numbers::F32, 0);
        Pair { linear, outputs, inputs, rank, scale: 0.5, a: none, b: none }
    }

    /// A file of numbers of all sorts after one another, and where each pair is in it.
    fn file(shapes: &[(usize, usize, usize)]) -> (Vec<u8>, Vec<Pair>, Vec<[Vec<f32>; 2]>) {
        let (mut bytes, mut pairs, mut values) = (vec![7; 13], Vec::new(), Vec::new());
        for (linear, &(outputs, inputs, rank)) in shapes.iter().enumerate() {
            let mut put = |count: usize, numbers: Numbers| {
                let at = bytes.len();
                // halves of small numbers, which all sorts hold
                let values: Vec<f32> =
                    (0..count).map(|index| (((index + linear) * 37 + at) % 101) as f32 / 2.0 - 25.0).collect();
                for &value in &values {
                    match numbers {
                        Numbers::F32 => bytes.extend(value.to_le_bytes()),
                        Numbers::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                        Numbers::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                    }
                }
                ((numbers, at), values)
            };
            let sorts = [Numbers::F32, Numbers::F16, Numbers::BF16];
            let (a, values_a) = put(rank * inputs, sorts[linear % 3]);
            let (b, values_b) = put(rank * outputs, sorts[(linear + 1) % 3]);
            pairs.push(Pair { a, b, ..pair(linear, outputs, inputs, rank) });
            values.push([values_a, values_b]);
        }
        (bytes, pairs, values)
    }

    proptest! {
        /// What is in the file is in the pages, wherever they are; A as it was and B by columns.
        #[test]
        fn files_come_to_pages_and_pages_to_layers(
            shapes in prop::collection::vec((1usize..9, 1usize..9, 1usize..5), 1..7),
            shift in 0usize..5,
        ) {
            let (bytes, pairs, values) = file(&shapes);
            let page_bytes = 196; // no multiple of a line: a matrix of 8 × 4 numbers and little else
            let form = Form::new(pairs, page_bytes).unwrap();
            let mut staged = vec![0; form.pages() * page_bytes];
            prop_assert!(form.write(&bytes, &mut staged).unwrap());
            // To a pool, its pages in reverse.
            let count = form.pages() + shift;
            let mut words = vec![0u32; count * page_bytes / 4];
            let pool: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
            let pages: Vec<u32> = (0..form.pages()).map(|page| (count - 1 - page) as u32).collect();
            for (page, content) in pages.iter().zip(staged.chunks_exact(page_bytes)) {
                pool[*page as usize * page_bytes..][..page_bytes].copy_from_slice(content);
            }
            let pool = bytemuck::cast_slice(&words);
            let loras = form.loras(pool, &pages, shapes.len() + 1).unwrap();
            prop_assert!(loras[shapes.len()].is_none());
            for ((lora, &(outputs, inputs, rank)), [a, b]) in loras.iter().zip(&shapes).zip(&values) {
                let turned: Vec<f32> = (0..outputs * rank).map(|i| b[i % outputs * rank + i / outputs]).collect();
                let expected = Lora::new((a, inputs), (&turned, outputs), true, 0.5).unwrap();
                prop_assert_eq!(format!("{:?}", lora.unwrap()), format!("{expected:?}"));
            }
            // No two matrices share a byte.
            let mut spans: Vec<(usize, usize)> = Vec::new();
            for (pair, [a, b]) in form.pairs() {
                for (place, count) in [(a, pair.rank * pair.inputs), (b, pair.rank * pair.outputs)] {
                    prop_assert!(place.at + 4 * count <= page_bytes);
                    spans.push((place.page * page_bytes + place.at, place.page * page_bytes + place.at + 4 * count));
                }
            }
            spans.sort_unstable();
            prop_assert!(spans.windows(2).all(|two| two[0].1 <= two[1].0));
        }
    }

    #[test]
    fn what_is_cut_short_or_not_finite_is_told() {
        let (bytes, pairs, _) = file(&[(3, 5, 2), (2, 3, 1)]);
        let form = Form::new(pairs.clone(), 64).unwrap();
        let mut pages = vec![0; form.pages() * 64];
        assert!(form.write(&bytes, &mut pages).unwrap());
        assert!(!form.write(&bytes[..bytes.len() - 1], &mut pages).unwrap());
        assert!(!form.write(&[], &mut pages).unwrap());
        assert!(form.write(&bytes, &mut pages[1..]).is_err());
        for (pair, bad) in [(pairs[0], f32::NAN), (pairs[0], f32::INFINITY)] {
            let mut broken = bytes.clone();
            broken[pair.a.1 + 36..][..4].copy_from_slice(&bad.to_le_bytes());
            assert!(!form.write(&broken, &mut pages).unwrap());
        }
        let mut broken = bytes;
        let last = pairs[1].b;
        assert_eq!(last.0, Numbers::BF16);
        broken[last.1..][..2].copy_from_slice(&bf16::NEG_INFINITY.to_le_bytes());
        assert!(!form.write(&broken, &mut pages).unwrap());
    }

    #[test]
    fn what_does_not_fit_is_none_or_an_error() {
        assert!(Form::new(vec![pair(0, 5, 3, 4)], 79).is_none());
        assert!(Form::new(vec![pair(0, 5, 3, 4)], 76).is_none());
        assert!(Form::new(vec![pair(0, usize::MAX, 3, 4)], 80).is_none());
        let form = Form::new(vec![pair(1, 5, 3, 4)], 80).unwrap();
        assert_eq!(form.pages(), 2);
        let words = [0u32; 3 * 20];
        let pool: &[u8] = bytemuck::cast_slice(&words);
        assert!(form.loras(pool, &[0, 2], 2).unwrap()[1].is_some());
        assert!(form.loras(pool, &[0, 3], 2).is_err());
        assert!(form.loras(pool, &[0], 2).is_err());
        assert!(form.loras(pool, &[0, 2], 1).is_err());
        assert!(form.loras(&pool[1..], &[0, 1], 2).is_err());
        let twice = Form::new(vec![pair(1, 5, 3, 1), pair(1, 5, 3, 1)], 80).unwrap();
        assert!(twice.loras(pool, &[0, 1], 2).is_err());
    }
}
