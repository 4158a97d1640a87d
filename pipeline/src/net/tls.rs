//! Certificate authorities trusted besides the system's, and the error for a refused certificate.

use std::path::{Path, PathBuf};

use aws_smithy_http_client::tls::{TlsContext, TrustStore};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::error::SourceError;
use crate::bounded::{self, MAX_FILE_BYTES};
use crate::shard::ShardUrl;
use crate::text::redact_url;

/// The variable that the AWS tools read as well.
const VARIABLE: &str = "AWS_CA_BUNDLE";

/// Usable certificates of authorities.
#[derive(Debug, Clone)]
pub(crate) struct CaBundle {
    pem: Vec<u8>,
    certificates: Vec<CertificateDer<'static>>,
}

impl CaBundle {
    /// Reads `[s3] ca_bundle`, else the file that `AWS_CA_BUNDLE` names; `None` where neither is set.
    pub(crate) fn load(configured: Option<&Path>) -> Result<Option<Self>, SourceError> {
        let variable = || {
            let path = std::env::var_os(VARIABLE).filter(|path| !path.is_empty())?;
            Some((VARIABLE, PathBuf::from(path)))
        };
        match configured
            .map(|path| ("[s3] ca_bundle", path.to_owned()))
            .or_else(variable)
        {
            Some((setting, path)) => Self::read(setting, &path).map(Some),
            None => Ok(None),
        }
    }

    fn read(setting: &'static str, path: &Path) -> Result<Self, SourceError> {
        let failed = |cause: String| SourceError::CaBundle {
            setting,
            path: path.to_owned(),
            cause,
        };
        let pem =
            bounded::read_file(path, MAX_FILE_BYTES).map_err(|error| failed(error.to_string()))?;
        let certificates = CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| failed(format!("is not PEM: {error}")))?;
        if certificates.is_empty() {
            return Err(failed(
                "has no certificate in it; it must be PEM, with BEGIN CERTIFICATE".to_owned(),
            ));
        }
        // The HTTP clients panic on a certificate that they can't read.
        let mut roots = RootCertStore::empty();
        for certificate in &certificates {
            roots.add(certificate.clone()).map_err(|error| {
                failed(format!("has a certificate that can't be used: {error}"))
            })?;
        }
        Ok(Self { pem, certificates })
    }

    /// The certificates for the AWS SDK.
    pub(crate) fn context(&self) -> Option<TlsContext> {
        let store = TrustStore::default().with_pem_certificate(self.pem.as_slice());
        TlsContext::builder().with_trust_store(store).build().ok()
    }

    /// The certificates for reqwest.
    pub(crate) fn certificates(&self) -> Vec<reqwest::Certificate> {
        self.certificates
            .iter()
            .filter_map(|certificate| reqwest::Certificate::from_der(certificate).ok())
            .collect()
    }
}

/// The error for a refused server certificate; `None` if `cause` is another fault.
pub(crate) fn certificate_error(
    url: &ShardUrl,
    endpoint: &str,
    cause: &str,
) -> Option<SourceError> {
    if !cause.contains("invalid peer certificate") {
        return None;
    }
    let hint = if cause.contains("UnknownIssuer") || cause.contains("CaUsedAsEndEntity") {
        "\n  if it is signed by an authority of your own, set [s3] ca_bundle (or AWS_CA_BUNDLE) to a PEM file with that \
         authority's certificate"
    } else {
        ""
    };
    Some(SourceError::Certificate {
        url: url.to_string(),
        endpoint: redact_url(endpoint),
        cause: cause.to_owned(),
        hint,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ca_bundle_error_names_the_setting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        let error = || CaBundle::load(Some(&path)).unwrap_err();
        assert!(error().is_config());
        assert!(
            error().to_string().starts_with("[s3] ca_bundle = "),
            "{}",
            error()
        );
        for (content, cause) in [
            ("no certificate", "has no certificate in it"),
            (
                "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                "can't be used",
            ),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n", "is not PEM"),
        ] {
            std::fs::write(&path, content).unwrap();
            assert!(error().to_string().contains(cause), "{}", error());
        }
    }

    #[test]
    fn certificate_error_advises_by_cause() {
        let url = "s3://b/k.tar".parse().unwrap();
        let error = |cause: &str| certificate_error(&url, "https://minio", cause);
        let text = error("invalid peer certificate: UnknownIssuer")
            .unwrap()
            .to_string();
        assert!(text.contains("[s3] ca_bundle"), "{text}");
        let text = error("invalid peer certificate: Expired")
            .unwrap()
            .to_string();
        assert!(!text.contains("ca_bundle"), "{text}");
        assert_eq!(error("connection refused"), None);
    }
}
