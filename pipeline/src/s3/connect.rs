//! From the options and the AWS default chain to a client.

use std::sync::Arc;
use std::time::Duration;

use aws_config::{BehaviorVersion, Region};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    Credentials, ProvideCredentials, ResponseChecksumValidation, SharedCredentialsProvider,
    StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls;

use super::S3Options;
use super::credentials::{LastCredentials, StoringProvider};
use crate::net::CaBundle;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const DEFAULT_REGION: &str = "us-east-1";

/// The sources of region, credentials and endpoint.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) options: S3Options,
    embedded: Option<String>,
    ca_bundle: Option<CaBundle>,
    /// The server's address, for messages.
    pub(super) endpoint: String,
}

/// A client and the provider of its credentials.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) client: Client,
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

impl Chain {
    pub(super) fn new(
        options: &S3Options,
        embedded: Option<&str>,
        ca_bundle: Option<CaBundle>,
    ) -> Self {
        let endpoint = embedded.map(str::to_owned);
        Self {
            options: options.clone(),
            embedded: endpoint.clone(),
            ca_bundle,
            endpoint: endpoint
                .or_else(|| options.endpoint_url.clone())
                .or_else(|| variable(["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]))
                .unwrap_or_else(|| "AWS S3".to_owned()),
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
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        if shared.region().is_none() {
            config = config.region(Region::new(DEFAULT_REGION));
        }
        let last = LastCredentials::default();
        let signing = shared.credentials_provider().map(|provider| {
            SharedCredentialsProvider::new(StoringProvider {
                provider,
                last: Arc::clone(&last),
            })
        });
        config.set_credentials_provider(signing.clone());
        Connection {
            client: Client::from_conf(config.build()),
            signing,
            last,
        }
    }
}
