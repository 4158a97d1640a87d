//! What latent shards were made with, taken over into a configuration that trains on them.

use toml::Table;

use super::document::join;
use super::error::ConfigError;
use super::{Config, Image};

impl Config {
    /// Takes over how the images became squares that the data's latents are of: `[image]` says that, and can't change it any
    /// more. `manifest` is who says so.
    ///
    /// # Errors
    /// For the first key that was written down with another value.
    pub fn take_over(&mut self, image: Image, manifest: &str) -> Result<(), ConfigError> {
        let table = |image: &Image| Table::try_from(image).unwrap_or_default();
        let (now, made) = (table(&self.image), table(&image));
        for (key, value) in &now {
            let made = made.get(key).map(ToString::to_string).unwrap_or_default();
            let full = join("image", key);
            if self.origin.has(&full) && value.to_string() != made {
                return Err(ConfigError::Invalid {
                    entry: self.origin.entry(&full, value),
                    needs: format!(
                        "must be {made} or left out: the latents were made with that, says {manifest}; for another value \
                         run coffey precompute with it"
                    ),
                });
            }
        }
        self.image = image;
        Ok(())
    }
}
