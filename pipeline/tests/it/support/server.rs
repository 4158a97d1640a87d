//! A real S3 server over a folder, independent of the embedded server of the product.
//!
//! `s3s-fs` does not list unfinished uploads as S3 does; [`Listing`] adds that.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Mutex;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::dto::*;
use s3s::service::S3ServiceBuilder;
use s3s::{S3, S3Request, S3Response, S3Result};
use s3s_fs::FileSystem;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

/// Serves `root`'s subfolders as buckets while `runtime` runs. Requests must be signed with one of `keys`
/// (each is its own secret), or unsigned if there are none.
pub(crate) fn serve(runtime: &Handle, root: &Path, keys: &[&str]) -> SocketAddr {
    let files = FileSystem::new(root).unwrap();
    let mut service = S3ServiceBuilder::new(Listing {
        files,
        uploads: Mutex::default(),
    });
    if !keys.is_empty() {
        let mut auth = SimpleAuth::new();
        for key in keys {
            auth.register((*key).to_owned(), (*key).into());
        }
        service.set_auth(auth);
    }
    let service = service.build();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((socket, _)) = listener.accept().await {
            while connections.try_join_next().is_some() {}
            let service = service.clone();
            connections.spawn(async move {
                let http = Builder::new(TokioExecutor::new());
                // A client may close the connection at any time.
                http.serve_connection(TokioIo::new(socket), service)
                    .await
                    .ok();
            });
        }
    });
    address
}

/// The file system, and the unfinished uploads as (bucket, key, id).
struct Listing {
    files: FileSystem,
    uploads: Mutex<Vec<(String, String, String)>>,
}

impl Listing {
    fn ended(&self, id: &str) {
        self.uploads
            .lock()
            .unwrap()
            .retain(|(_, _, begun)| begun != id);
    }
}

#[async_trait::async_trait]
impl S3 for Listing {
    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let (bucket, key) = (request.input.bucket.clone(), request.input.key.clone());
        let answer = self.files.create_multipart_upload(request).await?;
        let id = answer.output.upload_id.clone().unwrap();
        self.uploads.lock().unwrap().push((bucket, key, id));
        Ok(answer)
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let id = request.input.upload_id.clone();
        let answer = self.files.complete_multipart_upload(request).await?;
        self.ended(&id);
        Ok(answer)
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let id = request.input.upload_id.clone();
        let answer = self.files.abort_multipart_upload(request).await?;
        self.ended(&id);
        Ok(answer)
    }

    async fn list_multipart_uploads(
        &self,
        request: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let prefix = request.input.prefix.unwrap_or_default();
        let uploads = self.uploads.lock().unwrap();
        let uploads = uploads
            .iter()
            .filter(|(bucket, key, _)| *bucket == request.input.bucket && key.starts_with(&prefix))
            .map(|(_, key, id)| MultipartUpload {
                key: Some(key.clone()),
                upload_id: Some(id.clone()),
                ..MultipartUpload::default()
            });
        Ok(S3Response::new(ListMultipartUploadsOutput {
            uploads: Some(uploads.collect()),
            ..ListMultipartUploadsOutput::default()
        }))
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        self.files.upload_part(request).await
    }

    async fn put_object(
        &self,
        request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        self.files.put_object(request).await
    }

    async fn get_object(
        &self,
        request: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        self.files.get_object(request).await
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        self.files.head_object(request).await
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.files.delete_object(request).await
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        self.files.list_objects_v2(request).await
    }
}
