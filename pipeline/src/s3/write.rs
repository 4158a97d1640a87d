//! The requests that change a bucket.

use std::collections::BTreeMap;
use std::sync::Arc;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;

use super::client::S3;
use super::connect::Connection;
use super::operation::Operation;
use crate::net::{RequestFailure, SourceError};
use crate::shard::ShardUrl;

/// The place of an object in S3.
#[derive(Debug, Clone)]
pub(crate) struct ObjectPath {
    pub(crate) url: ShardUrl,
    pub(crate) bucket: String,
    pub(crate) key: String,
}

impl ObjectPath {
    pub(crate) fn new(bucket: &str, key: String) -> Self {
        Self {
            url: ShardUrl::s3(bucket, &key),
            bucket: bucket.to_owned(),
            key,
        }
    }
}

/// A part of an upload, received by the server.
#[derive(Debug, Clone)]
pub(crate) struct UploadedPart(CompletedPart);

impl UploadedPart {
    /// The part's number in the object, from 1.
    pub(crate) fn number(&self) -> Option<i32> {
        self.0.part_number()
    }
}

/// An upload by key and id; also the place where a page of a listing begins, with an empty id if the
/// server gives none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct UploadMarker {
    pub(crate) key: String,
    pub(crate) id: String,
}

/// A page of the uploads that were neither completed nor aborted.
#[derive(Debug)]
pub(crate) struct IncompleteUploads {
    pub(crate) uploads: Vec<UploadMarker>,
    /// Start of the next page; `None` on the last page.
    pub(crate) next: Option<UploadMarker>,
}

/// Size and metadata of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectMeta {
    /// Size in bytes.
    pub size: u64,
    /// As given to [`Destination::create_with`](crate::Destination::create_with); always empty in a
    /// folder, which has no metadata.
    pub metadata: BTreeMap<String, String>,
}

type Metadata = BTreeMap<String, String>;

/// The state of an object that a conditional write requires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteCondition<'a> {
    /// There is no object of the name.
    Absent,
    /// The object has this ETag.
    Unchanged(&'a str),
}

/// The result of a conditional write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConditionalWrite {
    /// The object is written and has this ETag.
    Written(String),
    /// The object is in another state. A request whose response was lost may have written it.
    Refused,
    /// The server has no conditional writes.
    Unsupported,
}

impl S3 {
    /// Counts a request of `used`, and says what an error means.
    async fn finished<T, E>(
        &self,
        url: &ShardUrl,
        used: &Arc<Connection>,
        operation: Operation,
        response: Result<T, SdkError<E, HttpResponse>>,
    ) -> Result<T, RequestFailure>
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        match response {
            Ok(output) => {
                self.server.record_request("ok");
                Ok(output)
            }
            Err(error) => Err(self.failure(url, used, &error, operation).await),
        }
    }

    /// Writes an object in one request.
    pub(crate) async fn put(
        &self,
        target: &ObjectPath,
        body: Bytes,
        metadata: &Metadata,
    ) -> Result<(), RequestFailure> {
        let connection = self.connection();
        let mut request = connection
            .client
            .put_object()
            .bucket(&target.bucket)
            .key(&target.key)
            .set_request_payer(self.payer())
            .body(ByteStream::from(body));
        for (key, value) in metadata {
            request = request.metadata(key, value);
        }
        let response = request.send().await;
        self.finished(&target.url, &connection, Operation::Put, response)
            .await
            .map(drop)
    }

    /// Writes an object in one request if it is in a certain state.
    pub(crate) async fn put_if(
        &self,
        target: &ObjectPath,
        body: Bytes,
        condition: WriteCondition<'_>,
    ) -> Result<ConditionalWrite, RequestFailure> {
        let connection = self.connection();
        let request = connection
            .client
            .put_object()
            .bucket(&target.bucket)
            .key(&target.key)
            .set_request_payer(self.payer())
            .body(ByteStream::from(body));
        let request = match condition {
            WriteCondition::Absent => request.if_none_match("*"),
            WriteCondition::Unchanged(etag) => request.if_match(etag),
        };
        let response = request.send().await;
        if let Err(SdkError::ServiceError(error)) = &response {
            let answer = match error.raw().status().as_u16() {
                // 404: there is no object to compare with. 409: another write was faster.
                404 if error.err().code() == Some("NoSuchKey") => Some(ConditionalWrite::Refused),
                409 | 412 => Some(ConditionalWrite::Refused),
                501 => Some(ConditionalWrite::Unsupported),
                _ => None,
            };
            if let Some(answer) = answer {
                self.server.record_request("ok");
                return Ok(answer);
            }
        }
        let output = self
            .finished(&target.url, &connection, Operation::Put, response)
            .await?;
        Ok(match output.e_tag() {
            Some(etag) => ConditionalWrite::Written(etag.to_owned()),
            None => ConditionalWrite::Unsupported,
        })
    }

    /// Begins an upload in parts and returns its id.
    pub(crate) async fn begin(
        &self,
        target: &ObjectPath,
        metadata: &Metadata,
    ) -> Result<String, RequestFailure> {
        let connection = self.connection();
        let mut request = connection
            .client
            .create_multipart_upload()
            .bucket(&target.bucket)
            .key(&target.key)
            .set_request_payer(self.payer());
        for (key, value) in metadata {
            request = request.metadata(key, value);
        }
        let response = request.send().await;
        let output = self
            .finished(&target.url, &connection, Operation::BeginUpload, response)
            .await?;
        output
            .upload_id()
            .map(str::to_owned)
            .ok_or_else(|| RequestFailure::Passing {
                reason: "bad_response",
                cause: "no id of the upload".to_owned(),
            })
    }

    /// Sends a part; `number` counts from 1.
    pub(crate) async fn send_part(
        &self,
        target: &ObjectPath,
        id: &str,
        number: i32,
        body: Bytes,
    ) -> Result<UploadedPart, RequestFailure> {
        let connection = self.connection();
        let request = connection
            .client
            .upload_part()
            .bucket(&target.bucket)
            .key(&target.key)
            .upload_id(id)
            .part_number(number)
            .set_request_payer(self.payer())
            .body(ByteStream::from(body));
        let response = request.send().await;
        let output = self
            .finished(&target.url, &connection, Operation::SendPart, response)
            .await?;
        // A server that received checksums of parts asks for them again at the end.
        Ok(UploadedPart(
            CompletedPart::builder()
                .part_number(number)
                .set_e_tag(output.e_tag().map(str::to_owned))
                .set_checksum_crc32(output.checksum_crc32().map(str::to_owned))
                .build(),
        ))
    }

    /// Joins the parts to an object, in their order.
    pub(crate) async fn complete(
        &self,
        target: &ObjectPath,
        id: &str,
        parts: &[UploadedPart],
    ) -> Result<(), RequestFailure> {
        let connection = self.connection();
        let parts = parts.iter().map(|part| part.0.clone()).collect();
        let parts = CompletedMultipartUpload::builder()
            .set_parts(Some(parts))
            .build();
        let request = connection
            .client
            .complete_multipart_upload()
            .bucket(&target.bucket)
            .key(&target.key)
            .upload_id(id)
            .set_request_payer(self.payer())
            .multipart_upload(parts);
        let response = request.send().await;
        self.finished(
            &target.url,
            &connection,
            Operation::CompleteUpload,
            response,
        )
        .await
        .map(drop)
    }

    /// Aborts an upload and removes its parts. A missing upload is no error.
    pub(crate) async fn abort(&self, target: &ObjectPath, id: &str) -> Result<(), RequestFailure> {
        let connection = self.connection();
        let request = connection
            .client
            .abort_multipart_upload()
            .bucket(&target.bucket)
            .key(&target.key)
            .upload_id(id)
            .set_request_payer(self.payer());
        let response = request.send().await;
        let gone = |error: &SdkError<_, _>| error.code() == Some("NoSuchUpload");
        if response.as_ref().is_err_and(gone) {
            self.server.record_request("ok");
            return Ok(());
        }
        self.finished(&target.url, &connection, Operation::AbortUpload, response)
            .await
            .map(drop)
    }

    /// Removes an object. A missing object is no error.
    pub(crate) async fn delete(&self, target: &ObjectPath) -> Result<(), RequestFailure> {
        let connection = self.connection();
        let request = connection
            .client
            .delete_object()
            .bucket(&target.bucket)
            .key(&target.key)
            .set_request_payer(self.payer());
        let response = request.send().await;
        self.finished(&target.url, &connection, Operation::Delete, response)
            .await
            .map(drop)
    }

    /// An object's size and metadata; `None` if there is no such object.
    pub(crate) async fn head(
        &self,
        target: &ObjectPath,
    ) -> Result<Option<ObjectMeta>, RequestFailure> {
        let connection = self.connection();
        let request = connection
            .client
            .head_object()
            .bucket(&target.bucket)
            .key(&target.key)
            .set_request_payer(self.payer());
        let response = request.send().await;
        // A HEAD response has no body: a missing bucket looks the same.
        let absent = |error: &SdkError<_, HttpResponse>| matches!(error, SdkError::ServiceError(e) if e.raw().status().as_u16() == 404);
        if response.as_ref().is_err_and(absent) {
            self.server.record_request("not_found");
            return Ok(None);
        }
        let output = self
            .finished(&target.url, &connection, Operation::Head, response)
            .await?;
        let size = output.content_length().and_then(|n| u64::try_from(n).ok());
        let metadata = output.metadata().cloned().unwrap_or_default();
        Ok(Some(ObjectMeta {
            size: size.unwrap_or_default(),
            metadata: metadata.into_iter().collect(),
        }))
    }

    /// One page of the incomplete uploads under a prefix, from `marker` on.
    pub(crate) async fn incomplete_uploads(
        &self,
        prefix: &ObjectPath,
        marker: Option<&UploadMarker>,
    ) -> Result<IncompleteUploads, RequestFailure> {
        let connection = self.connection();
        let request = connection
            .client
            .list_multipart_uploads()
            .bucket(&prefix.bucket)
            .prefix(&prefix.key)
            .set_request_payer(self.payer())
            .set_key_marker(marker.map(|marker| marker.key.clone()))
            .set_upload_id_marker(
                marker
                    .map(|marker| marker.id.clone())
                    .filter(|id| !id.is_empty()),
            );
        let response = request.send().await;
        let output = self
            .finished(&prefix.url, &connection, Operation::ListUploads, response)
            .await?;
        let wrong =
            |cause: &str| RequestFailure::Fatal(wrong_uploads(&prefix.url, cause.to_owned()));
        let uploads = output.uploads().iter().map(|upload| {
            let (key, id) = (upload.key()?.to_owned(), upload.upload_id()?.to_owned());
            Some(UploadMarker { key, id })
        });
        let uploads: Option<Vec<_>> = uploads.collect();
        let uploads = uploads.ok_or_else(|| wrong("it has an upload without a key or an id"))?;
        let is_truncated = output.is_truncated() == Some(true);
        let next = output.next_key_marker().filter(|key| !key.is_empty());
        let next = match next {
            Some(key) if is_truncated => Some(UploadMarker {
                key: key.to_owned(),
                id: output
                    .next_upload_id_marker()
                    .unwrap_or_default()
                    .to_owned(),
            }),
            None if is_truncated => {
                return Err(wrong(
                    "a page is truncated (IsTruncated) and has no NextKeyMarker",
                ));
            }
            _ => None,
        };
        Ok(IncompleteUploads { uploads, next })
    }
}

/// The error for a wrong listing of the incomplete uploads under a prefix.
pub(crate) fn wrong_uploads(prefix: &ShardUrl, cause: String) -> SourceError {
    SourceError::Listing {
        url: prefix.to_string(),
        cause: format!("incomplete uploads: {cause}"),
        hint: "abort the incomplete uploads with another tool, or let a lifecycle rule of the bucket do it",
    }
}
