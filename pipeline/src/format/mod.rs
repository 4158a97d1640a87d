//! File formats of this project, reader and writer side by side: [`latents`] and the arrays in them.
//!
//! Pure byte and JSON work on one sample at a time: the code here never opens a file, never draws a random number
//! and never decides which samples are used.

pub mod latents;
mod npy;

pub(crate) use npy::{ArrayError, Npy};
