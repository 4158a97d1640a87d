//! The requests that change a bucket, one at a time; repeating them is the caller's.

use std::collections::BTreeMap;
use std::sync::Arc;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;

use super::answer::Doing;
use super::{Connection, Failure, S3, ShardUrl};

/// An object that is written.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) url: ShardUrl,
    pub(crate) bucket: String,
    pub(crate) key: String,
}

impl Target {
    pub(crate) fn new(bucket: &str, key: String) -> Self {
        Self {
            url: ShardUrl::s3(bucket, &key),
            bucket: bucket.to_owned(),
            key,
        }
    }
}

/// A part of an upload that the server has.
#[derive(Debug, Clone)]
pub(crate) struct Sent(CompletedPart);

impl Sent {
    /// Its place in the object, from 1.
    pub(crate) fn number(&self) -> Option<i32> {
        self.0.part_number()
    }
}

/// An upload that was begun and neither completed nor aborted.
#[derive(Debug, Clone)]
pub(crate) struct Unfinished {
    pub(crate) key: String,
    pub(crate) id: String,
}

type Metadata = BTreeMap<String, String>;

impl S3 {
    /// What the answer to a request of `used` means.
    async fn written<T, E>(
        &self,
        url: &ShardUrl,
        used: &Arc<Connection>,
        answer: Result<T, SdkError<E, HttpResponse>>,
    ) -> Result<T, Failure>
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        match answer {
            Ok(output) => {
                self.metrics.s3_request("ok");
                Ok(output)
            }
            Err(error) => Err(self.failed(url, used, &error, Doing::Writing).await),
        }
    }

    /// Writes an object in one request.
    pub(crate) async fn put(
        &self,
        target: &Target,
        body: Bytes,
        metadata: &Metadata,
    ) -> Result<(), Failure> {
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
        let answer = request.send().await;
        self.written(&target.url, &connection, answer)
            .await
            .map(drop)
    }

    /// Begins an upload in parts; its id.
    pub(crate) async fn begin(
        &self,
        target: &Target,
        metadata: &Metadata,
    ) -> Result<String, Failure> {
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
        let answer = request.send().await;
        let output = self.written(&target.url, &connection, answer).await?;
        output
            .upload_id()
            .map(str::to_owned)
            .ok_or_else(|| super::passing("bad_response", "no id of the upload".to_owned()))
    }

    /// Sends a part; `number` counts from 1.
    pub(crate) async fn send_part(
        &self,
        target: &Target,
        id: &str,
        number: i32,
        body: Bytes,
    ) -> Result<Sent, Failure> {
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
        let answer = request.send().await;
        let output = self.written(&target.url, &connection, answer).await?;
        // A server that was told checksums of parts asks for them again at the end.
        Ok(Sent(
            CompletedPart::builder()
                .part_number(number)
                .set_e_tag(output.e_tag().map(str::to_owned))
                .set_checksum_crc32(output.checksum_crc32().map(str::to_owned))
                .build(),
        ))
    }

    /// Makes an object of the parts, in their order.
    pub(crate) async fn complete(
        &self,
        target: &Target,
        id: &str,
        parts: &[Sent],
    ) -> Result<(), Failure> {
        let connection = self.connection();
        let parts = parts.iter().map(|sent| sent.0.clone()).collect();
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
        let answer = request.send().await;
        self.written(&target.url, &connection, answer)
            .await
            .map(drop)
    }

    /// Gives an upload up, with the parts that were sent. One that is gone already is no error.
    pub(crate) async fn abort(&self, target: &Target, id: &str) -> Result<(), Failure> {
        let connection = self.connection();
        let request = connection
            .client
            .abort_multipart_upload()
            .bucket(&target.bucket)
            .key(&target.key)
            .upload_id(id)
            .set_request_payer(self.payer());
        let answer = request.send().await;
        let gone = |error: &SdkError<_, _>| error.code() == Some("NoSuchUpload");
        if answer.as_ref().is_err_and(gone) {
            self.metrics.s3_request("ok");
            return Ok(());
        }
        self.written(&target.url, &connection, answer)
            .await
            .map(drop)
    }

    /// Removes an object. One that is gone already is no error.
    pub(crate) async fn delete(&self, target: &Target) -> Result<(), Failure> {
        let connection = self.connection();
        let request = connection
            .client
            .delete_object()
            .bucket(&target.bucket)
            .key(&target.key)
            .set_request_payer(self.payer());
        let answer = request.send().await;
        self.written(&target.url, &connection, answer)
            .await
            .map(drop)
    }

    /// An object's size in bytes and metadata; `None` if there is no such object.
    pub(crate) async fn head(&self, target: &Target) -> Result<Option<(u64, Metadata)>, Failure> {
        let connection = self.connection();
        let request = connection
            .client
            .head_object()
            .bucket(&target.bucket)
            .key(&target.key)
            .set_request_payer(self.payer());
        let answer = request.send().await;
        // A HEAD has no body to say more in: a bucket that is not there looks the same.
        let absent = |error: &SdkError<_, HttpResponse>| matches!(error, SdkError::ServiceError(e) if e.raw().status().as_u16() == 404);
        if answer.as_ref().is_err_and(absent) {
            self.metrics.s3_request("not_found");
            return Ok(None);
        }
        let output = self.written(&target.url, &connection, answer).await?;
        let size = output.content_length().and_then(|n| u64::try_from(n).ok());
        let metadata = output.metadata().cloned().unwrap_or_default();
        Ok(Some((
            size.unwrap_or_default(),
            metadata.into_iter().collect(),
        )))
    }

    /// A page of the uploads under a prefix that are neither completed nor aborted, and where the next page begins.
    pub(crate) async fn unfinished(
        &self,
        url: &ShardUrl,
        (bucket, prefix): (&str, &str),
        from: Option<&(String, String)>,
    ) -> Result<(Vec<Unfinished>, Option<(String, String)>), Failure> {
        let connection = self.connection();
        let request = connection
            .client
            .list_multipart_uploads()
            .bucket(bucket)
            .prefix(prefix)
            .set_request_payer(self.payer())
            .set_key_marker(from.map(|(key, _)| key.clone()))
            .set_upload_id_marker(from.map(|(_, id)| id.clone()));
        let answer = request.send().await;
        let output = self.written(url, &connection, answer).await?;
        let uploads = output.uploads().iter().filter_map(|upload| {
            Some(Unfinished {
                key: upload.key()?.to_owned(),
                id: upload.upload_id()?.to_owned(),
            })
        });
        let next = match (output.next_key_marker(), output.next_upload_id_marker()) {
            (Some(key), Some(id)) if output.is_truncated() == Some(true) => {
                Some((key.to_owned(), id.to_owned()))
            }
            _ => None,
        };
        Ok((uploads.collect(), next))
    }
}
