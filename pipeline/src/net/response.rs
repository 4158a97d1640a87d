//! The response to a request for an object, over S3 or HTTP.

use bytes::Bytes;

use super::error::causes;

/// A response with its body still to be read.
#[derive(Debug)]
pub(crate) struct GetResult {
    pub(crate) body: Body,
    /// Offset of the body in the object. Bytes.
    pub(crate) start: u64,
    /// Size of the whole object. Bytes.
    pub(crate) total: Option<u64>,
    /// The version of the object: its ETag, else its date.
    pub(crate) version: Option<String>,
}

/// The version of an object that a request asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Condition<'a> {
    None,
    Is(&'a str),
    IsNot(&'a str),
}

/// A body that is being read.
#[derive(Debug)]
pub(crate) enum Body {
    S3(aws_sdk_s3::primitives::ByteStream),
    Http(reqwest::Response),
}

impl Body {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// The cause, if the body breaks off.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, String> {
        match self {
            Self::S3(stream) => stream.try_next().await.map_err(|error| causes(&error)),
            Self::Http(response) => response.chunk().await.map_err(|error| causes(&error)),
        }
    }
}

/// Parses `Content-Range`, such as `bytes 5-9/100`: the first byte, and the whole size if it is given.
pub(crate) fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes")?.trim().split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_range_is_parsed() {
        assert_eq!(content_range("bytes 5-9/100"), Some((5, Some(100))));
        assert_eq!(content_range("bytes 0-0/*"), Some((0, None)));
        assert_eq!(content_range("bytes */100"), None);
        assert_eq!(content_range("5-9"), None);
    }
}
