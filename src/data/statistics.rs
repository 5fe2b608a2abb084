//! What preparing a dataset counted; nothing that happens to a row is silent.

use serde::{Deserialize, Serialize};

/// Counts of a prepared dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Rows in the files, good and bad.
    pub rows: u64,
    /// Rows that could not be read.
    pub bad_rows: u64,
    /// Rows that were too long and lost their last turns.
    pub truncated_rows: u64,
    /// Rows that were too long and became several sequences.
    pub split_rows: u64,
    /// Rows left out because nothing in them is trained on.
    pub masked_rows: u64,
    /// Rows whose tokens are those of an earlier row; they stay in.
    pub duplicate_rows: u64,
    /// Rows that are pairs of a chosen and a rejected answer.
    pub pairs: u64,
    /// Rows that say whether their answer is wanted.
    pub labelled: u64,
    /// Rows among them whose answer is.
    pub wanted: u64,
    /// Rows that are an answer and its rationale.
    pub explained: u64,
    /// Tokens of pairs' chosen answers.
    pub chosen_tokens: u64,
    /// Tokens of pairs' rejected answers.
    pub rejected_tokens: u64,
    /// Sequences that are trained on.
    pub sequences: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Tokens among them that are trained on.
    pub trained_tokens: u64,
    /// The longest row before it was cut, in tokens.
    pub longest_row: u64,
}
