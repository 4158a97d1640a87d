//! Folders of images: their listings, and the reading of their shards.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, PoisonError};

use async_channel::{Receiver, Sender, bounded};
use bytes::{Bytes, BytesMut};

use super::Sources;
use crate::image_folder::ImageFolder;
use crate::net::SourceError;
use crate::plural::counted;
use crate::shard::{ImageShard, Location, ShardUrl};

const CHUNK_BYTES: usize = 256 << 10;
/// Chunks read ahead.
const CHUNKS: usize = 4;

impl Sources {
    /// The shards of a local folder of images, with `samples` samples each. Their tars are made when they are read.
    ///
    /// # Errors
    /// [`SourceError::EmptyFolder`] without an image, [`SourceError::Unsupported`] for any other URL, else the error of the
    /// listing.
    pub async fn image_shards(
        &self,
        folder: &ShardUrl,
        samples: usize,
    ) -> Result<Vec<ShardUrl>, SourceError> {
        match folder.location() {
            Location::File(path) => self.images_in(folder, path, Some(samples)).await,
            _ => Err(SourceError::Unsupported {
                url: folder.to_string(),
                cause: "is no local folder of images".to_owned(),
            }),
        }
    }

    /// The shards of a folder of images, by default of the size that suits the folder.
    pub(super) async fn images_in(
        &self,
        url: &ShardUrl,
        path: &Path,
        samples: Option<usize>,
    ) -> Result<Vec<ShardUrl>, SourceError> {
        let folder = self.image_folder(path).await?;
        if folder.len() == 0 {
            let images = &self.members().images;
            return Err(SourceError::EmptyFolder {
                url: url.to_string(),
                found: match folder.shard_below() {
                    Some(shard) => format!(
                        ", and no images; {} is below it: name its folder",
                        shard.display()
                    ),
                    None => format!(", and no images (data.image_keys = {images:?})"),
                },
            });
        }
        let samples = samples.unwrap_or_else(|| folder.shard_size());
        Ok(folder.shards(samples).map(ShardUrl::images).collect())
    }

    /// The number of images among `files`, and the first; `None` without any.
    pub(super) fn images_among(&self, files: &[ShardUrl]) -> Option<String> {
        let is_image = |file: &&ShardUrl| self.members().is_image(file.name().as_bytes());
        let mut images = files.iter().filter(is_image);
        let first = images.next()?.to_string();
        let images = counted(images.count() + 1, "image");
        Some(format!("{images}, the first of them {first}"))
    }

    /// The listing of a folder of images, which is made once.
    pub(crate) async fn image_folder(&self, path: &Path) -> Result<Arc<ImageFolder>, SourceError> {
        let listings = || {
            let listings = self.0.image_folders.lock();
            listings.unwrap_or_else(PoisonError::into_inner)
        };
        if let Some(folder) = listings().get(path) {
            return Ok(Arc::clone(folder));
        }
        let (root, keys) = (path.to_owned(), self.members().clone());
        let listed = tokio::task::spawn_blocking(move || ImageFolder::list(&root, &keys)).await;
        let folder = match listed {
            Ok(folder) => Arc::new(folder?),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        for warning in folder.warnings() {
            tracing::warn!("{}: {warning}", path.display());
        }
        let mut listings = listings();
        let folder = listings.entry(path.to_owned()).or_insert(folder);
        Ok(Arc::clone(folder))
    }
}

/// A shard of a folder of images being read: a thread makes its tar.
#[derive(Debug)]
pub(super) struct ImagesReader(Receiver<Result<Bytes, SourceError>>);

impl ImagesReader {
    /// Starts to read `shard` to its end, or until the reader is dropped.
    pub(super) fn start(folder: Arc<ImageFolder>, shard: &ImageShard) -> Result<Self, SourceError> {
        let samples = folder.samples_of(shard)?;
        let (sender, receiver) = bounded(CHUNKS);
        let url = shard.to_string();
        let read = {
            let url = url.clone();
            move || {
                let mut chunks = Chunks {
                    sender,
                    gathered: BytesMut::new(),
                };
                match folder.write_tar(samples, &mut chunks) {
                    Ok(unread) => {
                        if let Some(unread) = unread {
                            tracing::warn!("{url}: {unread}");
                        }
                        chunks.send().ok();
                    }
                    Err(error) => drop(chunks.sender.send_blocking(Err(error))),
                }
            }
        };
        std::thread::Builder::new()
            .name("images".to_owned())
            .spawn(read)
            .map_err(|error| SourceError::File {
                url,
                cause: format!("no thread to read it: {error}"),
            })?;
        Ok(Self(receiver))
    }

    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        self.0.recv().await.ok().transpose()
    }
}

/// Written bytes, sent in chunks.
struct Chunks {
    sender: Sender<Result<Bytes, SourceError>>,
    gathered: BytesMut,
}

impl Chunks {
    fn send(&mut self) -> io::Result<()> {
        let chunk = self.gathered.split().freeze();
        self.gathered.reserve(CHUNK_BYTES);
        let sent = self.sender.send_blocking(Ok(chunk));
        sent.map_err(|_closed| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Chunks {
    fn write(&mut self, content: &[u8]) -> io::Result<usize> {
        self.gathered.extend_from_slice(content);
        if self.gathered.len() >= CHUNK_BYTES {
            self.send()?;
        }
        Ok(content.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
