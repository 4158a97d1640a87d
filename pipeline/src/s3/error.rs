//! The meaning of the SDK's errors.

use std::error::Error;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ConnectorError, ProvideErrorMetadata, SdkError};

use super::connect::Connection;
use super::operation::Operation;
use super::refusal::{Outcome, S3Refusal, passing};
use crate::bounded::TooLong;
use crate::net::{RequestFailure, ServerMessage, SourceError, causes, certificate_error};
use crate::open_files;
use crate::shard::ShardUrl;

/// The meaning of an error of the SDK after a request over the connection `used`: the outcome for the
/// metrics, and the failure.
pub(super) fn meaning<E>(
    url: &ShardUrl,
    used: &Connection,
    error: &SdkError<E, HttpResponse>,
    operation: Operation,
) -> Outcome
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let endpoint = used.endpoint.as_str();
    match error {
        SdkError::ServiceError(service) => {
            let (raw, said) = (service.raw(), service.err());
            let status = raw.status().as_u16();
            let body = raw.body().bytes().unwrap_or_default();
            let said = match said.code() {
                Some(code) => ServerMessage::new(code, said.message().unwrap_or_default()),
                None => ServerMessage::parse(body),
            };
            if raw.status().is_success() && said.code.is_empty() {
                let cause = format!(
                    "{}: the response is not that of an S3 server (HTTP {status}, and no XML of S3); check s3.endpoint_url",
                    operation.name(),
                );
                let url = url.redacted();
                let error = SourceError::Refused { url, cause };
                return ("bad_response", RequestFailure::Fatal(error));
            }
            let header = |name: &str| raw.headers().get(name);
            S3Refusal {
                status,
                said,
                region: header("x-amz-bucket-region"),
                location: header("location"),
                body: &String::from_utf8_lossy(body),
                sends_checksums: used.sends_checksums,
            }
            .meaning(url, operation)
        }
        SdkError::TimeoutError(_) => passing("timeout", inner_causes(error)),
        SdkError::ResponseError(_) => match too_long(error) {
            Some(error) => {
                let failure = RequestFailure::Fatal(SourceError::TooLong {
                    url: url.redacted(),
                    what: operation.name(),
                    error: error.clone(),
                });
                ("bad_response", failure)
            }
            None => passing(
                "bad_response",
                format!("{}: {}", operation.name(), inner_causes(error)),
            ),
        },
        SdkError::DispatchFailure(dispatch) => {
            let connector = dispatch.as_connector_error();
            let cause = connector.map_or_else(|| inner_causes(error), connector_causes);
            if open_files::is_cause_of(error) {
                ("open_files", RequestFailure::OpenFiles)
            } else if let Some(error) = certificate_error(url, endpoint, &cause) {
                ("certificate", RequestFailure::Fatal(error))
            } else if dispatch.is_timeout() || dispatch.is_io() {
                let failure = RequestFailure::Connect {
                    cause,
                    endpoint: endpoint.to_owned(),
                    hint: " and [s3] endpoint_url",
                };
                ("connect", failure)
            } else if connector.is_some_and(|error| error.as_other().is_some()) {
                // Such as a kept-alive connection that the server closes just as it is used again.
                passing("bad_response", cause)
            } else {
                client_error(url, cause)
            }
        }
        other => client_error(url, inner_causes(other)),
    }
}

/// The limit of a response, if it is the cause.
fn too_long<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a TooLong> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(too_long) = error.downcast_ref() {
            return Some(too_long);
        }
        next = error.source();
    }
    None
}

/// The causes of an error without its own text, which only names the step of the SDK.
fn inner_causes(error: &(dyn Error + 'static)) -> String {
    causes(error.source().unwrap_or(error))
}

fn connector_causes(error: &ConnectorError) -> String {
    inner_causes(error)
}

/// The failure of a request that could not be sent.
fn client_error(url: &ShardUrl, cause: String) -> Outcome {
    let url = url.redacted();
    let lower = cause.to_lowercase();
    let error = if lower.contains("credential") || lower.contains("identity") {
        // The chain says these of each of its places.
        let cause = cause
            .replace("the credential provider was not enabled: ", "")
            .replace("an error occurred while loading credentials: ", "");
        SourceError::Credentials { url, cause }
    } else if lower.contains("endpoint") {
        let cause = format!("{cause}; check [s3] endpoint_url and [s3] region");
        SourceError::Refused { url, cause }
    } else {
        let cause = format!("the request can't be sent: {cause}");
        SourceError::Refused { url, cause }
    };
    ("client_error", RequestFailure::Fatal(error))
}
