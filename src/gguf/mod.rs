//! Reader and writer of GGUF files: the weights format of llama.cpp, versions 2 and 3, little endian.
//!
//! Layout: magic `GGUF`, version u32, tensor count u64, metadata count u64, metadata (key, type, value), tensor entries
//! (name, dimensions with the fastest first, type, offset), padding to the alignment, tensor data.
//!
//! Files come from strangers: every length, offset and product is checked before it is used, and nothing is allocated
//! by what a file claims before the bytes that would back the claim are known to be there.

mod cursor;
#[cfg(test)]
mod hostile;
mod metadata;
mod reader;
mod writer;

pub use metadata::{Array, Metadata, Value};
pub use reader::{File, TensorInfo};
pub use writer::{Declared, Writer};

/// The first four bytes of a file.
const MAGIC: [u8; 4] = *b"GGUF";
/// Alignment of tensor data where the metadata names none.
const DEFAULT_ALIGNMENT: u64 = 32;
/// The most dimensions a tensor of ggml has.
const MAX_DIMENSIONS: u32 = 4;
