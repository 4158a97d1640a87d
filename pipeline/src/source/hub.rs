//! Listings of repositories on the Hugging Face Hub.

use reqwest::header::{HeaderMap, LINK};
use reqwest::{Method, Response};
use serde::Deserialize;
use tokio::time::timeout;

use super::Sources;
use super::http::refusal;
use crate::bounded::{BoundedBytes, MAX_RESPONSE_BYTES};
use crate::net::{RequestFailure, RetryBudget, SourceError, causes};
use crate::s3::Paging;
use crate::shard::{HubFile, ShardUrl};

/// An entry of a listing.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    /// Path in the repository.
    path: String,
}

impl Sources {
    /// The Hub's address.
    pub(super) fn hub_endpoint(&self, url: &ShardUrl) -> Result<&str, SourceError> {
        match &self.0.hub.endpoint {
            Ok(endpoint) => Ok(endpoint),
            Err(cause) => Err(SourceError::Unsupported {
                url: url.to_string(),
                cause: cause.clone(),
            }),
        }
    }

    /// The files in a folder of a repository and below it.
    pub(super) async fn list_hub(
        &self,
        url: &ShardUrl,
        folder: &HubFile,
    ) -> Result<Vec<ShardUrl>, SourceError> {
        let paths = self.hub_files(url, folder, true).await?;
        let files = paths.into_iter().map(|path| {
            ShardUrl::hub(HubFile {
                path,
                ..folder.clone()
            })
        });
        Ok(files.collect())
    }

    /// The paths of the files in a folder of a repository.
    pub(super) async fn hub_files(
        &self,
        url: &ShardUrl,
        folder: &HubFile,
        recursive: bool,
    ) -> Result<Vec<String>, SourceError> {
        let client = self.http().await?;
        let options = self.retry_options();
        let wrong = |cause| SourceError::Listing {
            url: url.to_string(),
            cause,
            hint: "name the shards instead of their folder, as hf://datasets/OWNER/NAME/{000..099}.tar",
        };
        let mut budget = RetryBudget::new(url.to_string(), options, self.0.http_servers.clone());
        let mut address = folder.tree(self.hub_endpoint(url)?, recursive);
        let mut found = Vec::new();
        let mut paging = Paging::default();
        loop {
            let request = async {
                let response = client
                    .send(url, Method::GET, &address, &HeaderMap::new())
                    .await?;
                if !response.status().is_success() {
                    return Err(refusal(url, response, 0).await);
                }
                let next = next_page(&response);
                let body = read_page(url, response).await?;
                let entries: Vec<Entry> = serde_json::from_slice(&body).map_err(|error| {
                    RequestFailure::Fatal(SourceError::Refused {
                        url: url.to_string(),
                        cause: format!("the Hub's listing can't be read: {error}"),
                    })
                })?;
                Ok((entries, next))
            };
            let failure = match timeout(options.stall_timeout, request).await {
                Ok(Ok((entries, next))) => {
                    budget.record_response();
                    let count = entries.len();
                    for entry in entries {
                        paging.count(&entry.path).map_err(wrong)?;
                        if entry.kind == "file" {
                            found.push(entry.path);
                        }
                    }
                    let Some(next) = next.filter(|next| *next != address) else {
                        return Ok(found);
                    };
                    paging.advance(next.clone(), count, count).map_err(wrong)?;
                    address = next;
                    continue;
                }
                Ok(Err(failure)) => failure,
                Err(_) => RequestFailure::Passing {
                    reason: "stalled",
                    cause: format!("no answer for {:.1} s", options.stall_timeout.as_secs_f64()),
                },
            };
            budget.backoff(failure, 0).await?;
        }
    }
}

/// The body of a page.
async fn read_page(url: &ShardUrl, mut response: Response) -> Result<Vec<u8>, RequestFailure> {
    let too_long = |error| {
        RequestFailure::Fatal(SourceError::TooLong {
            url: url.to_string(),
            what: "a page of the Hub's listing",
            error,
        })
    };
    let mut body =
        BoundedBytes::new(MAX_RESPONSE_BYTES, response.content_length()).map_err(too_long)?;
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) => body.push(&chunk).map_err(too_long)?,
            Ok(None) => return Ok(body.into_vec()),
            Err(error) => {
                return Err(RequestFailure::Passing {
                    reason: "body",
                    cause: causes(&error.without_url()),
                });
            }
        }
    }
}

/// The address of the next page, from `Link: <…>; rel="next"`.
fn next_page(response: &Response) -> Option<String> {
    let links = response.headers().get(LINK)?.to_str().ok()?;
    let next = links
        .split(',')
        .find(|link| link.contains("rel=\"next\""))?;
    let (target, _) = next.trim().strip_prefix('<')?.split_once('>')?;
    response.url().join(target).ok().map(String::from)
}
