//! Serving: many requests share one model.
//!
//! ```text
//! request → engine (queue) → scheduler → batch → Step (the model) → logits → sampler → answer → sink
//! ```
//! Nothing here knows what a step does; the model is behind [`Step`], and callers are behind [`Sink`].

mod answer;
mod engine;
#[cfg(test)]
mod fake;
mod metrics;
mod pool;
mod request;
mod sampler;
mod sampling;
mod scheduler;
mod step;
mod stop;

pub use engine::{Engine, Refused};
pub use metrics::Metrics;
pub use pool::{BlockPool, BlockTable};
pub use request::{Decoder, Delta, Event, FinishReason, Request, Sink, Token, Usage};
pub use sampler::{Choice, Sampler};
pub use sampling::Sampling;
pub use scheduler::{Counters, Limits, Scheduler};
pub use step::{Batch, Step};
pub use stop::{Shown, StopStrings};
