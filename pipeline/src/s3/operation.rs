//! The requests by name, and the permission that each one needs.

/// The kind of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// An object from byte `offset` on.
    Get {
        offset: u64,
    },
    Head,
    List,
    ListUploads,
    Put,
    BeginUpload,
    SendPart,
    CompleteUpload,
    AbortUpload,
    Delete,
}

impl Operation {
    /// The name of the request in S3's API.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Get { .. } => "GetObject",
            Self::Head => "HeadObject",
            Self::List => "ListObjectsV2",
            Self::ListUploads => "ListMultipartUploads",
            Self::Put => "PutObject",
            Self::BeginUpload => "CreateMultipartUpload",
            Self::SendPart => "UploadPart",
            Self::CompleteUpload => "CompleteMultipartUpload",
            Self::AbortUpload => "AbortMultipartUpload",
            Self::Delete => "DeleteObject",
        }
    }

    /// Whether the request serves a write.
    pub(super) fn is_write(self) -> bool {
        !matches!(self, Self::Get { .. } | Self::List)
    }

    /// Whether the request is a part of an upload in parts.
    pub(super) fn is_multipart(self) -> bool {
        matches!(
            self,
            Self::BeginUpload | Self::SendPart | Self::CompleteUpload
        )
    }

    /// Advice after the server has denied access.
    pub(super) fn access_advice(self) -> &'static str {
        match self {
            Self::Get { .. } => {
                "check the credentials and the bucket's policy (s3:GetObject), or set [s3] anonymous = true for a public bucket, \
                 [s3] requester_pays = true where the bucket asks for it"
            }
            Self::List => {
                "listing needs s3:ListBucket on the bucket, besides s3:GetObject on the objects: check the credentials and the \
                 bucket's policy, name the shards instead of their prefix (s3://bucket/{00000..00099}.tar or @FILE), or set \
                 [s3] anonymous = true for a public bucket, [s3] requester_pays = true where the bucket asks for it"
            }
            _ => {
                "check that the credentials may write there (s3:PutObject, s3:GetObject, s3:DeleteObject and \
                 s3:AbortMultipartUpload on the objects, s3:ListBucket on the bucket)"
            }
        }
    }
}
