//! Shards: naming them ([`ShardUrl`]), and taking their tars apart into [`Sample`]s.
//!
//! Owns URL syntax, tar reading and webdataset's grouping of members. It never touches the network:
//! bytes come in through any [`std::io::Read`].

mod expand;
mod filter;
#[cfg(test)]
mod golden_tests;
mod gzip;
mod sample;
mod tar;
mod url;

pub use expand::expand;
pub use filter::{Filter, FilterReport, Rejection};
pub use sample::Sample;
pub use url::{ShardUrl, UrlError};

pub(crate) use expand::{expand_one, split};
pub(crate) use filter::FilterState;
pub(crate) use tar::{
    Found, Grouped, PassedOver, TAIL_BYTES, TarError, TarOptions, Why, read_samples,
};
pub(crate) use url::Location;
