//! Chat templates, tokenizers and loss masks.
