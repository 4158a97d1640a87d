//! The encode pool: batches of images and captions, or of stored latents, to moments of latents and conditioning.
//!
//! One thread per encoder device. Batches are dealt to the threads in turn and collected in the same turn, so the order needs no
//! buffer and does not depend on which thread is faster. The pool knows neither the configuration nor where models come from.

mod encoders;
mod pool;

pub use crate::conditioning::Unconditional;
pub use encoders::{EncodeError, EncoderOptions, EncoderOutput, Encoders, ToldSizes};
pub use pool::{EncodePool, EncodedBatch};
