//! What a training step computes in the core: linear layers with low ranks beside them, attention, and rows' own work.
//!
//! Everything is computed in float32, of tensors in float32 or (all but linear layers) bfloat16; but attention of bfloat16
//! multiplies it as it is where tiles do (AMX). A row's numbers depend on the row (in attention: its sequence) alone, and
//! sums over rows run from the first to the last: threads and company change no bit.

pub mod attention;
pub mod linear;
pub mod number;
pub mod passes;
mod rows;
mod tile;
