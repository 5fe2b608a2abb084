//! Serving: many requests share one model.
//!
//! ```text
//! request → engine (queue) → scheduler → batch → Step (the model) → logits → sampler → answer → sink
//! ```
//! Nothing here knows what a step does; the model is behind [`Step`], and callers are behind [`Sink`].

mod admission;
mod answer;
mod author;
pub mod calls;
pub mod constraint;
mod desk;
mod draft;
mod engine;
pub mod fairness;
#[cfg(test)]
mod fake;
pub mod http;
mod language;
mod limits;
mod metrics;
pub mod models;
pub mod names;
mod pool;
pub mod prefix;
mod queue;
mod request;
mod residency;
mod sampler;
pub mod sampling;
mod scheduler;
mod sequence;
mod step;
mod stop;
mod traffic;

pub use author::{Author, Pen, Source, Sources};
pub use desk::{Desk, Refusal};
pub use engine::{Engine, Refused};
pub use language::{Language, Text};
pub use limits::Limits;
pub use metrics::Metrics;
pub use pool::{BlockPool, BlockTable};
pub use request::{Decoder, Delta, Event, FinishReason, Request, Sink, Token, Usage};
pub use residency::Fetched;
pub use sampler::{Choice, Sampler};
pub use sampling::Sampling;
pub use scheduler::{Counters, Scheduler};
pub use step::{Batch, Shelf, Step};
pub use stop::{Shown, StopStrings};
pub use traffic::Traffic;
