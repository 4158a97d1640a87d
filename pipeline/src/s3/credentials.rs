//! Credentials: the ones in use, and the renewal of expired ones.

use std::sync::{Arc, Mutex, PoisonError};

use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::future;
use aws_sdk_s3::config::{Credentials, ProvideCredentials, SharedCredentialsProvider};

use super::client::S3;
use super::connect::Connection;
use crate::net::{RequestFailure, SourceError};
use crate::shard::ShardUrl;

/// The credentials that a provider returned last.
pub(super) type LastCredentials = Arc<Mutex<Option<Credentials>>>;

/// A provider that stores the credentials it returned: a second call may read a file or run a program
/// again.
#[derive(Debug)]
pub(super) struct StoringProvider {
    pub(super) provider: SharedCredentialsProvider,
    pub(super) last: LastCredentials,
    /// Region that requests are signed for.
    pub(super) region: String,
}

/// The fault of a value that becomes a part of a header, where the SDK panics.
fn check_printable(what: &str, value: &str, places: &str) -> Result<(), CredentialsError> {
    if value.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    Err(CredentialsError::invalid_configuration(format!(
        "the {what} has a character that none has, as a line end: check {places}"
    )))
}

impl ProvideCredentials for StoringProvider {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async move {
            check_printable("region", &self.region, "[s3] region and AWS_REGION")?;
            let credentials = self.provider.provide_credentials().await?;
            let places = "AWS_ACCESS_KEY_ID and the credentials file";
            check_printable("access key id", credentials.access_key_id(), places)?;
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            *last = Some(credentials.clone());
            Ok(credentials)
        })
    }
}

impl S3 {
    /// Looks for newer credentials after the server called the credentials of `used` expired. Returns
    /// `failure`, or a final error if there are none.
    ///
    /// Credentials with an expiry are renewed by their provider in its own time, so a retry makes sense.
    /// Other credentials may have been replaced in a file since.
    pub(super) async fn renew(
        &self,
        url: &ShardUrl,
        used: &Arc<Connection>,
        failure: RequestFailure,
    ) -> RequestFailure {
        // One renewal at a time.
        let _guard = self.renewing.lock().await;
        if !Arc::ptr_eq(&self.connection(), used) {
            return failure;
        }
        let fresh = self.chain.connect().await;
        let before = {
            let last = used.last.lock();
            last.unwrap_or_else(PoisonError::into_inner).clone()
        };
        let (Some(before), Some(after)) = (before, fresh.credentials().await) else {
            return failure;
        };
        if before == after && after.expiry().is_none() {
            let cause = match failure {
                RequestFailure::Passing { cause, .. } => cause,
                other => return other,
            };
            return RequestFailure::Fatal(SourceError::Expired {
                url: url.to_string(),
                cause,
            });
        }
        self.replace_connection(fresh);
        failure
    }
}
