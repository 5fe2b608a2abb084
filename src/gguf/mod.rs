//! Reader and writer of GGUF files.
