//! The parts shared by every access to a server: errors, certificates, the form of a response, the
//! record of a server and the retry budget.
//!
//! Below [`source`](crate::source), [`destination`](crate::destination) and [`s3`](crate::s3); it makes
//! no request itself.

mod error;
mod refusal;
mod response;
mod retry;
mod server;
mod tls;

pub use error::{Details, SourceError};
pub use server::{S3Counts, ServerRecord};

pub(crate) use error::{causes, causes_in_full};
pub(crate) use refusal::{ServerMessage, element, is_passing, one_line};
pub(crate) use response::{Body, Condition, GetResult, content_range};
pub(crate) use retry::{FIRST_DELAY, RequestFailure, RetryBudget, RetryOptions};
pub(crate) use tls::{CaBundle, certificate_error};
