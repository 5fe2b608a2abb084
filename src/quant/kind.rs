//! The table of the formats: the one place that lists the files of this room.

use super::int8::IntegerForm;
use super::weights::Weights;
use super::{bf16, f16, f32, iq4_nl, iq4_xs, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0};

macro_rules! kinds {
    ($($(#[$doc:meta])* $variant:ident = $id:literal, $name:literal, $file:ident;)*) => {
        /// A block format, by the names and numbers of ggml.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Kind {
            $($(#[$doc])* $variant,)*
        }

        impl Kind {
            /// All formats that can be read.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Its number in files.
            pub fn id(self) -> u32 {
                match self { $(Self::$variant => $id),* }
            }

            /// Its name, such as `q4_1`.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// Values in a block.
            pub fn block_size(self) -> usize {
                match self { $(Self::$variant => $file::BLOCK),* }
            }

            /// Bytes of a block.
            pub fn block_bytes(self) -> usize {
                match self { $(Self::$variant => $file::BYTES),* }
            }

            /// Writes the values of whole blocks to `out`; ends with the shorter of the two.
            #[inline(always)]
            pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) {
                match self { $(Self::$variant => $file::dequantize(blocks, out)),* }
            }

            /// [`Kind::dequantize`], to be compiled for AVX-512.
            #[cfg(target_arch = "x86_64")]
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            pub(super) fn dequantize_512(self, blocks: &[u8], out: &mut [f32]) {
                match self {
                    Self::Q2K => q2_k::dequantize_512(blocks, out),
                    Self::Q4_0 => q4_0::dequantize_512(blocks, out),
                    Self::Q4_1 => q4_1::dequantize_512(blocks, out),
                    Self::Iq4Nl => iq4_nl::dequantize_512(blocks, out),
                    Self::Iq4Xs => iq4_xs::dequantize_512(blocks, out),
                    other => other.dequantize(blocks, out),
                }
            }

            /// [`Kind::dequantize`], to be compiled for AVX2.
            #[cfg(target_arch = "x86_64")]
            #[inline]
            #[target_feature(enable = "avx2,fma")]
            pub(super) fn dequantize_256(self, blocks: &[u8], out: &mut [f32]) {
                match self {
                    Self::Q2K => q2_k::dequantize_256(blocks, out),
                    Self::Q4_0 => q4_0::dequantize_256(blocks, out),
                    Self::Q4_1 => q4_1::dequantize_256(blocks, out),
                    Self::Iq4Nl => iq4_nl::dequantize_256(blocks, out),
                    Self::Iq4Xs => iq4_xs::dequantize_256(blocks, out),
                    other => other.dequantize(blocks, out),
                }
            }

            /// How a block falls apart into whole numbers, for the formats that do.
            pub(super) fn integer_form(self) -> Option<IntegerForm> {
                match self { $(Self::$variant => $file::INTEGERS),* }
            }

            /// Writes values as whole blocks; ends with the shorter of the two. All values must be finite.
            ///
            /// `weights(start, size)`: those of the block of `size` values from `start` on.
            pub(super) fn quantize<W: Weights>(
                self,
                values: &[f32],
                weights: impl Fn(usize, usize) -> W,
                blocks: &mut [u8],
            ) {
                match self {
                    $(Self::$variant => {
                        let each = values.as_chunks::<{ $file::BLOCK }>().0.iter().zip(blocks.as_chunks_mut().0);
                        for (number, (values, block)) in each.enumerate() {
                            $file::quantize(values, weights(number * $file::BLOCK, $file::BLOCK), block);
                        }
                    }),*
                }
            }
        }
    };
}

kinds! {
    /// 32-bit floats.
    F32 = 0, "f32", f32;
    /// 16-bit floats of IEEE 754.
    F16 = 1, "f16", f16;
    /// 4-bit codes with a scale a block of 32.
    Q4_0 = 2, "q4_0", q4_0;
    /// 4-bit codes with a scale and an offset a block of 32.
    Q4_1 = 3, "q4_1", q4_1;
    /// 5-bit codes with a scale a block of 32.
    Q5_0 = 6, "q5_0", q5_0;
    /// 5-bit codes with a scale and an offset a block of 32.
    Q5_1 = 7, "q5_1", q5_1;
    /// 8-bit codes with a scale a block of 32.
    Q8_0 = 8, "q8_0", q8_0;
    /// 2-bit codes, 4-bit scales and offsets a group of 16, in blocks of 256.
    Q2K = 10, "q2_k", q2_k;
    /// 3-bit codes, 6-bit scales a group of 16, in blocks of 256.
    Q3K = 11, "q3_k", q3_k;
    /// 4-bit codes, 6-bit scales and offsets a group of 32, in blocks of 256.
    Q4K = 12, "q4_k", q4_k;
    /// 5-bit codes, 6-bit scales and offsets a group of 32, in blocks of 256.
    Q5K = 13, "q5_k", q5_k;
    /// 6-bit codes, 8-bit scales a group of 16, in blocks of 256.
    Q6K = 14, "q6_k", q6_k;
    /// 4-bit codes into a table of unequal steps, with a scale a block of 32.
    Iq4Nl = 20, "iq4_nl", iq4_nl;
    /// The codes of IQ4_NL, 6-bit scales a group of 32, in blocks of 256.
    Iq4Xs = 23, "iq4_xs", iq4_xs;
    /// 16-bit floats with the exponent of 32-bit ones.
    Bf16 = 30, "bf16", bf16;
}

impl Kind {
    /// The format with the number `id` in files.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.id() == id)
    }

    /// The format called `name`, such as `q4_1`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name)
    }

    /// ggml's name of a format that exists and isn't read here, for messages.
    pub fn unread_name(id: u32) -> Option<&'static str> {
        Some(match id {
            9 => "q8_1",
            15 => "q8_k",
            16 => "iq2_xxs",
            17 => "iq2_xs",
            18 => "iq3_xxs",
            19 => "iq1_s",
            21 => "iq3_s",
            22 => "iq2_s",
            24 => "i8",
            25 => "i16",
            26 => "i32",
            27 => "i64",
            28 => "f64",
            29 => "iq1_m",
            34 => "tq1_0",
            35 => "tq2_0",
            39 => "mxfp4",
            40 => "nvfp4",
            _ => return None,
        })
    }
}
