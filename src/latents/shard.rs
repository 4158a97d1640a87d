//! One tar being written. Its headers depend only on its members.

use std::io;

use coffey_pipeline::destination::{Destination, ObjectWriter, Written};
use coffey_pipeline::format::latents::Member;
use coffey_pipeline::shard::member_header;

use super::LatentError;

/// An unfinished shard. Dropping it discards the shard.
pub(super) struct ShardFile {
    tar: tar::Builder<ObjectWriter>,
    place: Destination,
    name: String,
    samples: u64,
}

impl ShardFile {
    /// Creates the shard `name` in `place`.
    pub(super) fn create(place: &Destination, name: &str) -> Result<Self, LatentError> {
        let mut tar = tar::Builder::new(place.create(name)?);
        // Keys are kept as in the input, also absolute paths.
        tar.preserve_absolute(true);
        Ok(Self {
            tar,
            place: place.clone(),
            name: name.to_owned(),
            samples: 0,
        })
    }

    /// Appends a sample with its members.
    pub(super) fn append(&mut self, key: &str, members: &[Member]) -> Result<(), LatentError> {
        for (extension, content) in members {
            let mut header = member_header(content.len() as u64);
            let member = format!("{key}.{extension}");
            self.tar
                .append_data(&mut header, &member, content.as_slice())
                .map_err(|error| self.place.failed(&self.name, error))?;
        }
        self.samples += 1;
        Ok(())
    }

    /// Samples appended so far.
    pub(super) fn samples(&self) -> u64 {
        self.samples
    }

    /// Finishes the tar and publishes it under its name.
    pub(super) fn finish(self) -> Result<Written, LatentError> {
        let Self {
            tar, place, name, ..
        } = self;
        let failed = |error: io::Error| place.failed(&name, error);
        Ok(tar.into_inner().map_err(failed)?.finish()?)
    }
}

impl std::fmt::Debug for ShardFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardFile")
            .field("place", &self.place.place(&self.name))
            .field("samples", &self.samples)
            .finish_non_exhaustive()
    }
}
