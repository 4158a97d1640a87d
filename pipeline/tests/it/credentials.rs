//! The AWS default chain, each provider against a stand-in on loopback or a file.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::child::Child;
use crate::support::web::{Request, Response, Web};

const URL: &str = "s3://bucket/key.tar";
const READ: &str = "read 6 bytes";
/// Long after every test.
const LATER: &str = "2100-01-01T00:00:00Z";

/// An S3 server that serves one object to whoever signs with the key `GOOD`.
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
fn credentials_of_the_environment_are_used() {
    let s3 = s3();
    let said = Child::reads(URL, &s3.endpoint)
        .set("AWS_ACCESS_KEY_ID", "GOOD")
        .set("AWS_SECRET_ACCESS_KEY", "secret")
        .set("AWS_SESSION_TOKEN", "session")
        .run();
    assert_eq!(said, [READ]);
    let seen = s3.seen();
    assert_eq!((seen.len(), token(&seen[0])), (1, "session"));
    assert_eq!(
        (seen[0].method.as_str(), seen[0].path.as_str()),
        ("GET", "/bucket/key.tar?x-id=GetObject")
    );
    assert!(seen[0].header("authorization").contains("/eu-west-1/s3/"));
}

#[test]
fn a_profile_is_used_with_its_endpoint_and_region() {
    let s3 = s3();
    let child = Child::reads(URL, "");
    let file = child.home().join("config");
    let text = format!(
        "[default]\naws_access_key_id = OTHER\naws_secret_access_key = x\n[profile lab]\naws_access_key_id = GOOD\n\
         aws_secret_access_key = secret\nregion = ap-south-1\nendpoint_url = {}\n",
        s3.endpoint
    );
    std::fs::write(&file, text).unwrap();
    let said = child
        .unset("AWS_REGION")
        .set("AWS_PROFILE", "lab")
        .set("AWS_CONFIG_FILE", &file)
        .run();
    assert_eq!(said, [READ]);
    assert!(
        s3.seen()[0]
            .header("authorization")
            .contains("/ap-south-1/s3/")
    );
}

#[test]
fn a_web_identity_is_exchanged_for_credentials() {
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
    let said = child
        .set("AWS_ROLE_ARN", "arn:aws:iam::1:role/r")
        .set("AWS_WEB_IDENTITY_TOKEN_FILE", &file)
        .set("AWS_ENDPOINT_URL_STS", &sts.endpoint)
        .run();
    assert_eq!(said, [READ]);
    assert_eq!(token(&s3.seen()[0]), "of the role");
    let asked = &sts.seen()[0].body;
    assert!(
        asked.contains("Action=AssumeRoleWithWebIdentity")
            && asked.contains("WebIdentityToken=of+the+pod")
            || asked.contains("WebIdentityToken=of%20the%20pod"),
        "{asked}"
    );
}

/// An instance's metadata: the role's credentials are those of `key` at the time of asking.
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
fn an_instances_role_is_used() {
    let (s3, metadata) = (s3(), metadata(|| "GOOD"));
    let said = Child::reads(URL, &s3.endpoint)
        .set("AWS_EC2_METADATA_DISABLED", "false")
        .set("AWS_EC2_METADATA_SERVICE_ENDPOINT", &metadata.endpoint)
        .run();
    assert_eq!(said, [READ]);
    assert_eq!(token(&s3.seen()[0]), "of the instance");
}

#[test]
fn a_containers_role_is_used() {
    let s3 = s3();
    let agent = Web::start(|_| {
        let body = format!(
            "{{\"AccessKeyId\":\"GOOD\",\"SecretAccessKey\":\"secret\",\"Token\":\"of the task\",\"Expiration\":\"{LATER}\"}}"
        );
        Response::new(200, body)
    });
    let said = Child::reads(URL, &s3.endpoint)
        .set(
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            format!("{}/role", agent.endpoint),
        )
        .run();
    assert_eq!(said, [READ]);
    assert_eq!(token(&s3.seen()[0]), "of the task");
}

#[test]
fn anonymous_requests_are_unsigned_and_the_requester_can_pay() {
    let s3 = Web::start(|_| Response::new(200, "object"));
    let said = Child::reads(URL, &s3.endpoint).switch("anonymous").run();
    assert_eq!(said, [READ]);
    let seen = &s3.seen()[0];
    assert_eq!(
        (
            seen.header("authorization"),
            seen.header("x-amz-request-payer")
        ),
        ("", "")
    );
    let said = Child::reads(URL, &s3.endpoint)
        .switch("requester_pays")
        .set("AWS_ACCESS_KEY_ID", "GOOD")
        .set("AWS_SECRET_ACCESS_KEY", "secret")
        .run();
    assert_eq!(said, [READ]);
    assert_eq!(s3.seen()[1].header("x-amz-request-payer"), "requester");
}

#[test]
fn without_any_credentials_the_ways_to_give_some_are_named() {
    let s3 = s3();
    let said = Child::reads(URL, &s3.endpoint).run();
    assert!(
        said[0].starts_with("s3://bucket/key.tar: no usable AWS credentials ("),
        "{said:?}"
    );
    assert!(said[0].contains("[s3] anonymous = true"), "{said:?}");
    assert!(s3.seen().is_empty());
}

#[test]
fn credentials_that_expired_for_good_end_it_at_once() {
    let s3 = Web::start(|_| Response::s3_error(400, "ExpiredToken"));
    let said = Child::reads(URL, &s3.endpoint)
        .set("AWS_ACCESS_KEY_ID", "GOOD")
        .set("AWS_SECRET_ACCESS_KEY", "secret")
        .set("AWS_SESSION_TOKEN", "old")
        .run();
    assert!(
        said[0].starts_with(
            "s3://bucket/key.tar: the AWS credentials have expired (HTTP 400 ExpiredToken"
        ),
        "{said:?}"
    );
    assert!(said[0].contains("AWS_SESSION_TOKEN"), "{said:?}");
    assert_eq!(s3.seen().len(), 1);
}

/// Takes the key `GOOD` and calls every other one expired; `at_first` happens before it does so.
fn strict_s3(at_first: impl Fn() + Send + Sync + 'static) -> Web {
    Web::start(move |request| {
        if request.header("authorization").contains("Credential=GOOD/") {
            return Response::new(200, "object").with("etag", "\"one\"");
        }
        at_first();
        Response::s3_error(400, "ExpiredToken")
    })
}

#[test]
fn a_role_renews_credentials_that_expire_on_the_way() {
    static EXPIRED: AtomicBool = AtomicBool::new(false);
    let metadata = metadata(|| {
        if EXPIRED.load(Ordering::SeqCst) {
            "GOOD"
        } else {
            "OLD"
        }
    });
    let s3 = strict_s3(|| EXPIRED.store(true, Ordering::SeqCst));
    let said = Child::reads(URL, &s3.endpoint)
        .set("AWS_EC2_METADATA_DISABLED", "false")
        .set("AWS_EC2_METADATA_SERVICE_ENDPOINT", &metadata.endpoint)
        .run();
    assert_eq!(said, [READ]);
    assert_eq!(s3.seen().len(), 2);
}

#[test]
fn a_profile_that_was_rewritten_is_read_anew() {
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
    let said = Child::reads(URL, &s3.endpoint)
        .set("AWS_SHARED_CREDENTIALS_FILE", &file)
        .run();
    assert_eq!(said, [READ]);
    assert_eq!(s3.seen().len(), 2);
}
