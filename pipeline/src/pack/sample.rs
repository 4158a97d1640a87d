//! A sample to be packed, and its json with img2dataset's keys.

use bytes::Bytes;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::image::{DecodeError, ImageOptions, probe};
use crate::json::{Document, is_key};
use crate::shard::Sample;
use crate::source::MemberKeys;
use crate::stream::SkipReason;

/// Why a sample is not packed.
pub(super) struct LeftOut {
    /// The reason for which a stream skips it.
    pub(super) reason: String,
    /// The fault, as "has no …".
    pub(super) fault: String,
}

/// A sample that can be packed.
pub(super) struct PackedSample<'a> {
    /// Extension of the image.
    pub(super) extension: &'a str,
    pub(super) image: &'a Bytes,
    pub(super) caption: &'a Bytes,
    width: u32,
    height: u32,
}

impl<'a> PackedSample<'a> {
    /// Reads the header of the image, and decodes nothing.
    pub(super) fn of(sample: &'a Sample, keys: &MemberKeys) -> Result<Self, LeftOut> {
        let left_out = |reason: SkipReason, fault: String| {
            let reason = if sample.is_part && reason.is_missing_member() {
                SkipReason::DUPLICATE_MEMBER
            } else {
                reason
            };
            LeftOut {
                reason: reason.name().into_owned(),
                fault,
            }
        };
        let Some((extension, image)) = sample.pick(&keys.images) else {
            let large = keys.images.iter().find_map(|key| sample.oversized.get(key));
            return Err(match large {
                Some(bytes) => left_out(SkipReason::TOO_LARGE, format!("has {bytes} bytes")),
                None => {
                    let fault = format!("has none of data.image_keys = {:?}", keys.images);
                    left_out(SkipReason::NO_IMAGE, fault)
                }
            });
        };
        let Some((_, caption)) = sample.pick(&keys.captions) else {
            let fault = format!(
                "has no caption: write it to a file of this name with one of the extensions {:?}",
                keys.captions
            );
            return Err(left_out(SkipReason::NO_CAPTION, fault));
        };
        let max_pixels = ImageOptions::default().max_pixels;
        let (width, height) = match probe(image) {
            Ok((_, width, height)) if u64::from(width) * u64::from(height) <= max_pixels => {
                (width, height)
            }
            Ok((_, width, height)) => {
                let fault = format!("is {width}x{height} pixels");
                return Err(left_out(SkipReason::TOO_LARGE, fault));
            }
            Err(DecodeError::UnreadFormat(format)) => {
                let fault = DecodeError::UnreadFormat(format).to_string();
                return Err(left_out(SkipReason::UnreadFormat(format), fault));
            }
            Err(error) => return Err(left_out(SkipReason::DECODE_ERROR, error.to_string())),
        };
        Ok(Self {
            extension,
            image,
            caption,
            width,
            height,
        })
    }

    /// The json under the new `key`, for an image at `file` in the folder. Further keys of the sample's own json are kept, as is its record of the original image.
    pub(super) fn json(&self, sample: &Sample, key: &str, file: &str) -> String {
        let own = sample.members.get("json");
        let own = own.and_then(|bytes| Document::parse(bytes).ok());
        let kept = |key: &str| own.as_ref()?.get(key).filter(|value| !value.is_null());
        let hash: String = Sha256::digest(self.image)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let fields = [
            ("key", key.into()),
            ("url", kept("url").unwrap_or_else(|| file.into())),
            ("caption", String::from_utf8_lossy(self.caption).into()),
            ("status", "success".into()),
            ("error_message", Value::Null),
            ("width", self.width.into()),
            ("height", self.height.into()),
            (
                "original_width",
                kept("original_width").unwrap_or_else(|| self.width.into()),
            ),
            (
                "original_height",
                kept("original_height").unwrap_or_else(|| self.height.into()),
            ),
            ("sha256", hash.into()),
        ];
        let mut pairs: Vec<String> = fields
            .iter()
            .map(|(name, value)| format!("{}:{value}", Value::from(*name)))
            .collect();
        let others = own.as_ref().and_then(Document::members);
        for (quoted, value) in others.into_iter().flatten() {
            if !fields.iter().any(|(name, _)| is_key(quoted, name)) {
                pairs.push(format!("{quoted}:{value}"));
            }
        }
        format!("{{{}}}", pairs.join(","))
    }
}
