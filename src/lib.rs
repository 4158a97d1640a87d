//! coffey distils a latent diffusion model into a Latent Consistency Model from a stream of captioned images.
//!
//! Data flow: [`coffey_pipeline`] turns shards into pixel batches, [`encode`] turns pixel batches into latents and text
//! embeddings, and [`train`] distils from them or [`latents`] writes them to shards. [`pretrained`] fetches models and [`hub`] pushes
//! the finished student. [`models`] has the networks, built from the layers of [`ops`]; [`diffusion`] has the mathematics. [`monitor`] serves a run's
//! state over HTTP, [`track`] writes the files of experiment trackers. [`config`] and [`cli`] are the user's side.

#[macro_use]
mod print;

pub mod adaptation;
pub mod cli;
pub mod conditioning;
pub mod config;
pub mod device;
pub mod diffusion;
pub mod draw;
pub mod encode;
pub mod hub;
pub mod latents;
pub mod lora;
pub mod memory;
pub mod models;
pub mod monitor;
pub mod objective;
pub mod ops;
mod pace;
pub mod params;
pub mod precompute;
pub mod pretrained;
mod process;
mod progress;
mod prompt_file;
pub mod random;
pub mod ranks;
pub mod sample;
pub mod signals;
pub mod track;
pub mod train;
