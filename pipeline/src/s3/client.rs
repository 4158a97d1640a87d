//! The client: its connection, and the outcome of a request.

use std::sync::{Arc, Mutex, PoisonError};

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::types::RequestPayer;

use super::S3Options;
use super::connect::{Chain, Connection};
use super::error::meaning;
use super::operation::Operation;
use super::refusal::EXPIRED;
use crate::net::{CaBundle, RequestFailure, ServerRecord};
use crate::shard::ShardUrl;

/// The connection, and the options it was made from.
#[derive(Debug)]
pub(crate) struct S3 {
    pub(super) chain: Chain,
    /// The server's address, for messages and to tell the objects of one server from another's.
    endpoint: String,
    connection: Mutex<Arc<Connection>>,
    pub(super) renewing: tokio::sync::Mutex<()>,
    pub(super) server: ServerRecord,
}

impl S3 {
    /// Finds region and credentials and makes the client; `embedded` is the address of the embedded
    /// server.
    pub(crate) async fn connect(
        options: &S3Options,
        embedded: Option<&str>,
        ca_bundle: Option<CaBundle>,
        server: ServerRecord,
    ) -> Self {
        let chain = Chain::new(options, embedded, ca_bundle);
        let connection = chain.connect().await;
        Self {
            endpoint: connection.endpoint.clone(),
            connection: Mutex::new(Arc::new(connection)),
            renewing: tokio::sync::Mutex::new(()),
            server,
            chain,
        }
    }

    pub(super) fn connection(&self) -> Arc<Connection> {
        let connection = self.connection.lock();
        Arc::clone(&connection.unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn replace_connection(&self, fresh: Connection) {
        let connection = self.connection.lock();
        *connection.unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
    }

    /// The record of the server, shared by all its readers and writers.
    pub(crate) fn server(&self) -> &ServerRecord {
        &self.server
    }

    /// The server's address, for messages and to tell the objects of one server from another's.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(super) fn payer(&self) -> Option<RequestPayer> {
        self.chain
            .options
            .requester_pays
            .then_some(RequestPayer::Requester)
    }

    /// Counts a failed request and says what its error means; looks for newer credentials if they have
    /// expired.
    pub(super) async fn failure<E>(
        &self,
        url: &ShardUrl,
        used: &Arc<Connection>,
        error: &SdkError<E, HttpResponse>,
        operation: Operation,
    ) -> RequestFailure
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let (outcome, failure) = meaning(url, used, error, operation);
        self.server.record_request(outcome);
        match outcome {
            EXPIRED => self.renew(url, used, failure).await,
            _ => failure,
        }
    }
}
