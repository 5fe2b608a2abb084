//! Matrices of codes into a table, with a scale a group: what models are converted to while they load.
//!
//! ```text
//! w = table[code] · scale_g            (nf4, fp4, int8, fp8)
//! w = table[code] · scale_g + offset_g   (int4_group), the product rounded first
//! ```
//! Groups go over the row; a row is whole groups. Of 4-bit codes, the first stands in a byte's high half. Values are those
//! that the schemes' own definitions give, to the bit.

use half::f16;

use crate::error::{Error, Result};

/// What codes mean.
#[derive(Clone, Copy, Debug)]
pub enum Table<'a> {
    /// 4-bit codes into 16 numbers.
    Four(&'a [f32; 16]),
    /// 8-bit codes into 256 numbers.
    Eight(&'a [f32; 256]),
    /// 8-bit codes that are whole numbers with sign.
    Signed,
}

/// A number for each group.
#[derive(Clone, Copy, Debug)]
pub enum Numbers<'a> {
    /// As they are.
    Plain(&'a [f32]),
    /// In half precision.
    Half(&'a [f16]),
    /// map[code] · greatest + mean, a greatest for 256 groups (QLoRA's second quantization).
    Nested {
        /// A code for each group.
        codes: &'a [u8],
        /// What codes mean.
        map: &'a [f32; 256],
        /// One for each 256 codes.
        greatest: &'a [f32],
        /// What is added.
        mean: f32,
    },
}

impl Numbers<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Plain(numbers) => numbers.len(),
            Self::Half(numbers) => numbers.len(),
            Self::Nested { codes, greatest, .. } => {
                if greatest.len() < codes.len().div_ceil(256) {
                    return 0;
                }
                codes.len()
            }
        }
    }

    #[inline(always)]
    fn get(&self, group: usize) -> f32 {
        match self {
            Self::Plain(numbers) => numbers[group],
            Self::Half(numbers) => super::scales::wide(numbers[group].to_bits()),
            Self::Nested { codes, map, greatest, mean } => {
                map[usize::from(codes[group])] * greatest[group / 256] + mean
            }
        }
    }
}

/// W `[rows, columns]` as codes.
#[derive(Clone, Copy, Debug)]
pub struct Coded<'a> {
    table: Table<'a>,
    codes: &'a [u8],
    columns: usize,
    group: usize,
    scales: Numbers<'a>,
    offsets: Option<Numbers<'a>>,
}

impl<'a> Coded<'a> {
    /// # Errors
    /// Lengths that don't agree, rows that aren't whole groups, or 4-bit groups that aren't whole bytes.
    pub fn new(
        table: Table<'a>,
        codes: &'a [u8],
        rows: usize,
        columns: usize,
        group: usize,
        scales: Numbers<'a>,
        offsets: Option<Numbers<'a>>,
    ) -> Result<Self> {
        let four = matches!(table, Table::Four(_));
        let count = rows.saturating_mul(columns);
        let whole = group > 0 && columns.is_multiple_of(group) && !(four && group % 2 == 1);
        let groups = count.checked_div(group).unwrap_or(0);
        let bytes = if four { count / 2 } else { count };
        if !whole
            || codes.len() != bytes
            || scales.len() != groups
            || offsets.is_some_and(|offsets| offsets.len() != groups)
        {
            return Err(Error::failure(format!(
                "expected codes, scales and offsets of {rows} rows of {columns} values in groups of {group}, got {} \
                 bytes of codes and {} scales",
                codes.len(),
                scales.len()
            )));
        }
        Ok(Self { table, codes, columns, group, scales, offsets })
    }

    /// Bytes of the codes of a row.
    pub(super) fn row_bytes(&self) -> usize {
        if matches!(self.table, Table::Four(_)) { self.columns / 2 } else { self.columns }
    }

    /// The codes alone.
    pub(super) fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// The values of rows from `first` on, as many as `out` has room for.
    #[inline(always)]
    fn values(&self, first: usize, out: &mut [f32], spread: impl Fn(&[u8], f32, Option<f32>, &mut [f32])) {
        let start = first * self.columns / self.group;
        let bytes = self.group * self.row_bytes() / self.columns.max(1);
        for (at, out) in out.chunks_exact_mut(self.group).enumerate() {
            let group = start + at;
            let codes = &self.codes[group * bytes..][..bytes];
            spread(codes, self.scales.get(group), self.offsets.as_ref().map(|offsets| offsets.get(group)), out);
        }
    }

    /// The values of rows from `first` on.
    pub(super) fn dequantize(&self, first: usize, out: &mut [f32]) {
        let table = self.table;
        self.values(first, out, |codes, scale, offset, out| plain(table, codes, scale, offset, out));
    }

    /// The same by AVX2.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn dequantize_256(&self, first: usize, out: &mut [f32]) {
        let table = self.table;
        self.values(first, out, |codes, scale, offset, out| {
            let done = x86::spread_256(table, codes, scale, offset, out);
            plain(table, &codes[done.0..], scale, offset, &mut out[done.1..]);
        });
    }

    /// The same by AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(super) fn dequantize_512(&self, first: usize, out: &mut [f32]) {
        let table = self.table;
        self.values(first, out, |codes, scale, offset, out| {
            let done = x86::spread_512(table, codes, scale, offset, out);
            plain(table, &codes[done.0..], scale, offset, &mut out[done.1..]);
        });
    }
}

#[inline(always)]
fn plain(table: Table<'_>, codes: &[u8], scale: f32, offset: Option<f32>, out: &mut [f32]) {
    let value = |number: f32| match offset {
        Some(offset) => number * scale + offset,
        None => number * scale,
    };
    match table {
        Table::Four(table) => {
            for (out, &byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                *out = [value(table[usize::from(byte >> 4)]), value(table[usize::from(byte & 0x0f)])];
            }
        }
        Table::Eight(table) => {
            out.iter_mut().zip(codes).for_each(|(out, &code)| *out = value(table[usize::from(code)]))
        }
        Table::Signed => out.iter_mut().zip(codes).for_each(|(out, &code)| *out = value(f32::from(code as i8))),
    }
}

/// Whole vectors of a group; how many codes' bytes and values were done.
#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports)]
    use std::arch::x86_64::*;

    use super::Table;

    /// 8 bytes to their 16 halves, the high one first.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn halves(bytes: &[u8; 8]) -> __m128i {
        let both = _mm_cvtsi64_si128(i64::from_le_bytes(*bytes));
        let mask = _mm_set1_epi8(0x0f);
        _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16::<4>(both), mask), _mm_and_si128(both, mask))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
    pub(super) fn spread_512(
        table: Table<'_>,
        codes: &[u8],
        scale: f32,
        offset: Option<f32>,
        out: &mut [f32],
    ) -> (usize, usize) {
        let put = |values: __m512, out: &mut [f32; 16]| {
            let values = _mm512_mul_ps(values, _mm512_set1_ps(scale));
            let values = match offset {
                Some(offset) => _mm512_add_ps(values, _mm512_set1_ps(offset)),
                None => values,
            };
            // SAFETY: room for sixteen floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) };
        };
        match table {
            Table::Four(table) => {
                // SAFETY: sixteen floats are there.
                let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
                let (codes, outs) = (codes.as_chunks::<8>().0, out.as_chunks_mut::<16>().0);
                for (codes, out) in codes.iter().zip(outs.iter_mut()) {
                    put(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(halves(codes)), table), out);
                }
                (codes.len() * 8, codes.len() * 16)
            }
            Table::Signed => {
                let (codes, outs) = (codes.as_chunks::<16>().0, out.as_chunks_mut::<16>().0);
                for (codes, out) in codes.iter().zip(outs.iter_mut()) {
                    // SAFETY: sixteen bytes are there.
                    let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
                    put(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), out);
                }
                (codes.len() * 16, codes.len() * 16)
            }
            Table::Eight(_) => (0, 0),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn spread_256(
        table: Table<'_>,
        codes: &[u8],
        scale: f32,
        offset: Option<f32>,
        out: &mut [f32],
    ) -> (usize, usize) {
        let put = |values: __m256, out: &mut [f32; 8]| {
            let values = _mm256_mul_ps(values, _mm256_set1_ps(scale));
            let values = match offset {
                Some(offset) => _mm256_add_ps(values, _mm256_set1_ps(offset)),
                None => values,
            };
            // SAFETY: room for eight floats.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) };
        };
        match table {
            Table::Four(table) => {
                // SAFETY: sixteen floats are there.
                let (low, high) = unsafe { (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))) };
                let (codes, outs) = (codes.as_chunks::<8>().0, out.as_chunks_mut::<16>().0);
                for (codes, out) in codes.iter().zip(outs.iter_mut()) {
                    let codes = halves(codes);
                    for (codes, out) in [codes, _mm_srli_si128::<8>(codes)].into_iter().zip(out.as_chunks_mut().0) {
                        let index = _mm256_cvtepu8_epi32(codes);
                        let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)); // bit 3 as the sign
                        let (a, b) = (_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index));
                        put(_mm256_blendv_ps(a, b, upper), out);
                    }
                }
                (codes.len() * 8, codes.len() * 16)
            }
            Table::Signed => {
                let (codes, outs) = (codes.as_chunks::<8>().0, out.as_chunks_mut::<8>().0);
                for (codes, out) in codes.iter().zip(outs.iter_mut()) {
                    let codes = _mm_cvtsi64_si128(i64::from_le_bytes(*codes));
                    put(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), out);
                }
                (codes.len() * 8, codes.len() * 8)
            }
            Table::Eight(_) => (0, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quant::matmul::{Matrix, Path, matmul_by, tests::noise};
    use crate::team::Team;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_path_gives_the_values_of_the_formula(
            sort in 0usize..3,
            rows in 1usize..9,
            groups in 1usize..4,
            half_group in 1usize..40,
            nested: bool,
            with_offsets: bool,
            seed: u64,
        ) {
            let (group, columns) = (2 * half_group, 2 * half_group * groups);
            let (four, eight) = (noise(16, seed), noise(256, seed + 1));
            let table = match sort {
                0 => Table::Four(four.first_chunk().unwrap()),
                1 => Table::Eight(eight.first_chunk().unwrap()),
                _ => Table::Signed,
            };
            let bytes = |count: usize, seed: u64| noise(count, seed).iter().map(|x| x.to_bits() as u8).collect::<Vec<_>>();
            let codes = bytes(rows * columns / if sort == 0 { 2 } else { 1 }, seed + 2);
            let plain_scales = noise(rows * groups, seed + 3);
            let (nested_codes, map, greatest) = (bytes(rows * groups, seed + 4), noise(256, seed + 5), noise(1, seed + 6));
            let scales = if nested {
                let map = map.first_chunk().unwrap();
                Numbers::Nested { codes: &nested_codes, map, greatest: &greatest, mean: 0.25 }
            } else {
                Numbers::Plain(&plain_scales)
            };
            let halves: Vec<f16> = noise(rows * groups, seed + 7).into_iter().map(f16::from_f32).collect();
            let offsets = with_offsets.then_some(Numbers::Half(&halves));
            let expected: Vec<f32> = (0..rows * columns).map(|at| {
                let number = match sort {
                    0 => four[usize::from(codes[at / 2] >> (4 * (1 - at % 2)) & 15)],
                    1 => eight[usize::from(codes[at])],
                    _ => f32::from(codes[at] as i8),
                };
                let g = at / group;
                let scale = if nested { map[usize::from(nested_codes[g])] * greatest[0] + 0.25 } else { plain_scales[g] };
                if with_offsets { number * scale + halves[g].to_f32() } else { number * scale }
            }).collect();
            let coded = Coded::new(table, &codes, rows, columns, group, scales, offsets).unwrap();
            let matrix = Matrix::coded(table, &codes, rows, columns, group, scales, offsets).unwrap();
            let x = noise(3 * columns, seed + 8);
            let dense = Matrix::new(crate::quant::Kind::F32, bytemuck::cast_slice(&expected), rows, columns).unwrap();
            for path in Path::all() {
                let mut found = vec![0.0; rows * columns];
                path.decode(&coded, 0, &mut found);
                prop_assert_eq!(&found, &expected, "{:?}", path);
                let (mut y, mut z) = (vec![0.0; 3 * rows], vec![0.0; 3 * rows]);
                Team::run(|team| matmul_by(path, team, &[matrix], &x, &mut y)).unwrap();
                Team::run(|team| matmul_by(path, team, &[dense], &x, &mut z)).unwrap();
                prop_assert_eq!(&y, &z);
            }
        }
    }

    #[test]
    fn lengths_that_do_not_agree_are_errors() {
        let (codes, scales) = ([0u8; 64], [1.0f32; 4]);
        let new = |codes: &'static [u8], columns, group| {
            Coded::new(Table::Signed, codes, 2, columns, group, Numbers::Plain(&[1.0; 4]), None).is_ok()
        };
        assert!(new(&[0; 64], 32, 16));
        assert!(!new(&[0; 63], 32, 16) && !new(&[0; 64], 32, 8) && !new(&[0; 64], 32, 0) && !new(&[0; 64], 32, 24));
        let table = [0.0; 16];
        let odd = Coded::new(Table::Four(&table), &codes[..3], 2, 3, 3, Numbers::Plain(&scales[..2]), None);
        assert!(odd.is_err(), "a group of 3 isn't whole bytes");
    }
}
