//! One tar being written: deterministic headers, hashed on its way to the disk.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::LatentError;
use super::aside::Aside;

/// Counts and hashes what passes.
#[derive(Debug)]
struct Hashing<W> {
    inner: W,
    sha: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.sha.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A shard that is not yet under its name; dropping it leaves nothing.
pub(super) struct ShardFile {
    tar: tar::Builder<Hashing<BufWriter<Aside>>>,
    target: PathBuf,
    samples: u64,
}

/// What was written.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

impl ShardFile {
    /// Begins the shard that will be `target`.
    pub(super) fn create(target: &Path) -> Result<Self, LatentError> {
        let mut tar = tar::Builder::new(Hashing {
            inner: BufWriter::with_capacity(1 << 18, Aside::create(target)?),
            sha: Sha256::new(),
            bytes: 0,
        });
        // Keys are the input's, whatever they look like.
        tar.preserve_absolute(true);
        Ok(Self {
            tar,
            target: target.to_owned(),
            samples: 0,
        })
    }

    /// Appends a sample: extensions with their contents, in order.
    pub(super) fn append<'a>(
        &mut self,
        key: &str,
        members: impl IntoIterator<Item = (&'a str, &'a [u8])>,
    ) -> Result<(), LatentError> {
        for (extension, content) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(0);
            header.set_uid(0);
            header.set_gid(0);
            let name = format!("{key}.{extension}");
            self.tar
                .append_data(&mut header, &name, content)
                .map_err(|error| {
                    LatentError::io(&self.target)(io::Error::new(
                        error.kind(),
                        format!("{name}: {error}"),
                    ))
                })?;
        }
        self.samples += 1;
        Ok(())
    }

    /// Samples appended so far.
    pub(super) fn samples(&self) -> u64 {
        self.samples
    }

    /// Ends the tar and puts it under its name.
    pub(super) fn finish(self) -> Result<Written, LatentError> {
        let Self { tar, target, .. } = self;
        let hashing = tar.into_inner().map_err(LatentError::io(&target))?;
        let aside = hashing
            .inner
            .into_inner()
            .map_err(|error| LatentError::io(&target)(error.into_error()))?;
        aside.commit()?;
        Ok(Written {
            bytes: hashing.bytes,
            sha256: format!("{:x}", hashing.sha.finalize()),
        })
    }
}

impl std::fmt::Debug for ShardFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardFile")
            .field("target", &self.target)
            .field("samples", &self.samples)
            .finish_non_exhaustive()
    }
}
