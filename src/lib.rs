//! coffey distils a latent diffusion model into a Latent Consistency Model from a stream of captioned images.
//!
//! The data's way: [`coffey_pipeline`] turns shards into pixel batches, [`encode`] turns those into latents and text embeddings,
//! [`train`] distils from them, or [`latents`] writes them to shards. [`monitor`] lets others look on, [`track`] records for them. [`pretrained`] brings models
//! here, [`hub`] takes the finished student there, [`models`] are the networks, built over the layers of [`ops`]; [`diffusion`] is the mathematics; [`config`] and [`cli`] are the edges.

#[macro_use]
mod say;

pub mod adaptation;
pub mod cli;
pub mod conditioning;
pub mod config;
pub mod diffusion;
pub mod draw;
pub mod encode;
mod environment;
pub mod hub;
pub mod latents;
pub mod models;
pub mod monitor;
pub mod objective;
pub mod ops;
pub mod params;
pub mod precompute;
pub mod pretrained;
mod process;
mod progress;
pub mod random;
pub mod ranks;
pub mod sample;
pub mod signals;
pub mod track;
pub mod train;
