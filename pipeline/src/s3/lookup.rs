//! Whether objects are there: a page of a listing, and one byte of an object.

use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::types::ObjectStorageClass;

use super::client::S3;
use super::operation::Operation;
use crate::net::RequestFailure;
use crate::shard::ShardUrl;

/// A page of a listing.
#[derive(Debug)]
pub(crate) struct KeyPage {
    /// The last key of the page, of whatever object.
    pub(crate) last: Option<String>,
    /// Keys of objects that can be read: not of archived objects, which may have to be restored first.
    pub(crate) readable: Vec<String>,
    /// Start of the next page; `None` on the last page.
    pub(crate) next: Option<String>,
}

impl S3 {
    /// One page of the keys with a prefix: from `token` on, or the first page after the key `after`.
    pub(crate) async fn list_page(
        &self,
        url: &ShardUrl,
        (bucket, prefix): (&str, &str),
        after: Option<&str>,
        token: Option<&str>,
    ) -> Result<KeyPage, RequestFailure> {
        let connection = self.connection();
        let request = connection
            .client
            .list_objects_v2()
            .bucket(bucket)
            .prefix(prefix)
            .set_request_payer(self.payer())
            .set_start_after(after.map(str::to_owned))
            .set_continuation_token(token.map(str::to_owned));
        let page = match request.send().await {
            Ok(page) => page,
            Err(error) => {
                let operation = Operation::List;
                return Err(self.failure(url, &connection, &error, operation).await);
            }
        };
        self.server.record_request("ok");
        let objects = page.contents().iter();
        let is_archived = |class: &ObjectStorageClass| {
            matches!(
                class,
                ObjectStorageClass::Glacier | ObjectStorageClass::DeepArchive
            )
        };
        let readable = objects.filter(|object| !object.storage_class().is_some_and(is_archived));
        Ok(KeyPage {
            readable: readable
                .filter_map(|object| object.key().map(str::to_owned))
                .collect(),
            last: page
                .contents()
                .last()
                .and_then(|object| object.key().map(str::to_owned)),
            next: page
                .next_continuation_token()
                .filter(|_| page.is_truncated() == Some(true))
                .map(str::to_owned),
        })
    }

    /// Requests the first byte of an object. An error of a GET names its cause; that of a HEAD has no body.
    pub(crate) async fn probe(
        &self,
        url: &ShardUrl,
        bucket: &str,
        key: &str,
    ) -> Result<(), RequestFailure> {
        let connection = self.connection();
        let request = connection
            .client
            .get_object()
            .bucket(bucket)
            .key(key)
            .range("bytes=0-0")
            .set_request_payer(self.payer());
        match request.send().await {
            Err(SdkError::ServiceError(error)) if error.raw().status().as_u16() == 416 => {
                // An empty object.
                self.server.record_request("ok");
                Ok(())
            }
            Err(error) => {
                let operation = Operation::Get { offset: 0 };
                Err(self.failure(url, &connection, &error, operation).await)
            }
            Ok(_) => {
                self.server.record_request("ok");
                Ok(())
            }
        }
    }
}
