//! A part of a folder of images as a shard.

use std::fmt;
use std::path::PathBuf;

/// Some samples of a folder of images, which are read as a shard.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ImageShard {
    pub(crate) folder: PathBuf,
    pub(crate) index: usize,
    /// Samples in each shard of the folder but the last.
    pub(crate) samples: usize,
    /// Start of the hash of the names of its files: a shard of other files is another shard.
    pub(crate) digest: String,
}

impl ImageShard {
    /// The name of the tar that it is read as.
    pub(super) fn name(&self) -> String {
        let folder = self.folder.file_name().map(|name| name.to_string_lossy());
        let folder = folder.as_deref().unwrap_or("images");
        format!("{folder}-{:05}-{}.tar", self.index, self.digest)
    }
}

impl fmt::Display for ImageShard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Joining an empty component adds a slash.
        let folder = self.folder.join("");
        write!(f, "{}#{:05}-{}", folder.display(), self.index, self.digest)
    }
}
