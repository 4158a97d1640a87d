//! The AWS default chain: each provider against a fake server on loopback or a file, and credentials that expire while a stream runs.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::child::Child;
use crate::support::proxy::{Fault, Rule, clean};
use crate::support::web::{Request, Response, Web};
use crate::support::{Faulty, shard};

const URL: &str = "s3://bucket/key.tar";
const READ: &str = "read 6 bytes";
/// An expiry after every test.
const LATER: &str = "2100-01-01T00:00:00Z";

/// An S3 server that serves one object to requests signed with the key `GOOD`.
fn s3() -> Web {
    Web::start(|request| {
        if request.header("authorization").contains("Credential=GOOD/") {
            Response::new(200, "object").with("etag", "\"one\"")
        } else {
            Response::s3_error(403, "AccessDenied")
        }
    })
}

fn token(request: &Request) -> &str {
    request.header("x-amz-security-token")
}

#[test]
fn credentials_from_environment() {
    let s3 = s3();
    let printed = Child::reads(URL, &s3.endpoint)
        .set("AWS_ACCESS_KEY_ID", "GOOD")
        .set("AWS_SECRET_ACCESS_KEY", "secret")
        .set("AWS_SESSION_TOKEN", "session")
        .run();
    assert_eq!(printed, [READ]);
    let seen = s3.seen();
    assert_eq!((seen.len(), token(&seen[0])), (1, "session"));
    assert_eq!(
        (seen[0].method.as_str(), seen[0].path.as_str()),
        ("GET", "/bucket/key.tar?x-id=GetObject")
    );
    assert!(seen[0].header("authorization").contains("/eu-west-1/s3/"));
}

#[test]
fn credentials_from_profile_with_endpoint_and_region() {
    let s3 = s3();
    let child = Child::reads(URL, "");
    let file = child.home().join("config");
    let text = format!(
        "[default]\naws_access_key_id = OTHER\naws_secret_access_key = x\n[profile lab]\naws_access_key_id = GOOD\n\
         aws_secret_access_key = secret\nregion = ap-south-1\nendpoint_url = {}\n",
        s3.endpoint
    );
    std::fs::write(&file, text).unwrap();
    let printed = child
        .unset("AWS_REGION")
        .set("AWS_PROFILE", "lab")
        .set("AWS_CONFIG_FILE", &file)
        .run();
    assert_eq!(printed, [READ]);
    assert!(
        s3.seen()[0]
            .header("authorization")
            .contains("/ap-south-1/s3/")
    );
}

#[test]
fn credentials_from_web_identity() {
    let s3 = s3();
    let sts = Web::start(|_| {
        let body = format!(
            "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
             <AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>GOOD</AccessKeyId><SecretAccessKey>secret\
             </SecretAccessKey><SessionToken>of the role</SessionToken><Expiration>{LATER}</Expiration></Credentials>\
             <AssumedRoleUser><Arn>arn:aws:sts::1:assumed-role/r/s</Arn><AssumedRoleId>A:s</AssumedRoleId>\
             </AssumedRoleUser></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        );
        Response::new(200, body).with("content-type", "text/xml")
    });
    let child = Child::reads(URL, &s3.endpoint);
    let file = child.home().join("token");
    std::fs::write(&file, "of the pod").unwrap();
    let printed = child
        .set("AWS_ROLE_ARN", "arn:aws:iam::1:role/r")
        .set("AWS_WEB_IDENTITY_TOKEN_FILE", &file)
        .set("AWS_ENDPOINT_URL_STS", &sts.endpoint)
        .run();
    assert_eq!(printed, [READ]);
    assert_eq!(token(&s3.seen()[0]), "of the role");
    let asked = &sts.seen()[0].body;
    assert!(
        asked.contains("Action=AssumeRoleWithWebIdentity")
            && asked.contains("WebIdentityToken=of+the+pod")
            || asked.contains("WebIdentityToken=of%20the%20pod"),
        "{asked}"
    );
}

/// An instance's metadata server; `key` gives the role's access key at each request.
fn metadata(key: impl Fn() -> &'static str + Send + Sync + 'static) -> Web {
    Web::start(move |request| {
        const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
        match (request.method.as_str(), request.path.as_str()) {
            ("PUT", "/latest/api/token") => {
                Response::new(200, "session").with("x-aws-ec2-metadata-token-ttl-seconds", "21600")
            }
            ("GET", ROLES) => Response::new(200, "trainer"),
            ("GET", path) if path == format!("{ROLES}trainer") => Response::new(
                200,
                format!(
                    "{{\"Code\":\"Success\",\"LastUpdated\":\"2026-01-01T00:00:00Z\",\"Type\":\"AWS-HMAC\",\
                     \"AccessKeyId\":\"{}\",\"SecretAccessKey\":\"secret\",\"Token\":\"of the instance\",\
                     \"Expiration\":\"{LATER}\"}}",
                    key()
                ),
            ),
            _ => Response::new(404, ""),
        }
    })
}

#[test]
fn credentials_from_instance_role() {
    let (s3, metadata) = (s3(), metadata(|| "GOOD"));
    let printed = Child::reads(URL, &s3.endpoint)
        .set("AWS_EC2_METADATA_DISABLED", "false")
        .set("AWS_EC2_METADATA_SERVICE_ENDPOINT", &metadata.endpoint)
        .run();
    assert_eq!(printed, [READ]);
    assert_eq!(token(&s3.seen()[0]), "of the instance");
}

#[test]
fn credentials_from_container_role() {
    let s3 = s3();
    let agent = Web::start(|_| {
        let body = format!(
            "{{\"AccessKeyId\":\"GOOD\",\"SecretAccessKey\":\"secret\",\"Token\":\"of the task\",\"Expiration\":\"{LATER}\"}}"
        );
        Response::new(200, body)
    });
    let printed = Child::reads(URL, &s3.endpoint)
        .set(
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            format!("{}/role", agent.endpoint),
        )
        .run();
    assert_eq!(printed, [READ]);
    assert_eq!(token(&s3.seen()[0]), "of the task");
}

#[test]
fn anonymous_and_requester_pays_headers() {
    let s3 = Web::start(|_| Response::new(200, "object"));
    let printed = Child::reads(URL, &s3.endpoint).switch("anonymous").run();
    assert_eq!(printed, [READ]);
    let seen = &s3.seen()[0];
    assert_eq!(
        (
            seen.header("authorization"),
            seen.header("x-amz-request-payer")
        ),
        ("", "")
    );
    let printed = Child::reads(URL, &s3.endpoint)
        .switch("requester_pays")
        .set("AWS_ACCESS_KEY_ID", "GOOD")
        .set("AWS_SECRET_ACCESS_KEY", "secret")
        .run();
    assert_eq!(printed, [READ]);
    assert_eq!(s3.seen()[1].header("x-amz-request-payer"), "requester");
}

#[test]
fn missing_credentials_name_the_ways_to_set_them() {
    let s3 = s3();
    let printed = Child::reads(URL, &s3.endpoint).run();
    assert!(
        printed[0].starts_with("s3://bucket/key.tar: no usable AWS credentials ("),
        "{printed:?}"
    );
    assert!(printed[0].contains("[s3] anonymous = true"), "{printed:?}");
    assert!(s3.seen().is_empty());
}

#[test]
fn expired_credentials_end_at_once() {
    let s3 = Web::start(|_| Response::s3_error(400, "ExpiredToken"));
    let printed = Child::reads(URL, &s3.endpoint)
        .set("AWS_ACCESS_KEY_ID", "GOOD")
        .set("AWS_SECRET_ACCESS_KEY", "secret")
        .set("AWS_SESSION_TOKEN", "old")
        .run();
    assert!(
        printed[0].starts_with(
            "s3://bucket/key.tar: the AWS credentials have expired (GetObject: HTTP 400 ExpiredToken"
        ),
        "{printed:?}"
    );
    assert!(printed[0].contains("AWS_SESSION_TOKEN"), "{printed:?}");
    assert_eq!(s3.seen().len(), 1);
}

/// An S3 server that takes the key `GOOD` and answers that any other has expired, after calling `on_expired`.
fn strict_s3(on_expired: impl Fn() + Send + Sync + 'static) -> Web {
    Web::start(move |request| {
        if request.header("authorization").contains("Credential=GOOD/") {
            return Response::new(200, "object").with("etag", "\"one\"");
        }
        on_expired();
        Response::s3_error(400, "ExpiredToken")
    })
}

#[test]
fn instance_role_renews_expired_credentials() {
    static EXPIRED: AtomicBool = AtomicBool::new(false);
    let metadata = metadata(|| {
        if EXPIRED.load(Ordering::SeqCst) {
            "GOOD"
        } else {
            "OLD"
        }
    });
    let s3 = strict_s3(|| EXPIRED.store(true, Ordering::SeqCst));
    let printed = Child::reads(URL, &s3.endpoint)
        .set("AWS_EC2_METADATA_DISABLED", "false")
        .set("AWS_EC2_METADATA_SERVICE_ENDPOINT", &metadata.endpoint)
        .run();
    assert_eq!(printed, [READ]);
    assert_eq!(s3.seen().len(), 2);
}

#[test]
fn rewritten_profile_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("credentials");
    let write = {
        let file = file.clone();
        move |key: &str| {
            let text = format!(
                "[default]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t\n"
            );
            std::fs::write(&file, text).unwrap();
        }
    };
    write("OLD");
    let s3 = strict_s3(move || write("GOOD"));
    let printed = Child::reads(URL, &s3.endpoint)
        .set("AWS_SHARED_CREDENTIALS_FILE", &file)
        .run();
    assert_eq!(printed, [READ]);
    assert_eq!(s3.seen().len(), 2);
}

/// A real S3 server with four shards of nine samples each.
fn server(rule: Rule) -> Faulty {
    let server = Faulty::with_keys(&["first", "second"], rule);
    for n in 0..4 {
        server.write(&format!("{n:05}.tar"), &shard(n, 9));
    }
    server
}

/// Reads the server's four shards in a child process with these variables; returns what it printed.
fn read_shards(server: &Faulty, environment: &[(&str, &str)]) -> String {
    let url = "s3://data/{00000..00003}.tar";
    let mut child = Child::reads_in_turn(url, &server.proxy.endpoint);
    for (name, value) in environment {
        child = child.set(name, value);
    }
    child.run().join("\n")
}

/// From the third request on, the key `first` has expired.
fn expiring(mut on_expired: impl FnMut() + Send + 'static) -> Rule {
    let mut requests = 0;
    Box::new(move |head, _| {
        requests += 1;
        (requests > 2 && head.contains("credential=first/")).then(|| {
            on_expired();
            Fault::Status(403, "ExpiredToken")
        })
    })
}

fn write_keys(file: &Path, key: &str) {
    let keys = format!(r#"{{"Version": 1, "AccessKeyId": "{key}", "SecretAccessKey": "{key}"}}"#);
    std::fs::write(file, keys).unwrap();
}

#[test]
fn stream_continues_with_renewed_credentials() {
    let server = server(clean());
    let file = server.root.path().join("keys.json");
    write_keys(&file, "first");
    let profile = server.root.path().join("config");
    let text = format!("[default]\ncredential_process = cat {}\n", file.display());
    std::fs::write(&profile, text).unwrap();
    // The keys are renewed only when the first request with the old ones is refused.
    server
        .proxy
        .follow(expiring(move || write_keys(&file, "second")));
    let printed = read_shards(
        &server,
        &[("AWS_CONFIG_FILE", &profile.display().to_string())],
    );
    assert_eq!(printed, "read 36 samples");
    let requests = server.proxy.requests();
    assert!(
        requests
            .iter()
            .any(|head| head.contains("credential=second/"))
    );
}

#[test]
fn stream_ends_when_credentials_stay_expired() {
    let server = server(expiring(|| {}));
    let printed = read_shards(
        &server,
        &[
            ("AWS_ACCESS_KEY_ID", "first"),
            ("AWS_SECRET_ACCESS_KEY", "first"),
        ],
    );
    assert!(printed.contains("s3://data/00002.tar"), "{printed}");
    assert!(
        printed.contains("credentials have expired (GetObject: HTTP 403 ExpiredToken"),
        "{printed}"
    );
    assert!(printed.contains("renews them by itself"), "{printed}");
}

#[test]
fn missing_or_wrong_credentials_end_stream_at_once() {
    let server = server(clean());
    let printed = read_shards(&server, &[]);
    assert!(printed.contains("no usable AWS credentials"), "{printed}");
    assert!(printed.contains("AWS_PROFILE"), "{printed}");
    assert!(server.proxy.requests().is_empty());
    let wrong = [
        ("AWS_ACCESS_KEY_ID", "first"),
        ("AWS_SECRET_ACCESS_KEY", "other"),
    ];
    let printed = read_shards(&server, &wrong);
    assert!(
        printed.contains("s3://data/00000.tar: access denied"),
        "{printed}"
    );
    assert!(printed.contains("check the credentials"), "{printed}");
    // One request for each shard that was opened ahead.
    let requests = server.proxy.requests();
    let first_line = |head: &String| head.lines().next().map(str::to_owned);
    let asked: BTreeSet<_> = requests.iter().map(first_line).collect();
    assert_eq!(asked.len(), requests.len(), "{requests:?}");
}
