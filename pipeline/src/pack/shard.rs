//! A shard being written.

use std::io;

use super::PackError;
use super::place::{Stats, shard_name};
use super::sample::PackedSample;
use crate::destination::{Destination, ObjectWriter};
use crate::shard::{Sample, member_header};

/// An unfinished shard, which exists from its first sample on. Dropping it discards it.
pub(super) struct ShardWriter {
    place: Destination,
    index: usize,
    tar: Option<tar::Builder<ObjectWriter>>,
    pub(super) stats: Stats,
}

impl ShardWriter {
    pub(super) fn new(place: &Destination, index: usize) -> Self {
        Self {
            place: place.clone(),
            index,
            tar: None,
            stats: Stats::default(),
        }
    }

    /// Appends a sample, with its image at `file` in the folder, under the number of its place in the shard.
    pub(super) fn append(
        &mut self,
        sample: &Sample,
        packed: &PackedSample<'_>,
        file: &str,
    ) -> Result<(), PackError> {
        let key = format!("{:05}{:04}", self.index, self.stats.count);
        let json = packed.json(sample, &key, file);
        let mut members = [
            (packed.extension, packed.image.as_ref()),
            ("json", json.as_bytes()),
            ("txt", packed.caption.as_ref()),
        ];
        members.sort_unstable();
        let name = shard_name(self.index);
        let tar = match &mut self.tar {
            Some(tar) => tar,
            none => none.insert(tar::Builder::new(self.place.create(&name)?)),
        };
        for (extension, content) in members {
            let mut header = member_header(content.len() as u64);
            tar.append_data(&mut header, format!("{key}.{extension}"), content)
                .map_err(|error| self.place.failed(&name, error))?;
        }
        self.stats.succeed();
        Ok(())
    }

    /// Publishes the shard, made of `files`, unless it has no sample.
    pub(super) fn finish(self, files: String) -> Result<Stats, PackError> {
        let Self {
            place,
            index,
            tar,
            mut stats,
        } = self;
        let name = shard_name(index);
        stats.files = files;
        if let Some(tar) = tar {
            let failed = |error: io::Error| place.failed(&name, error);
            let written = tar.into_inner().map_err(failed)?.finish()?;
            (stats.bytes, stats.sha256) = (written.bytes, written.sha256);
        }
        Ok(stats)
    }
}
