//! What a scheduler counts.

/// What the scheduler did so far; the numbers only rise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests whose first token was generated.
    pub started: u64,
    /// Requests that ended with an answer.
    pub finished: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that failed because their first token could not come in time; they count as failed, too.
    pub late: u64,
    /// Requests whose caller left.
    pub cancelled: u64,
    /// Times that a sequence had to give up its pages.
    pub preempted: u64,
    /// Tokens of prompts computed, again after a preemption included.
    pub prefilled_tokens: u64,
    /// Tokens that were in the pool already.
    pub cached_tokens: u64,
    /// Requests whose prompt began with such tokens.
    pub cache_hits: u64,
    /// Requests whose adapter was in the pool when they came to it.
    pub adapter_hits: u64,
    /// Requests that waited for their adapter to be read.
    pub adapter_misses: u64,
    /// Adapters that had to make room.
    pub adapter_evictions: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Tokens drafted.
    pub drafted_tokens: u64,
    /// Tokens drafted that were right.
    pub accepted_tokens: u64,
}
