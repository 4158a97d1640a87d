//! The encode pool: batches of images and captions, or of latents, to moments of latents and text embeddings.
//!
//! One thread a device entry, each with its own copy of the models that the data needs: none where both are stored. Batches are dealt to the threads in turn and collected in
//! the same turn, so order is restored without a buffer and nothing depends on which thread is faster.

mod encoders;
mod pool;
mod text;
mod worker;

pub use encoders::{EncodeError, Encoders};
pub use pool::{EncodePool, EncodedBatch, Interrupter};
pub use text::TextEncoder;
pub use worker::Worker;
