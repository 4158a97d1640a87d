//! Servers whose certificates are signed by a private authority.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use coffey_pipeline::{S3Options, SourceError};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;

use crate::child::Child;
use crate::support::Bench;
use crate::support::web::{Response, Web};

const OBJECT: &[u8] = b"whatever it is";

/// A server of one object; the certificate of its authority is written to `folder`.
fn server(folder: &Path) -> (Web, PathBuf) {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let certificate = authority.self_signed(&key).unwrap();
    let bundle = folder.join("authority.pem");
    std::fs::write(&bundle, certificate.pem()).unwrap();
    let issuer = Issuer::new(authority, key);
    let servers_key = KeyPair::generate().unwrap();
    let server = CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&servers_key, &issuer)
        .unwrap();
    let private = PrivateKeyDer::from_pem_slice(servers_key.serialize_pem().as_bytes()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![server.der().clone()], private)
        .unwrap();
    let web = Web::with(Some(Arc::new(config)), |_| {
        Response::new(200, OBJECT).with("etag", "\"one\"")
    });
    (web, bundle)
}

fn read(url: &str, options: S3Options) -> Result<Vec<u8>, SourceError> {
    Bench::new(options).read(url)
}

#[test]
fn private_authority_is_trusted_when_named() {
    let folder = tempfile::tempdir().unwrap();
    let (web, bundle) = server(folder.path());
    for url in [
        "s3://bucket/key.tar".to_owned(),
        format!("{}/key.tar", web.endpoint),
    ] {
        let options = |ca_bundle| S3Options {
            endpoint_url: Some(web.endpoint.clone()),
            path_style: true,
            anonymous: true,
            ca_bundle,
            ..S3Options::default()
        };
        assert_eq!(read(&url, options(Some(bundle.clone()))).unwrap(), OBJECT);
        let seen = web.seen().len();
        let error = read(&url, options(None)).unwrap_err();
        assert!(
            matches!(error, SourceError::Certificate { .. }),
            "{error:?}"
        );
        let text = error.to_string();
        assert!(
            text.contains("UnknownIssuer")
                && text.contains("set [s3] ca_bundle (or AWS_CA_BUNDLE)"),
            "{text}"
        );
        assert_eq!(web.seen().len(), seen, "no request was sent");
    }
}

#[test]
fn aws_ca_bundle_variable_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let (web, bundle) = server(folder.path());
    let child = |bundle: &Path| {
        Child::reads("s3://bucket/key.tar", &web.endpoint)
            .switch("anonymous")
            .set("AWS_CA_BUNDLE", bundle)
            .run()
    };
    assert_eq!(child(&bundle), [format!("read {} bytes", OBJECT.len())]);
    let printed = child(Path::new("nowhere.pem"));
    assert!(
        printed[0].starts_with("AWS_CA_BUNDLE = \"nowhere.pem\": No such file"),
        "{printed:?}"
    );
}
