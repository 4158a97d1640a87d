//! Passwords and signatures of URLs are in no output of any command: not on a stream, not in a file.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::support::watched::Watched;
use crate::support::{NO_PICTURES, PRECOMPUTE, QUICKSTART, args, command, repository, text, texts};

/// Parts of all secrets below.
const SECRETS: [&str; 3] = ["s3cret", "S3CRET", "czNjcmV0"];
const QUERY: &str = "X-Amz-Credential=AKS3CRET&X-Amz-Signature=s3cret-signature";

/// A server of the quickstart's shards. It refuses a request without the signature; `locked` is refused as well, `broken.tar` is no tar,
/// and `moved.tar` is redirected to a signed URL that is refused.
fn serve() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            // A client may close the connection before the end of the answer.
            std::thread::spawn(move || answer(&socket).ok());
        }
    });
    format!("me:s3cret-password@{address}")
}

fn answer(socket: &TcpStream) -> std::io::Result<()> {
    let mut lines = BufReader::new(socket).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let mut authorized = false;
    for line in lines {
        let line = line?;
        authorized |= line.starts_with("authorization: Basic ");
        if line.is_empty() {
            break;
        }
    }
    let target = request.split(' ').nth(1).unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let name = path.trim_start_matches('/');
    let file = repository("assets/quickstart/emoji").join(name);
    let (head, body) = match name {
        "moved.tar" => (
            format!("302 Found\r\nlocation: /locked.tar?{query}"),
            Vec::new(),
        ),
        "broken.tar" => ("200 OK".to_owned(), b"<html>no tar</html>".to_vec()),
        _ if query.starts_with("X-Amz-Credential=AKS3CRET") && authorized && file.is_file() => {
            ("200 OK".to_owned(), std::fs::read(&file)?)
        }
        _ => {
            let error =
                format!("<Error><Code>AccessDenied</Code><Message>{target}</Message></Error>");
            ("403 Forbidden".to_owned(), error.into_bytes())
        }
    };
    let mut socket = socket;
    let length = body.len();
    let head = format!("HTTP/1.1 {head}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
    socket.write_all(head.as_bytes())?;
    if !request.starts_with("HEAD") {
        socket.write_all(&body)?;
    }
    Ok(())
}

#[track_caller]
fn without_secrets(what: &str, content: &[u8]) {
    let content = String::from_utf8_lossy(content);
    for secret in SECRETS {
        if let Some((before, _)) = content.split_once(secret) {
            let start = before.char_indices().rev().nth(200).map_or(0, |(at, _)| at);
            panic!("{what} shows {secret} after {:?}", &before[start..]);
        }
    }
}

fn without_secrets_in(folder: &Path) -> usize {
    let mut files = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files += without_secrets_in(&path);
        } else {
            without_secrets(text(&path), text(&path).as_bytes());
            without_secrets(text(&path), &std::fs::read(&path).unwrap());
            files += 1;
        }
    }
    files
}

/// Runs a command that must end with `code`; returns its streams, which hold no secret.
#[track_caller]
fn ends(mut command: Command, code: i32) -> String {
    let output = command.output().unwrap();
    let (out, err) = texts(&output);
    assert_eq!(output.status.code(), Some(code), "{out}{err}");
    without_secrets("standard output", &output.stdout);
    without_secrets("standard error", &output.stderr);
    format!("{out}{err}")
}

fn settings(server: &str, pattern: &str) -> Vec<String> {
    vec![format!("data.shards=\"http://{server}/{pattern}?{QUERY}\"")]
}

#[test]
fn run_over_signed_urls_shows_no_secret() {
    let server = serve();
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let train = |run: &Path, steps: u32, query: &str| {
        let set = [
            format!("data.shards=\"http://{server}/{{00000..00001}}.tar?{query}\""),
            format!("data.cache_dir={}", text(&at("cache"))),
            format!("train.output={}", text(run)),
            format!("train.max_steps={steps}"),
            "train.batch_size=4".to_owned(),
            "checkpoint.every=1".to_owned(),
            "track.tensorboard=true".to_owned(),
        ];
        let pictures = NO_PICTURES.map(str::to_owned);
        args("train", QUICKSTART, set.iter().chain(&pictures))
    };
    let run = at("run");
    ends(command(&train(&run, 1, QUERY)), 0);
    // New signatures do not make it another run.
    let renewed = format!("{QUERY}-renewed");
    let went_on = ends(command(&train(&run, 2, &renewed)), 0);
    assert!(went_on.contains("going on from"), "{went_on}");
    let configuration = std::fs::read_to_string(run.join("config.toml")).unwrap();
    assert!(
        configuration.contains("http://REDACTED@127.0.0.1"),
        "{configuration}"
    );
    assert!(without_secrets_in(&run) >= 8);

    let output = format!("latents.output={}", text(&at("latents")));
    let shards = settings(&server, "00000.tar");
    let precompute = args("precompute", PRECOMPUTE, shards.iter().chain([&output]));
    ends(command(&precompute), 0);
    assert!(without_secrets_in(folder.path()) >= 12);
    for wanted in [
        &["bench", "--samples", "50", "--json"][..],
        &["bench", "--samples", "50"],
        &["check"],
        &["check", "--json"],
        &["check", "--print-config"],
        &["inspect", "--json"],
        &["inspect"],
    ] {
        let mut line = args(wanted[0], QUICKSTART, &shards);
        line.extend(wanted[1..].iter().map(|&word| word.to_owned()));
        let output = format!("train.output={}", text(&at("checked")));
        line.extend(["-s".to_owned(), output]);
        ends(command(&line), 0);
    }
}

#[test]
fn errors_over_signed_urls_show_no_secret() {
    let server = serve();
    let folder = TempDir::new().unwrap();
    let lines = |name: &str, shards: &[String]| {
        let output = format!("train.output={}", text(&folder.path().join("run")));
        args(name, QUICKSTART, shards.iter().chain([&output]))
    };
    for name in ["train", "bench", "check", "inspect"] {
        for pattern in [
            "locked.tar",
            "moved.tar",
            "broken.tar",
            "{00000..00009}.tar",
        ] {
            let shown = ends(command(&lines(name, &settings(&server, pattern))), 1);
            assert!(shown.contains("http://REDACTED@127.0.0.1:"), "{shown}");
        }
    }
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let unreachable = settings(&format!("me:s3cret-password@{closed}"), "0.tar");
    let shown = ends(command(&lines("bench", &unreachable)), 1);
    assert!(shown.contains("can't connect"), "{shown}");
    // The password with a slash ends the host early.
    for (setting, code) in [
        ("data.shards=http://me:s3cret/x@127.0.0.1/{0..1}.tar", 2),
        ("data.shards=[\"http://me:s3cret@127.0.0.1/{0..1.tar\"]", 2),
        ("data.shards=[\"http://me:s3cret@127.0.0.1/\"", 2),
        ("data.shards=[\"http://me:s3cret@127.0.0.1/\", 3]", 2),
        ("data.shards=ftp://me:s3cret@127.0.0.1/0.tar", 2),
        ("data.shards=s3://AK:s3cret@bucket", 2),
        ("data.shard=http://me:s3cret@127.0.0.1/0.tar", 2),
        ("s3.endpoint_url=http://me:s3cret@127.0.0.1", 2),
        (
            "model.teacher=https://me:s3cret@127.0.0.1/model?sig=s3cret",
            2,
        ),
        ("model.vae=https://me:s3cret@127.0.0.1/model?sig=s3cret", 2),
    ] {
        ends(command(&lines("check", &[setting.to_owned()])), code);
    }
    for (variable, value) in [
        ("http_proxy", format!("http://me:s3cret@{closed}")),
        ("http_proxy", format!("me:s3cret@{closed}")),
        ("http_proxy", "socks9://me:s3cret@x y".to_owned()),
        ("HF_ENDPOINT", format!("http://me:s3cret@{closed}")),
        ("AWS_ENDPOINT_URL", format!("http://me:s3cret@{closed}")),
    ] {
        for shards in [
            "data.shards=http://198.51.100.1/0.tar",
            "data.shards=hf://datasets/u/n/0.tar",
            "data.shards=s3://bucket/0.tar",
        ] {
            let at_once = ["s3.max_attempts=1".to_owned(), shards.to_owned()];
            if !shards.contains("http:") || variable == "http_proxy" {
                let mut line = command(&[
                    "inspect",
                    "-s",
                    &at_once[0],
                    &shards["data.shards=".len()..],
                ]);
                line.env(variable, &value);
                if variable != "HF_ENDPOINT" {
                    line.env("HF_ENDPOINT", format!("http://{closed}"));
                }
                if variable != "AWS_ENDPOINT_URL" {
                    line.env("AWS_ENDPOINT_URL", format!("http://{closed}"));
                }
                ends(line, 1);
            }
        }
    }
}

#[test]
fn page_over_signed_urls_shows_no_secret() {
    let server = serve();
    let folder = TempDir::new().unwrap();
    let set = [
        format!("data.shards=\"http://{server}/{{00000..00001}}.tar?{QUERY}\""),
        format!("train.output={}", text(&folder.path().join("run"))),
        "train.batch_size=4".to_owned(),
    ];
    let pictures = NO_PICTURES.map(str::to_owned);
    let set = set.iter().chain(&pictures);
    let watched = Watched::start(&args("train", QUICKSTART, set));
    for path in ["/", "/metrics", "/healthz"] {
        without_secrets(path, &watched.get(path).unwrap().body);
    }
    // The stream of events does not end: the first bytes hold the whole state.
    let events = watched.open("/events", "localhost").unwrap();
    events
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut shown = Vec::new();
    events.take(8192).read_to_end(&mut shown).ok();
    assert!(!shown.is_empty());
    without_secrets("/events", &shown);
    watched.terminate();
    let (_, messages) = watched.end();
    without_secrets("standard error", messages.as_bytes());
    without_secrets_in(folder.path());
}
