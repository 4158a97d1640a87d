//! The S3 client, over the AWS SDK: one request at a time. The caller retries.
//!
//! Owns the connection, its credentials, and the meaning of the server's errors. It never decides which
//! object is read or written.

mod body;
mod client;
mod connect;
mod credentials;
mod error;
mod lookup;
mod operation;
mod options;
mod paging;
mod read;
mod refusal;
#[cfg(test)]
mod refusal_tests;
mod write;

pub use options::S3Options;
pub use read::ObjectInfo;
pub use write::{ConditionalWrite, ObjectMeta, WriteCondition};

pub(crate) use client::S3;
pub(crate) use paging::Paging;
pub(crate) use write::{ObjectPath, UploadMarker, UploadedPart, wrong_uploads};
