//! The encode pool: pixel batches and captions to moments of latents and text embeddings.
//!
//! One thread a device entry, each with its own copy of the models. Batches are dealt to the threads in turn and collected in
//! the same turn, so order is restored without a buffer and nothing depends on which thread is faster.

mod encoders;
mod pool;

pub use encoders::{EncodeError, Encoders};
pub use pool::{EncodePool, EncodedBatch, Interrupter};
