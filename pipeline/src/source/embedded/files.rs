//! The served folder. An operation that fails because too many files are open is answered with 503, which clients try again;
//! `s3s-fs` alone answers 404 or 500.

use s3s::dto::*;
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result};
use s3s_fs::FileSystem;

use crate::open_files;

/// The folder whose subfolders are the buckets.
pub(super) struct ServedFiles(pub(super) FileSystem);

/// The error of an operation as it is sent.
fn sent(error: S3Error) -> S3Error {
    let cause = error.source();
    if cause.is_some_and(|cause| open_files::is_cause_of(cause)) {
        return S3Error::with_message(S3ErrorCode::SlowDown, open_files::message());
    }
    error
}

/// Passes operations on to [`FileSystem`].
macro_rules! pass_on {
    ($($operation:ident: $input:ident -> $output:ident;)*) => {
        #[async_trait::async_trait]
        impl S3 for ServedFiles {
            $(async fn $operation(&self, request: S3Request<$input>) -> S3Result<S3Response<$output>> {
                self.0.$operation(request).await.map_err(sent)
            })*
        }
    };
}

pass_on! {
    create_bucket: CreateBucketInput -> CreateBucketOutput;
    copy_object: CopyObjectInput -> CopyObjectOutput;
    delete_bucket: DeleteBucketInput -> DeleteBucketOutput;
    delete_object: DeleteObjectInput -> DeleteObjectOutput;
    delete_objects: DeleteObjectsInput -> DeleteObjectsOutput;
    get_bucket_location: GetBucketLocationInput -> GetBucketLocationOutput;
    get_object: GetObjectInput -> GetObjectOutput;
    head_bucket: HeadBucketInput -> HeadBucketOutput;
    head_object: HeadObjectInput -> HeadObjectOutput;
    list_buckets: ListBucketsInput -> ListBucketsOutput;
    list_objects: ListObjectsInput -> ListObjectsOutput;
    list_objects_v2: ListObjectsV2Input -> ListObjectsV2Output;
    put_object: PutObjectInput -> PutObjectOutput;
    create_multipart_upload: CreateMultipartUploadInput -> CreateMultipartUploadOutput;
    upload_part: UploadPartInput -> UploadPartOutput;
    upload_part_copy: UploadPartCopyInput -> UploadPartCopyOutput;
    list_parts: ListPartsInput -> ListPartsOutput;
    complete_multipart_upload: CompleteMultipartUploadInput -> CompleteMultipartUploadOutput;
    abort_multipart_upload: AbortMultipartUploadInput -> AbortMultipartUploadOutput;
}
