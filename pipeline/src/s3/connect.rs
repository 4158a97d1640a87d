//! From the options and the AWS default chain to a client.

use std::sync::Arc;
use std::time::Duration;

use aws_config::{BehaviorVersion, Region};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    Credentials, ProvideCredentials, RequestChecksumCalculation, ResponseChecksumValidation,
    SharedCredentialsProvider, StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls;
use aws_types::SdkConfig;
use aws_types::service_config::ServiceConfigKey;

use super::S3Options;
use super::body::LimitBodies;
use super::credentials::{LastCredentials, StoringProvider};
use crate::net::CaBundle;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const DEFAULT_REGION: &str = "us-east-1";
/// The server's address in messages where none is configured.
const AWS: &str = "AWS S3";

/// The sources of region, credentials and endpoint.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) options: S3Options,
    embedded: Option<String>,
    ca_bundle: Option<CaBundle>,
}

/// A client and the provider of its credentials.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) client: Client,
    /// The server's address, for messages.
    pub(super) endpoint: String,
    /// Whether writes have a checksum besides their signature.
    pub(super) sends_checksums: bool,
    signing: Option<SharedCredentialsProvider>,
    /// The credentials used last.
    pub(super) last: LastCredentials,
}

impl Connection {
    /// The credentials that the provider returns now.
    pub(super) async fn credentials(&self) -> Option<Credentials> {
        self.signing.as_ref()?.provide_credentials().await.ok()
    }
}

/// The first of these variables that is set and not empty.
fn variable(names: [&str; 2]) -> Option<String> {
    let value = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    names.into_iter().find_map(value)
}

/// A setting for S3 from the environment (the variable or the variable with `_S3`) or the profile.
fn setting(shared: &SdkConfig, variable: &str, profile: &str) -> Option<String> {
    let key = ServiceConfigKey::builder()
        .service_id("S3")
        .env(variable)
        .profile(profile)
        .build()
        .ok()?;
    shared.service_config()?.load_config(key)
}

/// Whether writes are sent with a checksum, as the user sets it; unset, to AWS alone.
///
/// Many other servers refuse a header that they don't know. Their writes are still verified: the
/// signature covers the SHA-256 of the body. Buckets of AWS with an object lock ask for the checksum.
fn checksums(shared: &SdkConfig, endpoint: Option<&str>) -> RequestChecksumCalculation {
    let variable = "AWS_REQUEST_CHECKSUM_CALCULATION";
    let key = "request_checksum_calculation";
    if let Some(value) = setting(shared, variable, key) {
        match value.parse() {
            Ok(checksums) => return checksums,
            Err(_) => tracing::warn!(
                "{variable} (or {key} of the AWS profile) is {value:?} and has no effect: it must be when_supported or when_required"
            ),
        }
    }
    if endpoint.is_none_or(is_aws) {
        RequestChecksumCalculation::WhenSupported
    } else {
        RequestChecksumCalculation::WhenRequired
    }
}

/// Whether the server at this address is Amazon's own.
fn is_aws(endpoint: &str) -> bool {
    let host = endpoint
        .split_once("://")
        .map_or(endpoint, |(_, rest)| rest);
    let host = host.split(['/', ':', '?']).next().unwrap_or(host);
    [".amazonaws.com", ".amazonaws.com.cn", ".api.aws"]
        .iter()
        .any(|domain| host.ends_with(domain))
}

impl Chain {
    pub(super) fn new(
        options: &S3Options,
        embedded: Option<&str>,
        ca_bundle: Option<CaBundle>,
    ) -> Self {
        Self {
            options: options.clone(),
            embedded: embedded.map(str::to_owned),
            ca_bundle,
        }
    }

    /// Makes a connection from the start of the chain; files are read again.
    pub(super) async fn connect(&self) -> Connection {
        let (options, embedded) = (&self.options, self.embedded.as_deref());
        let mut http = aws_smithy_http_client::Builder::new().tls_provider(tls::Provider::Rustls(
            tls::rustls_provider::CryptoMode::Ring,
        ));
        if let Some(context) = self.ca_bundle.as_ref().and_then(CaBundle::context) {
            http = http.tls_context(context);
        }
        let mut loader =
            aws_config::defaults(BehaviorVersion::latest()).http_client(http.build_https());
        let endpoint = embedded.or(options.endpoint_url.as_deref());
        if let Some(endpoint) = endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        let environment = || variable(["AWS_REGION", "AWS_DEFAULT_REGION"]);
        let region = match (&options.region, embedded) {
            (Some(region), _) => Some(region.clone()),
            (None, Some(_)) => Some(DEFAULT_REGION.to_owned()),
            // Other servers than AWS need no region, and asking EC2 for a region would take seconds.
            (None, None) if endpoint.is_some() || options.anonymous => {
                Some(environment().unwrap_or_else(|| DEFAULT_REGION.to_owned()))
            }
            (None, None) => None,
        };
        if let Some(region) = region {
            loader = loader.region(Region::new(region));
        }
        if embedded.is_some() {
            loader = loader.credentials_provider(Credentials::new(
                "embedded", "embedded", None, None, "embedded",
            ));
        } else if options.anonymous {
            loader = loader.no_credentials();
        }
        let shared = loader.load().await;
        let endpoint = endpoint.map(str::to_owned).or_else(|| {
            setting(&shared, "AWS_ENDPOINT_URL", "endpoint_url")
                .or_else(|| shared.endpoint_url().map(str::to_owned))
        });
        let checksums = checksums(&shared, endpoint.as_deref());
        let mut config = aws_sdk_s3::config::Builder::from(&shared)
            .force_path_style(options.path_style || embedded.is_some())
            // Both are done here, over whole objects: the SDK's retries don't cover bodies, and its stall
            // protection takes a slow consumer for a slow server.
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .build(),
            )
            .interceptor(LimitBodies)
            .request_checksum_calculation(checksums)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        let region = shared
            .region()
            .map_or(DEFAULT_REGION, |region| region.as_ref());
        if shared.region().is_none() {
            config = config.region(Region::new(DEFAULT_REGION));
        }
        let last = LastCredentials::default();
        let signing = shared.credentials_provider().map(|provider| {
            SharedCredentialsProvider::new(StoringProvider {
                provider,
                last: Arc::clone(&last),
                region: region.to_owned(),
            })
        });
        config.set_credentials_provider(signing.clone());
        Connection {
            client: Client::from_conf(config.build()),
            endpoint: endpoint.unwrap_or_else(|| AWS.to_owned()),
            sends_checksums: checksums == RequestChecksumCalculation::WhenSupported,
            signing,
            last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_aws;

    #[test]
    fn amazons_servers_are_known() {
        for endpoint in [
            "https://s3.eu-west-1.amazonaws.com",
            "https://bucket.vpce-1a2b.s3.us-east-1.vpce.amazonaws.com/",
            "https://s3.cn-north-1.amazonaws.com.cn:443",
        ] {
            assert!(is_aws(endpoint), "{endpoint}");
        }
        for endpoint in [
            "http://127.0.0.1:9000",
            "https://s3.amazonaws.com.example.org",
            "https://minio/s3.amazonaws.com",
        ] {
            assert!(!is_aws(endpoint), "{endpoint}");
        }
    }
}
