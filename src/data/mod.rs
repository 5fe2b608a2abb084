//! From files of rows to packed, memory-mapped training batches.
//!
//! Rows are read as a stream ([`read`]), recognised ([`schema`]), turned into tokens and loss masks by the same text
//! code that serves ([`encode`]), and written once to a cache of sequences ([`cache`]). Packing ([`pack`]) works on
//! lengths alone, so no more than an index entry a sequence is ever in memory.

mod batch;
mod cache;
mod check;
mod encode;
mod pack;
mod prepare;
mod read;
mod rows;
mod schema;
mod source;
mod statistics;

pub use batch::{Arrays, Part};
pub use cache::{Cache, Sequence};
pub use check::{Checked, check};
pub use encode::{Encoder, LongRows};
pub use pack::pack;
pub use prepare::{Prepared, Settings, prepare};
pub use rows::Place;
pub use schema::{Example, Mapping, Schema};
pub use statistics::Statistics;
