//! Half-precision scales, as they stand in blocks.

use half::f16;

/// The half-precision number in `bytes[at..at + 2]`.
#[inline(always)]
pub(super) fn half_at<const BYTES: usize>(bytes: &[u8; BYTES], at: usize) -> f32 {
    wide(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

/// A half-precision number's bits as float32, without a branch on what the processor has.
#[inline(always)]
pub(super) fn wide(bits: u16) -> f32 {
    let (sign, rest) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff) << 13);
    // the exponents' biases differ by 112; the product is exact, of numbers below the normal ones too
    let size = f32::from_bits(rest) * f32::from_bits((127 + 112) << 23);
    let size = if rest >= 0x7c00 << 13 { 0xff << 23 | rest } else { size.to_bits() };
    f32::from_bits(size | sign)
}

/// The 6-bit scale and offset of one of the 8 groups of a Q4_K or Q5_K block, from their 12 bytes.
///
/// Groups 0 to 3: the low 6 bits of bytes 0 to 3 (scales) and 4 to 7 (offsets). Groups 4 to 7: the low 4 bits are the
/// halves of bytes 8 to 11, the high 2 bits the ones left over in bytes 0 to 7.
#[inline]
pub(super) fn scale_and_offset(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (packed[group] & 0x3f, packed[group + 4] & 0x3f);
    }
    let low = packed[group + 4];
    ((low & 0x0f) | (packed[group - 4] >> 6) << 4, (low >> 4) | (packed[group] >> 6) << 4)
}

/// A number that half precision holds, as bytes.
#[inline]
pub(super) fn half_bytes(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

/// Packs the 6-bit scales and offsets of the 8 groups of a Q4_K or Q5_K block: the inverse of [`scale_and_offset`].
pub(super) fn pack_scales_and_offsets(scales: &[u8; 8], offsets: &[u8; 8], packed: &mut [u8]) {
    for group in 0..4 {
        packed[group] = scales[group] | (scales[group + 4] >> 4) << 6;
        packed[group + 4] = offsets[group] | (offsets[group + 4] >> 4) << 6;
        packed[group + 8] = (scales[group + 4] & 0x0f) | (offsets[group + 4] & 0x0f) << 4;
    }
}

/// What compilers don't find by themselves: codes of 4 and of 2 bits as float32 vectors.
#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    #[allow(clippy::wildcard_imports)]
    use std::arch::x86_64::*;

    /// The low and the high halves of 16 bytes, as bytes.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn halves(bytes: &[u8; 16]) -> [__m128i; 2] {
        // SAFETY: sixteen bytes are there.
        let all = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        let mask = _mm_set1_epi8(0x0f);
        [_mm_and_si128(all, mask), _mm_and_si128(_mm_srli_epi16::<4>(all), mask)]
    }

    /// out = (code − zero) d + m, each product rounded, then the sum; without m no sum.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
    pub(in super::super) fn affine_512(bytes: &[u8; 16], zero: i32, d: f32, m: Option<f32>, out: &mut [f32; 32]) {
        for (half, out) in halves(bytes).into_iter().zip(out.as_chunks_mut::<16>().0) {
            let codes = _mm512_sub_epi32(_mm512_cvtepu8_epi32(half), _mm512_set1_epi32(zero));
            let mut values = _mm512_mul_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(d));
            if let Some(m) = m {
                values = _mm512_add_ps(values, _mm512_set1_ps(m));
            }
            // SAFETY: room for sixteen floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) };
        }
    }

    /// The same with vectors half as wide.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in super::super) fn affine_256(bytes: &[u8; 16], zero: i32, d: f32, m: Option<f32>, out: &mut [f32; 32]) {
        for (half, out) in halves(bytes).into_iter().zip(out.as_chunks_mut::<16>().0) {
            for (part, out) in [half, _mm_srli_si128::<8>(half)].into_iter().zip(out.as_chunks_mut::<8>().0) {
                let codes = _mm256_sub_epi32(_mm256_cvtepu8_epi32(part), _mm256_set1_epi32(zero));
                let mut values = _mm256_mul_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(d));
                if let Some(m) = m {
                    values = _mm256_add_ps(values, _mm256_set1_ps(m));
                }
                // SAFETY: room for eight floats.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) };
            }
        }
    }

    /// The two bits from `shift` on of 16 bytes, as bytes.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn two_bits(bytes: &[u8; 16], shift: u32) -> __m128i {
        // SAFETY: sixteen bytes are there.
        let all = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        _mm_and_si128(_mm_srl_epi16(all, _mm_cvtsi32_si128(shift.cast_signed())), _mm_set1_epi8(3))
    }

    /// out = code d − m, the product rounded, then the difference.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
    pub(in super::super) fn two_bits_512(bytes: &[u8; 16], shift: u32, d: f32, m: f32, out: &mut [f32; 16]) {
        let codes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(two_bits(bytes, shift)));
        let values = _mm512_sub_ps(_mm512_mul_ps(codes, _mm512_set1_ps(d)), _mm512_set1_ps(m));
        // SAFETY: room for sixteen floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) };
    }

    /// The same with vectors half as wide.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in super::super) fn two_bits_256(bytes: &[u8; 16], shift: u32, d: f32, m: f32, out: &mut [f32; 16]) {
        let codes = two_bits(bytes, shift);
        for (part, out) in [codes, _mm_srli_si128::<8>(codes)].into_iter().zip(out.as_chunks_mut::<8>().0) {
            let codes = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(part));
            let values = _mm256_sub_ps(_mm256_mul_ps(codes, _mm256_set1_ps(d)), _mm256_set1_ps(m));
            // SAFETY: room for eight floats.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) };
        }
    }

    /// out = t[code] d.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
    pub(in super::super) fn table_512(bytes: &[u8; 16], table: &[i8; 16], d: f32, out: &mut [f32; 32]) {
        // SAFETY: sixteen bytes are there.
        let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
        for (half, out) in halves(bytes).into_iter().zip(out.as_chunks_mut::<16>().0) {
            let values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_shuffle_epi8(table, half)));
            // SAFETY: room for sixteen floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(values, _mm512_set1_ps(d))) };
        }
    }

    /// The same with vectors half as wide.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in super::super) fn table_256(bytes: &[u8; 16], table: &[i8; 16], d: f32, out: &mut [f32; 32]) {
        // SAFETY: sixteen bytes are there.
        let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
        for (half, out) in halves(bytes).into_iter().zip(out.as_chunks_mut::<16>().0) {
            let codes = _mm_shuffle_epi8(table, half);
            for (part, out) in [codes, _mm_srli_si128::<8>(codes)].into_iter().zip(out.as_chunks_mut::<8>().0) {
                let values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(part));
                // SAFETY: room for eight floats.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(values, _mm256_set1_ps(d))) };
            }
        }
    }
}
