//! The memory planner: replay of recorded allocations.
//!
//! A trace is the list of what one step of the real model code allocates and frees, in order. Replaying it against an
//! allocator's rules gives the peak, and what the peak is made of, before a byte of the model is loaded.

pub mod caching;
mod replay;

pub use replay::{Event, Peak, peak};
