//! Chat templates, tokenizers and loss masks: the same code for training and for serving.
//!
//! A conversation becomes text by the model's own [`Template`], the text becomes ids by its [`Tokenizer`], and
//! [`encode_conversation`] says which of them are trained on. Special-token text inside a message stays text: only
//! what the template itself writes is parsed as special tokens.

mod added;
mod byte_level;
mod clock;
mod conversation;
mod decode;
mod directory;
mod encode;
mod json;
mod limits;
mod merges;
mod pretokenizers;
mod provenance;
mod python;
mod save;
mod source;
mod template;
#[cfg(test)]
pub(crate) mod tests;
mod tokenizer;
mod vocabulary;
mod words;

pub use conversation::{Conversation, TrainOn};
pub use decode::StreamDecoder;
pub use encode::{Encoded, encode_conversation, encode_prompt};
pub use json::parse as parse_json;
pub use limits::on_deep_stack;
pub use save::save;
pub use template::Template;
pub use tokenizer::{Specials, Tokenizer};
