//! From the configured patterns to shards: lists are read, braces expanded, folders listed.

use std::ops::Range;

use super::{ObjectReader, Sources};
use crate::net::SourceError;
use crate::shard::{ShardPattern, ShardUrl, UrlError, expand_one, split};

/// Largest list of shards; ten million URLs take less. Bytes.
const MOST_LIST_BYTES: usize = 1 << 30;

/// Shards in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShardList {
    /// The shards.
    pub shards: Vec<ShardUrl>,
    /// Indices of the shards that come from the listing of a folder or prefix.
    listed: Vec<Range<usize>>,
}

impl ShardList {
    /// The shards that no listing gave: they may be missing.
    pub fn unlisted(&self) -> impl Iterator<Item = &ShardUrl> {
        let starts = [0]
            .into_iter()
            .chain(self.listed.iter().map(|range| range.end));
        let ends = self.listed.iter().map(|range| range.start);
        let ends = ends.chain([self.shards.len()]);
        starts
            .zip(ends)
            .flat_map(|(start, end)| &self.shards[start..end])
    }
}

impl Sources {
    /// The shards of `patterns`, in order: braces are expanded, `@file` is replaced by the URLs and
    /// patterns in that file (one a line; empty lines and lines that begin with `#` are skipped), folders
    /// and prefixes by the shards in them.
    ///
    /// A list may be in any place that a shard may be in. Relative paths in it are relative to the
    /// current folder. A list can't name other lists.
    ///
    /// # Errors
    /// [`SourceError::Url`] and [`SourceError::List`] for a bad URL, else the error of reading a list or
    /// listing a folder.
    pub async fn shards(&self, patterns: &[ShardPattern]) -> Result<ShardList, SourceError> {
        let mut urls = Vec::new();
        for pattern in patterns.iter().flat_map(|pattern| split(pattern.expose())) {
            match pattern.trim().strip_prefix('@') {
                Some(lists) => {
                    for list in expand_one(lists)? {
                        urls.append(&mut self.in_list(&list).await?);
                    }
                }
                None => urls.append(&mut expand_one(pattern)?),
            }
        }
        if urls.is_empty() {
            return Err(UrlError::Empty.into());
        }
        self.list_folders(urls).await
    }

    /// Replaces each folder by the shards in it.
    pub(super) async fn list_folders(&self, urls: Vec<ShardUrl>) -> Result<ShardList, SourceError> {
        let mut list = ShardList::default();
        for url in urls {
            if url.is_folder() {
                let start = list.shards.len();
                list.shards.append(&mut self.list_folder(&url).await?);
                list.listed.push(start..list.shards.len());
            } else {
                list.shards.push(url);
            }
        }
        Ok(list)
    }

    async fn in_list(&self, list: &ShardUrl) -> Result<Vec<ShardUrl>, SourceError> {
        let unsupported = |cause: &str| SourceError::Unsupported {
            url: format!("@{list}"),
            cause: cause.to_owned(),
        };
        let mut reader = self.open(list).await?;
        let text = read_text(&mut reader).await?;
        let text = text.ok_or_else(|| {
            unsupported("is no list of shards: it must be text (UTF-8) with one URL a line")
        })?;
        let mut urls = Vec::new();
        for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            for pattern in split(line) {
                let expanded = expand_one(pattern).map_err(|error| SourceError::List {
                    list: list.to_string(),
                    line: index + 1,
                    error,
                })?;
                urls.extend(expanded);
            }
        }
        if urls.is_empty() {
            return Err(unsupported("names no shard"));
        }
        Ok(urls)
    }
}

async fn read_text(reader: &mut ObjectReader) -> Result<Option<String>, SourceError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.next().await? {
        bytes.extend_from_slice(&chunk);
        // A shard named by mistake shows at once.
        if bytes.len() > MOST_LIST_BYTES || chunk.contains(&0) {
            return Ok(None);
        }
    }
    Ok(String::from_utf8(bytes).ok())
}
