//! From the options and the AWS default chain to a client.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_config::{BehaviorVersion, Region};
use aws_credential_types::provider::future;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    Credentials, ProvideCredentials, ResponseChecksumValidation, SharedCredentialsProvider,
    StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls;

use crate::source::S3Options;
use crate::source::tls::CaBundle;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const DEFAULT_REGION: &str = "us-east-1";

/// Where region, credentials and endpoint are looked for.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) options: S3Options,
    embedded: Option<String>,
    ca_bundle: Option<CaBundle>,
    /// Who is asked, for messages.
    pub(super) endpoint: String,
}

/// A client with what it signs with.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) client: Client,
    signing: Option<SharedCredentialsProvider>,
    /// The credentials it was given last.
    pub(super) given: Given,
}

type Given = Arc<Mutex<Option<Credentials>>>;

impl Connection {
    /// What the chain has to sign with now.
    pub(super) async fn credentials(&self) -> Option<Credentials> {
        self.signing.as_ref()?.provide_credentials().await.ok()
    }
}

/// A provider that remembers what it gave: asked again, some read a file or run a program anew.
#[derive(Debug)]
struct Remembering {
    provider: SharedCredentialsProvider,
    given: Given,
}

impl ProvideCredentials for Remembering {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async move {
            let credentials = self.provider.provide_credentials().await?;
            let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
            *given = Some(credentials.clone());
            Ok(credentials)
        })
    }
}

/// The first of these variables that is set to something.
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

    /// Goes through the chain from its beginning: files are read anew.
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
            // A server of one's own has no use for a region; asking EC2 for one would take seconds.
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
            // Both are done here, over whole objects: the SDK's retries end where a body begins, and
            // its stall protection takes a slow consumer for a slow server.
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
        let given = Given::default();
        let signing = shared.credentials_provider().map(|provider| {
            SharedCredentialsProvider::new(Remembering {
                provider,
                given: Arc::clone(&given),
            })
        });
        config.set_credentials_provider(signing.clone());
        Connection {
            client: Client::from_conf(config.build()),
            signing,
            given,
        }
    }
}
