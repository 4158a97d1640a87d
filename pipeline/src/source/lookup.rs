//! Looking shards up before a run: every shard that is not there is named at once.
//!
//! Shards of one prefix in S3, or of one folder on the Hub, are compared with its listing. A shard that no listing names
//! is requested by itself, so a listing that is refused or incomplete never makes a shard missing.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reqwest::header::{HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, StatusCode};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Sources;
use super::http::{HttpClient, refusal};
use super::local;
use crate::net::{RequestFailure, RetryBudget, RetryOptions, ServerRecord, SourceError};
use crate::s3::S3;
use crate::shard::{Location, ShardUrl};

/// Requests in flight at once.
const CONCURRENT: usize = 64;
/// Shards of a folder from which it is listed.
const LIST_FROM: usize = 16;
/// Keys that one sequence of pages looks for.
const KEYS_PER_LISTING: usize = 4000;
/// Attempts at a page of a listing; the shards are requested one by one after that.
const LISTING_ATTEMPTS: u32 = 4;
/// Files whose metadata one thread reads in a row.
const FILES_PER_TASK: usize = 256;
/// Shards after which the look-up ends if none of them is there.
const HOPELESS: usize = 1000;
/// Missing shards that a message names.
const NAMED: usize = 20;

/// The outcome of a look-up in which no shard was missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LookUp {
    /// Shards that were looked up, each once.
    pub shards: usize,
    /// Shards whose servers did not say whether they are there.
    pub unknown: usize,
}

/// The knowledge of a shard.
#[derive(Debug)]
enum Answer {
    Readable,
    /// The server answers neither HEAD nor a request for one byte.
    Unknown,
    Missing(SourceError),
}

impl Sources {
    /// Looks up whether `shards` can be read; standard input is left out. Repeated shards are looked up once.
    ///
    /// # Errors
    /// [`SourceError::Missing`] with the first shards that can't be read and their number, or the error itself if there is
    /// one shard; else the error of a server that can't be used at all.
    pub async fn look_up<'a>(
        &self,
        shards: impl IntoIterator<Item = &'a ShardUrl>,
    ) -> Result<LookUp, SourceError> {
        let mut seen = BTreeSet::new();
        let urls: Vec<&ShardUrl> = shards
            .into_iter()
            .filter(|url| *url.location() != Location::Stdin && seen.insert(*url))
            .collect();
        let listed = self.find_in_listings(&urls).await?;
        let rest: Vec<&ShardUrl> = urls
            .iter()
            .enumerate()
            .filter(|(index, _)| !listed.contains(index))
            .map(|(_, url)| *url)
            .collect();
        let (mut unknown, mut missing) = (0, Vec::new());
        let (first, others) = rest.split_at(rest.len().min(HOPELESS));
        for (wave, part) in [first, others].into_iter().enumerate() {
            if wave > 0 && missing.len() == HOPELESS {
                return Err(summary(&missing, urls.len(), !others.is_empty()));
            }
            for answer in self.probe_all(part).await? {
                match answer {
                    Answer::Readable => {}
                    Answer::Unknown => unknown += 1,
                    Answer::Missing(error) => missing.push(error),
                }
            }
        }
        if missing.is_empty() {
            return Ok(LookUp {
                shards: urls.len(),
                unknown,
            });
        }
        Err(summary(&missing, urls.len(), false))
    }

    /// Indices of the shards that the listings of their folders name.
    async fn find_in_listings(&self, urls: &[&ShardUrl]) -> Result<BTreeSet<usize>, SourceError> {
        let mut folders: BTreeMap<ShardUrl, Vec<(&str, usize)>> = BTreeMap::new();
        for (index, url) in urls.iter().enumerate() {
            let name = match url.location() {
                Location::S3 { key, .. } => key.as_str(),
                Location::Hub(file) => file.path.as_str(),
                Location::Http(_) | Location::File(_) | Location::Images(_) | Location::Stdin => {
                    continue;
                }
            };
            if let Some(folder) = url.folder() {
                folders.entry(folder).or_default().push((name, index));
            }
        }
        folders.retain(|_, names| names.len() >= LIST_FROM);
        let mut listings = Vec::new();
        for (folder, mut names) in folders {
            names.sort_unstable();
            let mut after = None;
            let keys = match folder.location() {
                Location::S3 { .. } => KEYS_PER_LISTING,
                _ => names.len(),
            };
            for part in names.chunks(keys) {
                listings.push(Listing {
                    folder: folder.clone(),
                    names: part
                        .iter()
                        .map(|(name, index)| ((*name).to_owned(), *index))
                        .collect(),
                    after,
                });
                after = part.last().map(|(name, _)| (*name).to_owned());
            }
        }
        let found = each(listings, |listing| {
            let sources = self.clone();
            async move { sources.read_listing(&listing).await }
        });
        Ok(found.await?.into_iter().flatten().collect())
    }

    /// Indices of the names of a listing that are there. A refused listing names nothing.
    async fn read_listing(&self, listing: &Listing) -> Result<Vec<usize>, SourceError> {
        let found = match listing.folder.location() {
            Location::S3 { bucket, .. } => {
                let s3 = self.s3().await?;
                let options = RetryOptions {
                    max_attempts: self.retry_options().max_attempts.min(LISTING_ATTEMPTS),
                    ..self.retry_options()
                };
                listing.in_bucket(&s3, bucket, options).await
            }
            Location::Hub(folder) => self
                .hub_files(&listing.folder, folder, false)
                .await
                .map(|paths| listing.indices(&paths)),
            Location::Http(_) | Location::File(_) | Location::Images(_) | Location::Stdin => {
                Ok(Vec::new())
            }
        };
        match found {
            // Some servers answer a listing alone with 500 or 501.
            Err(SourceError::Exhausted { .. }) => Ok(Vec::new()),
            Err(error) if concerns_server(&error) => Err(error),
            found => Ok(found.unwrap_or_default()),
        }
    }

    /// The answer for each shard, in order.
    async fn probe_all(&self, urls: &[&ShardUrl]) -> Result<Vec<Answer>, SourceError> {
        let mut tasks = Vec::new();
        let mut files = Vec::new();
        for url in urls {
            match url.location() {
                Location::File(path) => {
                    files.push(((*url).clone(), path.clone()));
                    if files.len() == FILES_PER_TASK {
                        tasks.push(Probe::Files(std::mem::take(&mut files)));
                    }
                }
                _ => {
                    tasks.push(Probe::Files(std::mem::take(&mut files)));
                    tasks.push(Probe::Remote((*url).clone()));
                }
            }
        }
        tasks.push(Probe::Files(files));
        tasks.retain(|task| !matches!(task, Probe::Files(files) if files.is_empty()));
        let heads = Arc::new(AtomicBool::new(true));
        let answers = each(tasks, |task| {
            let (sources, heads) = (self.clone(), Arc::clone(&heads));
            async move {
                match task {
                    Probe::Files(files) => Ok(look_at(files).await),
                    Probe::Remote(url) => {
                        let answer = sources.probe(&url, &heads).await;
                        let answer = match answer {
                            Err(error) if concerns_server(&error) => return Err(error),
                            Err(error) => Answer::Missing(error),
                            Ok(answer) => answer,
                        };
                        Ok(vec![answer])
                    }
                }
            }
        });
        Ok(answers.await?.into_iter().flatten().collect())
    }

    async fn probe(&self, url: &ShardUrl, heads: &AtomicBool) -> Result<Answer, SourceError> {
        let options = self.retry_options();
        match url.location() {
            Location::S3 { bucket, key } => {
                let s3 = self.s3().await?;
                let request = || s3.probe(url, bucket, key);
                retry(url, options, s3.server(), request).await?;
                Ok(Answer::Readable)
            }
            Location::Http(address) => self.probe_http(url, address.expose(), heads).await,
            Location::Hub(file) => {
                let address = file.resolve(self.hub_endpoint(url)?);
                self.probe_http(url, &address, heads).await
            }
            // The images are of a listing.
            Location::File(_) | Location::Images(_) | Location::Stdin => Ok(Answer::Readable),
        }
    }

    /// Sends HEAD, and where its answer is no success, GET for one byte. `heads` says whether HEAD is of use.
    async fn probe_http(
        &self,
        url: &ShardUrl,
        address: &str,
        heads: &AtomicBool,
    ) -> Result<Answer, SourceError> {
        let client = &self.http().await?;
        let (options, server) = (self.retry_options(), &self.0.http_servers);
        let mut head = None;
        if heads.load(Ordering::Relaxed) {
            let fields = HeaderMap::new();
            let request = client.send(url, Method::HEAD, address, &fields);
            if let Ok(Ok(response)) = timeout(options.stall_timeout, request).await {
                server.record_response();
                if response.status().is_success() {
                    return Ok(Answer::Readable);
                }
                head = Some(response.status());
            }
        }
        let request = || first_byte(client, url, address);
        let answer = retry(url, options, server, request).await;
        if answer.is_ok() && head.is_some_and(|status| status != StatusCode::NOT_FOUND) {
            heads.store(false, Ordering::Relaxed);
        }
        match answer {
            Err(SourceError::Refused { .. }) => Ok(Answer::Unknown),
            answer => answer.map(|()| Answer::Readable),
        }
    }
}

/// Requests the first byte of a shard. The rest of the body of a server that ignores ranges is not read.
async fn first_byte(
    client: &HttpClient,
    url: &ShardUrl,
    address: &str,
) -> Result<(), RequestFailure> {
    let mut fields = HeaderMap::new();
    fields.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
    let response = client.send(url, Method::GET, address, &fields).await?;
    // An empty shard has no first byte.
    if response.status().is_success() || response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
        return Ok(());
    }
    Err(refusal(url, response, 0).await)
}

/// Repeats a request while its failures pass.
async fn retry<F: Future<Output = Result<(), RequestFailure>>>(
    url: &ShardUrl,
    options: RetryOptions,
    server: &ServerRecord,
    request: impl Fn() -> F,
) -> Result<(), SourceError> {
    let mut budget = RetryBudget::new(url.to_string(), options, server.clone());
    loop {
        let failure = match timeout(options.stall_timeout, request()).await {
            Ok(Ok(())) => {
                budget.record_response();
                return Ok(());
            }
            Ok(Err(failure)) => failure,
            Err(_) => stalled(options),
        };
        budget.backoff(failure, 0).await?;
    }
}

fn stalled(options: RetryOptions) -> RequestFailure {
    RequestFailure::Passing {
        reason: "stalled",
        cause: format!("no answer for {:.1} s", options.stall_timeout.as_secs_f64()),
    }
}

/// Shards whose look-up is one task.
enum Probe {
    Files(Vec<(ShardUrl, PathBuf)>),
    Remote(ShardUrl),
}

async fn look_at(files: Vec<(ShardUrl, PathBuf)>) -> Vec<Answer> {
    let look = move || {
        let answers = files
            .iter()
            .map(|(url, path)| match std::fs::metadata(path) {
                Ok(found) if found.is_dir() => {
                    let error = std::io::ErrorKind::IsADirectory.into();
                    Answer::Missing(local::failed(url, &error))
                }
                Ok(_) => Answer::Readable,
                Err(error) => Answer::Missing(local::failed(url, &error)),
            });
        answers.collect()
    };
    match tokio::task::spawn_blocking(look).await {
        Ok(answers) => answers,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Names that are looked for in the listing of their folder, sorted; `after` sorts before them.
struct Listing {
    folder: ShardUrl,
    names: Vec<(String, usize)>,
    after: Option<String>,
}

impl Listing {
    /// Indices of the names among `found`.
    fn indices(&self, found: &[String]) -> Vec<usize> {
        let position = |name: &String| {
            let at = self.names.binary_search_by(|(known, _)| known.cmp(name));
            at.ok().map(|at| self.names[at].1)
        };
        found.iter().filter_map(position).collect()
    }

    async fn in_bucket(
        &self,
        s3: &S3,
        bucket: &str,
        options: RetryOptions,
    ) -> Result<Vec<usize>, SourceError> {
        let mut found = Vec::new();
        let (Some((first, _)), Some((last, _))) = (self.names.first(), self.names.last()) else {
            return Ok(found);
        };
        let prefix = common_prefix(first, last);
        let mut token: Option<String> = None;
        // A prefix may hold many other objects: requests one by one are then faster.
        let most_pages = 4 + self.names.len() / 100;
        for _ in 0..most_pages {
            let mut budget =
                RetryBudget::new(self.folder.to_string(), options, s3.server().clone());
            let page = loop {
                let after = self.after.as_deref().filter(|_| token.is_none());
                let request = s3.list_page(&self.folder, (bucket, prefix), after, token.as_deref());
                let failure = match timeout(options.stall_timeout, request).await {
                    Ok(Ok(page)) => break page,
                    Ok(Err(failure)) => failure,
                    Err(_) => stalled(options),
                };
                budget.backoff(failure, 0).await?;
            };
            budget.record_response();
            found.extend(self.indices(&page.readable));
            let passed = page.last.as_ref().is_some_and(|key| key >= last);
            match page.next {
                Some(next) if !passed && token.as_ref() != Some(&next) => token = Some(next),
                _ => break,
            }
        }
        Ok(found)
    }
}

fn common_prefix<'a>(one: &'a str, other: &str) -> &'a str {
    let same = one.chars().zip(other.chars()).take_while(|(a, b)| a == b);
    &one[..same.map(|(a, _)| a.len_utf8()).sum()]
}

/// Whether an error is that of the server, or of the way to it, and not of one object.
fn concerns_server(error: &SourceError) -> bool {
    matches!(
        error,
        SourceError::Credentials { .. }
            | SourceError::Expired { .. }
            | SourceError::Certificate { .. }
            | SourceError::CaBundle { .. }
            | SourceError::Header { .. }
            | SourceError::WrongRegion { .. }
            | SourceError::Unreachable { .. }
            | SourceError::Exhausted { .. }
            | SourceError::Unsupported { .. }
    )
}

/// The error for shards that can't be read, of `all` shards; `ended` if the look-up did not go on.
fn summary(missing: &[SourceError], all: usize, ended: bool) -> SourceError {
    if let ([error], 1) = (missing, all) {
        return error.clone();
    }
    let found = if ended {
        format!("at least {} of {all} shards can't be read", missing.len())
    } else {
        format!("{} of {all} shards can't be read", missing.len())
    };
    let mut last_cause = None;
    let named = missing.iter().take(NAMED).map(|error| {
        let (url, what, cause) = match error {
            SourceError::NotFound { url, cause, .. } => (url, "not found", cause),
            SourceError::Forbidden { url, cause, .. } => (url, "access denied", cause),
            error => return error.to_string(),
        };
        // One server refuses its shards for one cause.
        if last_cause.replace((what, cause)) == Some((what, cause)) {
            format!("{url} {what}")
        } else {
            format!("{url} {what} ({cause})")
        }
    });
    let mut named = named.collect::<Vec<_>>().join(", ");
    if missing.len() > NAMED {
        named += &format!(" and {} more", missing.len() - NAMED);
    }
    let hint = match &missing[0] {
        SourceError::NotFound { hint, .. } => format!(
            "\n  check the names{hint}; leave out of data.shards what is not there, or name a folder or prefix that ends in '/' to take \
             every shard in it (data.check_shards = false begins without this look-up)"
        ),
        SourceError::Forbidden { hint, .. } => format!("\n  {hint}"),
        _ => String::new(),
    };
    SourceError::Missing { found, named, hint }
}

/// Does `work` on every item, with at most [`CONCURRENT`] at once. The results are in the order of the items.
///
/// # Errors
/// The error of the first item that has one.
async fn each<T, R, F>(items: Vec<T>, work: impl Fn(T) -> F) -> Result<Vec<R>, SourceError>
where
    R: Send + 'static,
    F: Future<Output = Result<R, SourceError>> + Send + 'static,
{
    let mut results = BTreeMap::new();
    let mut items = items.into_iter().enumerate();
    let mut tasks = JoinSet::new();
    let mut failed = false;
    loop {
        while !failed && tasks.len() < CONCURRENT {
            let Some((index, item)) = items.next() else {
                break;
            };
            let done = work(item);
            tasks.spawn(async move { (index, done.await) });
        }
        match tasks.join_next().await {
            Some(Ok((index, result))) => {
                failed |= result.is_err();
                results.insert(index, result);
            }
            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            None => return results.into_values().collect(),
        }
    }
}
