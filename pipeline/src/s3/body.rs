//! A limit on the responses that the SDK reads whole: every response but an object.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use aws_sdk_s3::config::interceptors::BeforeDeserializationInterceptorContextMut;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::primitives::SdkBody;
use aws_smithy_runtime_api::client::orchestrator::Metadata;
use bytes::Bytes;
use http_body::{Body, Frame};

use super::operation::Operation;
use crate::bounded::{MAX_RESPONSE_BYTES, TooLong};

/// Most bytes of an error's body; the rest is not read.
const MAX_ERROR_BYTES: u64 = 64 << 10;

/// Limits the bodies of responses.
#[derive(Debug)]
pub(super) struct LimitBodies;

impl Intercept for LimitBodies {
    fn name(&self) -> &'static str {
        "LimitBodies"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let operation = config.load::<Metadata>().map(Metadata::name);
        let gets_object = operation == Some(Operation::Get { offset: 0 }.name());
        let response = context.response_mut();
        let is_success = response.status().is_success();
        if is_success && gets_object {
            return Ok(());
        }
        let left = if is_success {
            MAX_RESPONSE_BYTES
        } else {
            MAX_ERROR_BYTES
        };
        let inner = response.take_body();
        *response.body_mut() = SdkBody::from_body_1_x(LimitedBody {
            inner,
            left,
            ends: !is_success,
        });
        Ok(())
    }
}

/// A body that ends, or fails, at a limit.
struct LimitedBody {
    inner: SdkBody,
    left: u64,
    /// Whether the body ends at the limit; else it fails.
    ends: bool,
}

impl Body for LimitedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.ends && self.left == 0 {
            return Poll::Ready(None);
        }
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(context));
        let data = match frame.map(|frame| frame.map(Frame::into_data)) {
            None => return Poll::Ready(None),
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
            Some(Ok(Ok(data))) => data,
        };
        let length = data.len() as u64;
        if length <= self.left {
            self.left -= length;
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if !self.ends {
            return Poll::Ready(Some(Err(Box::new(TooLong {
                size: None,
                most: MAX_RESPONSE_BYTES,
            }))));
        }
        let kept = usize::try_from(self.left).unwrap_or(usize::MAX);
        self.left = 0;
        Poll::Ready(Some(Ok(Frame::data(data.slice(..kept)))))
    }
}
