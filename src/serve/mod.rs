//! The server: scheduler, block pool, sampler and HTTP.
