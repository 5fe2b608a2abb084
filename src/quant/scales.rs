//! Half-precision scales, as they stand in blocks.

use half::f16;

/// The half-precision number in `bytes[at..at + 2]`.
#[inline]
pub(super) fn half_at<const BYTES: usize>(bytes: &[u8; BYTES], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
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
