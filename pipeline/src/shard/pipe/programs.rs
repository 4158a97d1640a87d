//! The options of the programs whose commands are read.

/// The options of a program.
pub(super) struct Program {
    /// Words before the URL.
    pub(super) commands: &'static [&'static [&'static str]],
    /// Whether standard output has to be named after the URL.
    pub(super) names_output: fn(&str) -> bool,
    /// Options without an effect on the bytes.
    pub(super) flags: &'static [&'static str],
    /// The same with a value.
    pub(super) values: &'static [&'static str],
    /// The option that names the output.
    pub(super) output: &'static [&'static str],
    /// Whether the output has to be named by that option.
    pub(super) needs_output: bool,
    /// Options that are refused, and what to write instead.
    pub(super) refused: &'static [(&'static [&'static str], &'static str)],
    /// Beginnings of the URLs that the program reads; empty: a path.
    pub(super) schemes: &'static [&'static str],
}

const NO_OUTPUT: fn(&str) -> bool = |_| false;
const S3_OPTIONS: &[(&[&str], &str)] = &[
    (&["--endpoint-url"], "set [s3] endpoint_url"),
    (&["--profile"], "set AWS_PROFILE"),
    (&["--region", "--source-region"], "set [s3] region"),
    (&["--no-sign-request"], "set [s3] anonymous = true"),
    (&["--request-payer"], "set [s3] requester_pays = true"),
    (&["--ca-bundle"], "set [s3] ca_bundle"),
    (
        &["--no-verify-ssl"],
        "set [s3] ca_bundle to the authority of the server's certificate",
    ),
    (&["--credentials-file"], "set AWS_SHARED_CREDENTIALS_FILE"),
    (
        &[
            "--sse-c",
            "--sse-c-key",
            "--sse-c-copy-source",
            "--sse-c-copy-source-key",
        ],
        "objects under a key of the customer's can't be read",
    ),
    (
        &["--recursive", "--include", "--exclude", "--dryrun"],
        "name each shard, or a prefix that ends in '/'",
    ),
];
const AWS: Program = Program {
    commands: &[&["s3", "cp"]],
    names_output: |_| true,
    flags: &[
        "--quiet",
        "--only-show-errors",
        "--no-progress",
        "--debug",
        "--no-cli-pager",
        "--no-paginate",
        "--force-glacier-transfer",
        "--ignore-glacier-warnings",
    ],
    values: &[
        "--cli-read-timeout",
        "--cli-connect-timeout",
        "--color",
        "--expected-size",
        "--output",
        "--page-size",
        "--progress-frequency",
    ],
    output: &[],
    needs_output: false,
    refused: S3_OPTIONS,
    schemes: &["s3://"],
};
const S5CMD: Program = Program {
    commands: &[&["cat"]],
    names_output: NO_OUTPUT,
    flags: &["--json", "--stat"],
    values: &[
        "--numworkers",
        "-r",
        "--retry-count",
        "-c",
        "--concurrency",
        "-p",
        "--part-size",
        "--log",
    ],
    ..AWS
};
const HEADERS: &str = "set data.http_headers; for files of the Hugging Face Hub set HF_TOKEN";
const LOGIN: &str = "set data.http_headers to the header \"Authorization\"";
const CERTIFICATES: &str = "set [s3] ca_bundle, which serves https:// shards as well";
const CURL: Program = Program {
    commands: &[&[]],
    names_output: NO_OUTPUT,
    flags: &[
        "-s",
        "--silent",
        "-S",
        "--show-error",
        "-L",
        "--location",
        "-f",
        "--fail",
        "--fail-with-body",
        "--fail-early",
        "-g",
        "--globoff",
        "-#",
        "--progress-bar",
        "--no-progress-meter",
        "-v",
        "--verbose",
        "-N",
        "--no-buffer",
        "-4",
        "--ipv4",
        "-6",
        "--ipv6",
        "-0",
        "--http1.0",
        "--http1.1",
        "--http2",
        "--compressed",
        "--retry-all-errors",
        "--retry-connrefused",
        "--tcp-nodelay",
        "--tcp-fastopen",
        "--no-keepalive",
        "-q",
        "--disable",
        "--tlsv1.2",
        "--tlsv1.3",
        "--ssl-reqd",
    ],
    values: &[
        "--retry",
        "--retry-delay",
        "--retry-max-time",
        "--connect-timeout",
        "-m",
        "--max-time",
        "-y",
        "--speed-time",
        "-Y",
        "--speed-limit",
        "--limit-rate",
        "--max-redirs",
        "--keepalive-time",
        "--stderr",
    ],
    output: &["-o", "--output"],
    needs_output: false,
    refused: &[
        (&["-H", "--header"], HEADERS),
        (&["--oauth2-bearer"], HEADERS),
        (
            &["-b", "--cookie"],
            "set data.http_headers to the header \"Cookie\"",
        ),
        (
            &["-A", "--user-agent"],
            "set data.http_headers to the header \"User-Agent\"",
        ),
        (
            &["-e", "--referer"],
            "set data.http_headers to the header \"Referer\"",
        ),
        (
            &[
                "-u",
                "--user",
                "-n",
                "--netrc",
                "--netrc-file",
                "--netrc-optional",
            ],
            LOGIN,
        ),
        (
            &[
                "-x",
                "--proxy",
                "--socks5",
                "--socks5-hostname",
                "--preproxy",
            ],
            "set HTTPS_PROXY or HTTP_PROXY",
        ),
        (&["--noproxy"], "set NO_PROXY"),
        (&["-k", "--insecure", "--cacert", "--capath"], CERTIFICATES),
        (
            &["-E", "--cert", "--key"],
            "certificates of the client can't be sent",
        ),
        (
            &["-r", "--range", "-C", "--continue-at"],
            "a shard is read whole",
        ),
        (
            &["-O", "--remote-name", "-J", "--remote-header-name"],
            "a shard is read, not written to a file",
        ),
        (
            &[
                "-X",
                "--request",
                "-d",
                "--data",
                "-F",
                "--form",
                "-T",
                "--upload-file",
                "-I",
                "--head",
                "-G",
                "--get",
            ],
            "a shard is read by GET",
        ),
    ],
    schemes: &["http://", "https://"],
};
const WGET: Program = Program {
    commands: &[&[]],
    names_output: NO_OUTPUT,
    flags: &[
        "-q",
        "--quiet",
        "-nv",
        "--no-verbose",
        "-v",
        "--verbose",
        "--show-progress",
        "--retry-connrefused",
        "-4",
        "--inet4-only",
        "-6",
        "--inet6-only",
        "--https-only",
        "--no-hsts",
    ],
    values: &[
        "-t",
        "--tries",
        "-T",
        "--timeout",
        "--dns-timeout",
        "--connect-timeout",
        "--read-timeout",
        "-w",
        "--wait",
        "--waitretry",
        "--limit-rate",
        "--max-redirect",
        "--progress",
    ],
    output: &["-O", "--output-document"],
    needs_output: true,
    refused: &[
        (&["--header"], HEADERS),
        (
            &["-U", "--user-agent"],
            "set data.http_headers to the header \"User-Agent\"",
        ),
        (
            &["--referer"],
            "set data.http_headers to the header \"Referer\"",
        ),
        (
            &[
                "--user",
                "--password",
                "--http-user",
                "--http-password",
                "--ask-password",
            ],
            LOGIN,
        ),
        (
            &[
                "--no-check-certificate",
                "--ca-certificate",
                "--ca-directory",
            ],
            CERTIFICATES,
        ),
        (
            &["-c", "--continue", "--start-pos"],
            "a shard is read whole",
        ),
        (
            &["--post-data", "--post-file", "--method", "--body-data"],
            "a shard is read by GET",
        ),
        (&["--no-proxy"], "set NO_PROXY"),
    ],
    ..CURL
};
const GSUTIL: Program = Program {
    commands: &[&["cat"], &["cp"]],
    names_output: |command| command == "cp",
    flags: &["-q", "-m", "-D"],
    values: &[],
    refused: &[
        (&["-r"], "a shard is read whole"),
        (
            &["-u", "-i", "-o", "-h"],
            "a bucket is reached as [s3] says",
        ),
    ],
    schemes: &["gs://", "s3://"],
    ..AWS
};
const GCLOUD: Program = Program {
    commands: &[&["storage", "cat"], &["storage", "cp"]],
    names_output: |command| command == "cp",
    flags: &["-q", "--quiet", "--no-user-output-enabled"],
    refused: &[
        (&["-r", "--range"], "a shard is read whole"),
        (
            &[
                "--billing-project",
                "--project",
                "--account",
                "--impersonate-service-account",
            ],
            "a bucket is reached as [s3] says",
        ),
    ],
    ..GSUTIL
};
const CAT: Program = Program {
    commands: &[&[]],
    names_output: NO_OUTPUT,
    flags: &["-u"],
    values: &[],
    output: &[],
    needs_output: false,
    refused: &[],
    schemes: &[],
};

/// The options of the program called `name`; `None` if its commands are not read.
pub(super) fn program(name: &str) -> Option<&'static Program> {
    Some(match name {
        "aws" => &AWS,
        "s5cmd" => &S5CMD,
        "curl" => &CURL,
        "wget" => &WGET,
        "gsutil" => &GSUTIL,
        "gcloud" => &GCLOUD,
        "cat" => &CAT,
        _ => return None,
    })
}
