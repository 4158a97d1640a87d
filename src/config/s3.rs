//! `[s3]`: how buckets are reached. The table is [`S3Options`] of the pipeline; the limits of its keys are here.

use coffey_pipeline::S3Options;
use coffey_pipeline::text::redact_url;

use super::ConfigError;
use super::bounds::{Bounds, integer};
use super::limits::{Limits, quoted};

/// Bounds of the numbers in `[s3]`.
pub(super) const NUMBERS: &[Bounds] = &[integer("s3.max_attempts", 1, 1_000_000)];

pub(super) fn check(s3: &S3Options, limits: &Limits<'_>) -> Result<(), ConfigError> {
    if let Some(url) = &s3.endpoint_url {
        let ok = url.starts_with("http://") || url.starts_with("https://");
        let needs = "must start with http:// or https://";
        limits.check("s3.endpoint_url", format!("{url:?}"), ok, needs)?;
        let ok = redact_url(url) == *url;
        let needs = "must have no user, password or query; the keys of the server belong into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a \
                     profile";
        limits.check("s3.endpoint_url", format!("{url:?}"), ok, needs)?;
    }
    limits.path("s3.ca_bundle", s3.ca_bundle.as_deref())?;
    limits.path("s3.embedded_root", s3.embedded_root.as_deref())?;
    if let Some(root) = &s3.embedded_root {
        let value = quoted(root);
        let needs = "can't be used together with s3.endpoint_url: remove one of them";
        limits.check("s3.embedded_root", &value, s3.endpoint_url.is_none(), needs)?;
        if !cfg!(feature = "embedded-s3") {
            return Err(ConfigError::WithoutFeature {
                entry: limits.entry("s3.embedded_root", value),
                what: "the embedded S3 server",
                instead: "set s3.endpoint_url",
                feature: "embedded-s3",
            });
        }
    }
    Ok(())
}
