//! A folder of images, with their captions beside them or in a metadata file, read as shards.
//!
//! Owns the listing of the folder, its division into shards, and the tar that stands for such a shard. The order of the
//! samples depends only on the names of the files.

mod metadata;
mod names;
mod passed_over;
mod tar;
mod walk;

pub use names::MemberKeys;

pub(crate) use names::file_of;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use crate::net::SourceError;
use crate::shard::ImageShard;

use metadata::{Metadata, Row};
use names::{MemberKind, decoded, path_of};
use passed_over::PassedOver;

/// Shards of a folder, unless they would be too small or too large: enough for as many ranks.
const SHARDS: usize = 64;
const LEAST_SAMPLES: usize = 8;
const MOST_SAMPLES: usize = 1000;
/// Size of a tar's blocks.
const BLOCK: u64 = 512;
/// Ends the path of a file in [`ImageFolder::names`]; no path contains it.
const END: u8 = 0;

/// The listing of a folder: its samples in the order of their keys.
#[derive(Debug)]
pub(crate) struct ImageFolder {
    root: PathBuf,
    keys: MemberKeys,
    /// Paths in the folder of all members, each with [`END`], by sample.
    names: Vec<u8>,
    /// Where the names of each sample start, and the end of the last.
    starts: Vec<usize>,
    metadata: Vec<Metadata>,
    /// The row of each sample in the metadata; empty if no file has any.
    rows: Vec<Option<Row>>,
    passed_over: PassedOver,
    /// Files that could not be opened when their turn came, after the number of their sample.
    unread: Mutex<BTreeMap<(usize, PathBuf), Unread>>,
}

/// Why a file could not be opened.
#[derive(Debug, Clone)]
pub(crate) struct Unread {
    /// Whether it is no longer there.
    pub(crate) is_gone: bool,
    /// The system's error.
    pub(crate) cause: String,
}

/// A file of a sample.
pub(super) struct Member<'a> {
    /// Path in the folder.
    path: &'a [u8],
    key: &'a [u8],
    extension: String,
    kind: MemberKind,
}

impl ImageFolder {
    /// Lists the images in `root` and below it. Reads names and metadata files, and no image.
    ///
    /// # Errors
    /// [`SourceError`] if a folder or a metadata file can't be read.
    pub(crate) fn list(root: &Path, keys: &MemberKeys) -> Result<Self, SourceError> {
        let walk::Found {
            mut files,
            metadata,
            mut passed_over,
        } = walk::walk(root, keys)?;
        files.sort_unstable_by(|a, b| (a.key(), &a.path).cmp(&(b.key(), &b.path)));
        let (mut names, mut starts) = (Vec::new(), Vec::new());
        for sample in files.chunk_by(|a, b| a.key() == b.key()) {
            let images = sample.iter().filter(|file| file.kind == MemberKind::Image);
            let read = images
                .clone()
                .min_by_key(|file| keys.rank(file.extension()));
            if let Some(read) = read {
                for other in images.filter(|file| file.path != read.path) {
                    passed_over.images.add(|| path_of(root, &other.path));
                }
                starts.push(names.len());
                for file in sample {
                    names.extend_from_slice(&file.path);
                    names.push(END);
                }
            } else if let Some(caption) =
                sample.iter().find(|file| file.kind == MemberKind::Caption)
            {
                passed_over.captions.add(|| path_of(root, &caption.path));
            } else if let Some(other) = sample.first() {
                passed_over.others.add(|| path_of(root, &other.path));
            }
        }
        starts.push(names.len());
        let mut folder = Self {
            root: root.to_owned(),
            keys: keys.clone(),
            names,
            starts,
            metadata: Vec::new(),
            rows: Vec::new(),
            passed_over,
            unread: Mutex::default(),
        };
        folder.read_metadata(&metadata)?;
        Ok(folder)
    }

    /// Number of samples.
    pub(crate) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// A shard in the folder or below it, if one was seen.
    pub(crate) fn shard_below(&self) -> Option<&Path> {
        self.passed_over.shard.as_deref()
    }

    /// The files of a folder without images, for messages.
    pub(crate) fn contents(&self) -> String {
        self.passed_over.contents()
    }

    /// The files of `samples` that could not be opened when a tar of them was made.
    pub(crate) fn unread(&self, samples: Range<usize>) -> Vec<(PathBuf, Unread)> {
        let unread = self.unread.lock();
        let unread = unread.unwrap_or_else(PoisonError::into_inner);
        let first = |sample| (sample, PathBuf::new());
        unread
            .range(first(samples.start)..first(samples.end))
            .map(|((_, path), why)| (path.clone(), why.clone()))
            .collect()
    }

    /// The path in the folder of a member of the sample with the encoded `key`; `None` for a member of no file.
    pub(crate) fn path_in(&self, key: &str, extension: &str) -> Option<String> {
        let key = decoded(key);
        let key_of = |sample: usize| self.members(sample).next().map(|member| member.key);
        let (mut start, mut end) = (0, self.len());
        while start < end {
            let middle = usize::midpoint(start, end);
            match key_of(middle) < Some(key.as_slice()) {
                true => start = middle + 1,
                false => end = middle,
            }
        }
        if start == self.len() || key_of(start) != Some(key.as_slice()) {
            return None;
        }
        let mut members = self.members(start);
        let member = members.find(|member| member.extension == extension)?;
        Some(String::from_utf8_lossy(member.path).into_owned())
    }

    /// Descriptions of the files that are not read.
    pub(crate) fn warnings(&self) -> Vec<String> {
        self.passed_over.describe(&self.keys)
    }

    /// Samples in each of the folder's shards.
    pub(crate) fn shard_size(&self) -> usize {
        let size = self.len().div_ceil(SHARDS);
        size.clamp(LEAST_SAMPLES, MOST_SAMPLES)
    }

    /// The shards, with `samples` samples each.
    pub(crate) fn shards(&self, samples: usize) -> impl Iterator<Item = ImageShard> {
        let count = self.len().div_ceil(samples);
        (0..count).map(move |index| self.shard(index, samples))
    }

    fn shard(&self, index: usize, samples: usize) -> ImageShard {
        ImageShard {
            folder: self.root.clone(),
            index,
            samples,
            digest: self.digest(self.range(index, samples)),
        }
    }

    fn range(&self, index: usize, samples: usize) -> Range<usize> {
        let start = index.saturating_mul(samples).min(self.len());
        start..start.saturating_add(samples).min(self.len())
    }

    /// The samples of a shard.
    ///
    /// # Errors
    /// [`SourceError::File`] if the shard is of another listing.
    pub(crate) fn samples_of(&self, shard: &ImageShard) -> Result<Range<usize>, SourceError> {
        if self.shard(shard.index, shard.samples) == *shard {
            return Ok(self.range(shard.index, shard.samples));
        }
        Err(SourceError::File {
            url: shard.to_string(),
            cause: "files were added to the folder, removed or renamed since it was listed"
                .to_owned(),
        })
    }

    /// The first digits of the hash of the samples' names.
    fn digest(&self, samples: Range<usize>) -> String {
        hex(&Sha256::digest(self.names_of(samples))[..4])
    }

    /// A hash of the names, sizes and times of the samples' files.
    pub(crate) fn state(&self, samples: Range<usize>) -> String {
        let mut hash = Sha256::new();
        let members = samples.clone().flat_map(|sample| self.members(sample));
        let tables = self.metadata.iter().map(|table| table.path.clone());
        let paths = members.map(|member| path_of(&self.root, member.path));
        hash.update(self.names_of(samples));
        for path in paths.chain(tables) {
            let state = fs::metadata(path).ok().map(|metadata| {
                let modified = metadata.modified().ok();
                let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
                (metadata.len(), since)
            });
            hash.update(format!("{state:?}\n"));
        }
        hex(&hash.finalize())
    }

    /// The size of the tar of `samples`, without rows of metadata and names that are longer than a header.
    pub(crate) fn tar_bytes(&self, samples: Range<usize>) -> u64 {
        let members = samples.flat_map(|sample| self.members(sample));
        let sizes = members.map(|member| {
            let metadata = fs::metadata(path_of(&self.root, member.path));
            BLOCK + metadata.map_or(0, |metadata| metadata.len().next_multiple_of(BLOCK))
        });
        sizes.sum::<u64>() + 2 * BLOCK
    }

    fn names_of(&self, samples: Range<usize>) -> &[u8] {
        &self.names[self.starts[samples.start]..self.starts[samples.end]]
    }

    /// The files of a sample, in the order of their names.
    fn members(&self, sample: usize) -> impl Iterator<Item = Member<'_>> {
        let paths = self.names_of(sample..sample + 1).split(|&byte| byte == END);
        paths.filter_map(|path| {
            let (key_bytes, kind) = self.keys.split(path)?;
            let (key, extension) = path.split_at(key_bytes);
            Some(Member {
                path,
                key,
                extension: String::from_utf8_lossy(&extension[1..]).to_lowercase(),
                kind,
            })
        })
    }

    /// Reads the rows of metadata files.
    fn read_metadata(&mut self, paths: &[PathBuf]) -> Result<(), SourceError> {
        if paths.is_empty() {
            return Ok(());
        }
        let mut samples = HashMap::new();
        for sample in 0..self.len() {
            let images = self.members(sample);
            let images = images.filter(|member| member.kind == MemberKind::Image);
            samples.extend(images.map(|image| (image.path.to_owned(), sample)));
        }
        self.rows = vec![None; self.len()];
        for (table, path) in paths.iter().enumerate() {
            let inside = path.strip_prefix(&self.root).unwrap_or(path).parent();
            let inside = inside.unwrap_or(Path::new(""));
            let metadata = Metadata::read(path, |line, file_name, range| {
                let named = names::bytes_of(&inside.join(&file_name));
                let Some(&sample) = samples.get(&named) else {
                    let place = || format!("{:?} in {} line {line}", file_name, path.display());
                    self.passed_over.rows.add(place);
                    return Ok(());
                };
                match self.rows[sample].replace(Row { table, range }) {
                    None => Ok(()),
                    Some(_) => Err(format!("names {file_name:?}, as another row does")),
                }
            })?;
            self.metadata.push(metadata);
        }
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
