//! Shards: their URLs ([`ShardUrl`]), and reading their tars into [`Sample`]s.
//!
//! Owns URL syntax, tar reading, webdataset's grouping of members, and the filter. It never touches the network:
//! bytes come from any [`std::io::Read`].

mod expand;
mod filter;
#[cfg(test)]
mod golden_tests;
mod gzip;
mod header;
mod http_url;
mod hub;
mod image_shard;
mod limits;
mod mistakes;
mod other_file;
mod pattern;
mod pipe;
mod sample;
mod tar;
mod url;

pub use expand::expand;
pub use filter::{Filter, FilterReport, Rejection};
pub use header::member_header;
pub use pattern::ShardPattern;
pub use sample::{Excess, Sample};
pub use url::{ShardUrl, UrlError};

pub(crate) use expand::{expand_one, split};
pub(crate) use filter::{AESTHETIC, FilterState, PUNSAFE, PWATERMARK, SIMILARITY, number};
pub(crate) use http_url::HttpUrl;
pub(crate) use hub::HubFile;
pub(crate) use image_shard::ImageShard;
pub(crate) use limits::{HeldMembers, MAX_CAPTION_BYTES};
#[cfg(test)]
pub(crate) use sample::split_name;
pub(crate) use tar::{
    PassedOver, PassedOverKind, TAIL_BYTES, TarError, TarItem, TarOptions, read_samples,
};
pub(crate) use url::Location;
