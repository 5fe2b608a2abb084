//! A tokenizer rebuilt from GGUF metadata.

use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::gguf;

impl Tokenizer {
    /// The tokenizer in a GGUF file's metadata.
    pub fn from_gguf(_file: &gguf::File) -> Result<Self> {
        Err(Error::failure("soon"))
    }
}
