//! `[image]`: how an image becomes a square of pixels. The table is [`ImageOptions`] of the pipeline; here are the limits of
//! its keys, and the rule for latents, whose manifest decides them.

use coffey_pipeline::ImageOptions;
use toml::Table;

use super::bounds::{Bounds, integer};
use super::limits::Limits;
use super::parse::join;
use super::{Config, ConfigError};

/// Downscaling of the autoencoders in use. `train` checks the resolution against the loaded autoencoder as well, but only
/// after the models are fetched, and without the line of the file.
const RESOLUTION_STEP: u32 = 8;

/// Bounds of the numbers in `[image]`.
pub(super) const NUMBERS: &[Bounds] = &[integer("image.resolution", 8, MAX_RESOLUTION as i64)];

/// Greatest side of an image in pixels, for training and for sampling.
pub const MAX_RESOLUTION: u32 = 8192;

pub(super) fn check(image: &ImageOptions, limits: &Limits<'_>) -> Result<(), ConfigError> {
    let side = image.resolution;
    let ok = side.is_multiple_of(RESOLUTION_STEP);
    let needs = format!("must be a multiple of {RESOLUTION_STEP}");
    limits.check("image.resolution", side, ok, &needs)
}

impl Config {
    /// Replaces `[image]` by the settings that the data's latents were made with, read from the manifest at path `manifest`.
    ///
    /// # Errors
    /// The first key of `[image]` that was written down with another value.
    pub fn adopt_image_settings(
        &mut self,
        made_with: ImageOptions,
        manifest: &str,
    ) -> Result<(), ConfigError> {
        let table = |image: &ImageOptions| Table::try_from(image).unwrap_or_default();
        let (written, made) = (table(&self.image), table(&made_with));
        for (key, value) in &written {
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
        self.image = made_with;
        Ok(())
    }
}
