//! Reads and writes shards through the public interface. One test binary, because linking the AWS SDK takes longer than compiling a file of tests.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy.toml allows them in test functions, not in the functions that tests call"
)]

mod bodies;
mod cache;
mod child;
mod credentials;
#[cfg(feature = "embedded-s3")]
mod destination;
#[cfg(feature = "embedded-s3")]
mod faults;
#[cfg(feature = "embedded-s3")]
mod image_folder;
mod images;
mod inspect;
#[cfg(feature = "embedded-s3")]
mod latents;
mod limits;
#[cfg(feature = "embedded-s3")]
mod listed;
mod listings;
#[cfg(feature = "embedded-s3")]
mod lookup;
#[cfg(feature = "embedded-s3")]
mod memory;
mod network;
#[cfg(feature = "embedded-s3")]
mod order;
#[cfg(feature = "embedded-s3")]
mod recorder;
mod refusals;
mod soak;
#[cfg(feature = "embedded-s3")]
mod sources;
mod stdin;
mod support;
mod tls;
