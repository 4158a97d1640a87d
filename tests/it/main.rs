//! Runs the `coffey` binary as a user does. One test binary, because linking candle and the AWS SDK takes longer than compiling a file of tests.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "clippy.toml allows them in test functions, not in the functions that tests call"
)]

mod bench;
mod chaos;
mod check;
mod control_characters;
mod device;
mod extending;
mod hostile;
mod inspect;
mod lanes;
mod latents;
mod lora;
mod lora_training;
mod model_forms;
mod model_sources;
mod models;
mod numbers;
mod open_files;
mod output_lock;
mod own_files;
mod pack;
mod page;
mod precompute;
mod prometheus;
mod push;
mod ranks;
mod ranks_network;
mod ranks_tcp;
mod replay;
mod restart;
mod resume;
mod rooms;
mod sample;
mod sdxl;
mod secrets;
mod support;
mod terminal;
mod trackers;
mod train;
