//! ftkit's core: data, weights files, the memory planner and the server.
//!
//! Nothing here knows of Python except [`py`], which is compiled with the `python` feature only.

pub mod data;
pub mod decoder;
pub mod error;
pub mod gguf;
pub mod optim;
pub mod plan;
#[cfg(feature = "python")]
mod py;
pub mod quant;
pub mod serve;
pub mod team;
pub mod text;
pub mod training;

pub use error::{Error, ErrorKind, Result};
