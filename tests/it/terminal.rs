//! Standard output, standard error and the log file, on terminals, pipes and a full disk.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::support::{PRECOMPUTE, args, command, messages, refused, repository, run, says, text};

/// The first half of a shard of the quickstart: reading it gives warnings.
fn broken_shard(folder: &TempDir) -> String {
    let tar = std::fs::read(repository("assets/quickstart/emoji/00000.tar")).unwrap();
    let shard = folder.path().join("broken.tar");
    std::fs::write(&shard, &tar[..40_960 + 100]).unwrap();
    text(&shard).to_owned()
}

/// A `precompute` of [`broken_shard`] to `latents` in `folder`.
fn precompute(folder: &TempDir) -> Vec<String> {
    let settings = [
        format!("data.shards={:?}", broken_shard(folder)),
        "data.max_bad_fraction=1".to_owned(),
        format!("latents.output={}", text(&folder.path().join("latents"))),
    ];
    args("precompute", PRECOMPUTE, settings)
}

/// Everything that `command` shows on a terminal, by `script` of util-linux.
fn shown_on_terminal(command: &Command, term: Option<&str>) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted: Vec<_> = words
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &quoted.join(" ")]);
    script.arg("/dev/null").env("NO_COLOR", "1");
    script.current_dir(command.get_current_dir().unwrap());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => script.env(name, value),
            None => script.env_remove(name),
        };
    }
    match term {
        Some(term) => script.env("TERM", term),
        None => script.env_remove("TERM"),
    };
    run(script, 0).0.replace("\r\n", "\n")
}

/// The messages of [`precompute`] from its first to its last.
const MESSAGES: [&str; 4] = [
    "encoding with assets/quickstart/teacher into ",
    "WARN broken shard: the samples before the fault are used",
    "warning: ",
    "1 shard, 1 of them new, in ",
];
const PROGRESS_LINE: &str = "\n1/1 shards · ";

#[test]
fn terminal_that_can_not_move_its_cursor_gets_plain_lines() {
    for term in [None, Some("dumb")] {
        let folder = TempDir::new().unwrap();
        let shown = shown_on_terminal(&command(&precompute(&folder)), term);
        says(&shown, &MESSAGES);
        says(&shown, &[PROGRESS_LINE]);
        assert!(!shown.contains('\x1b'), "{term:?}: {shown:?}");
    }
}

#[test]
fn terminal_gets_bar_and_messages_without_colours() {
    let folder = TempDir::new().unwrap();
    let shown = shown_on_terminal(&command(&precompute(&folder)), Some("xterm"));
    says(&shown, &MESSAGES);
    says(&shown, &["\x1b[2K", " 0/1 shards"]);
    assert!(!shown.contains(PROGRESS_LINE), "{shown:?}");
    // A bar moves the cursor and clears its line; `m` ends the codes of colours.
    let codes = shown.split("\x1b[").skip(1);
    let mut ends =
        codes.map(|code| code.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';'));
    assert!(!ends.any(|end| end.starts_with('m')), "{shown:?}");

    let help = shown_on_terminal(&command(&["--help"]), Some("xterm"));
    assert!(help.contains("Usage: coffey") && !help.contains('\x1b'));
}

#[test]
fn pipe_and_log_file_get_the_same_plain_lines() {
    let folder = TempDir::new().unwrap();
    let log = folder.path().join("coffey.log");
    let mut arguments = precompute(&folder);
    arguments.extend(["--log-file", text(&log)].map(str::to_owned));
    let shown = messages(command(&arguments));
    says(&shown, &MESSAGES);
    says(&shown, &[PROGRESS_LINE]);
    assert!(!shown.contains('\x1b'), "{shown:?}");

    let logged = std::fs::read_to_string(&log).unwrap();
    let mut lines = Vec::new();
    for line in logged.lines() {
        let (time, line) = line.split_once(' ').unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
        lines.push(line);
    }
    let version = concat!("coffey ", env!("CARGO_PKG_VERSION"));
    assert_eq!(lines.first(), Some(&version));
    assert_eq!(lines[1..], shown.lines().collect::<Vec<_>>());

    // A terminal with a bar leaves the plain lines to the file, which grows.
    std::fs::remove_dir_all(folder.path().join("latents")).unwrap();
    shown_on_terminal(&command(&arguments), Some("xterm"));
    let both = std::fs::read_to_string(&log).unwrap();
    let second = both.strip_prefix(&logged).unwrap();
    says(second, &MESSAGES);
    says(second, &["Z 1/1 shards · "]);
    assert!(!second.contains('\x1b'), "{second:?}");
}

#[test]
fn log_file_gets_the_error_and_must_open_before_the_work() {
    let folder = TempDir::new().unwrap();
    let log = folder.path().join("coffey.log");
    let arguments = ["inspect", "none.tar", "--log-file", text(&log)];
    let error = refused(command(&arguments), 1, &["none.tar"]);
    let logged = std::fs::read_to_string(&log).unwrap();
    let last = error.lines().last().unwrap();
    assert!(logged.ends_with(&format!("Z {last}\n")), "{logged}");

    let nowhere = folder.path().join("none").join("coffey.log");
    let mut arguments = precompute(&folder);
    arguments.extend(["--log-file", text(&nowhere)].map(str::to_owned));
    let words = [
        "--log-file ",
        text(&nowhere),
        "can't be opened: No such file",
    ];
    refused(command(&arguments), 2, &words);
    assert!(!folder.path().join("latents").exists());

    let full = ["inspect", "none.tar", "--log-file", "/dev/full"];
    let error = refused(command(&full), 1, &["none.tar"]);
    let warning = "warning: --log-file /dev/full can't be written: No space left on device";
    assert_eq!(error.matches(warning).count(), 1, "{error}");
}

/// Commands with a result on standard output.
fn results(folder: &TempDir) -> Vec<Vec<String>> {
    let shard = broken_shard(folder);
    let config = format!("data.shards={shard:?}");
    let inspect = ["inspect", &shard].map(str::to_owned).to_vec();
    let inspect_json = ["inspect", &shard, "--json"].map(str::to_owned).to_vec();
    let mut bench = args("bench", PRECOMPUTE, [&config]);
    bench.extend(["--samples", "2"].map(str::to_owned));
    let mut check = args("check", PRECOMPUTE, [&config]);
    check.push("--print-config".to_owned());
    let mut all = vec![inspect, inspect_json, bench, check, precompute(folder)];
    let short = [
        "--help",
        "--version",
        "help train",
        "train --help",
        "completions bash",
        "man",
        "init quickstart --out -",
    ];
    all.extend(short.map(|line| line.split(' ').map(str::to_owned).collect()));
    all
}

#[test]
fn result_that_can_not_be_written_is_a_failure() {
    let folder = TempDir::new().unwrap();
    for arguments in results(&folder) {
        let mut command = command(&arguments);
        command.stdout(File::options().write(true).open("/dev/full").unwrap());
        refused(
            command,
            1,
            &["error: standard output: No space left on device"],
        );
    }
}

#[test]
fn closed_pipe_is_quiet() {
    let folder = TempDir::new().unwrap();
    for arguments in results(&folder) {
        let mut command = command(&arguments);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        command.stdout(writer);
        let error = messages(command);
        assert!(!error.contains("error"), "{arguments:?}: {error}");
    }
}

/// A command that runs in `folder`.
fn command_in(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = command(arguments);
    command.current_dir(folder);
    command
}

#[test]
fn init_writes_a_configuration_that_loads() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("coffey.toml");
    let init = |arguments: &[&str]| {
        let arguments = [&["init"], arguments].concat();
        command_in(folder.path(), &arguments)
    };
    refused(
        init(&[]),
        2,
        &["init needs a kind:\n  quickstart ", "\n  precompute-sd15 "],
    );
    run(init(&["sd3"]), 2);

    let (out, err) = run(init(&["train-from-latents"]), 0);
    assert_eq!(out, "coffey.toml\n");
    let next = "`coffey check -c coffey.toml` and `coffey train -c coffey.toml`";
    says(&err, &[next]);
    let written = std::fs::read_to_string(&file).unwrap();
    says(
        &written,
        &[next, "# Trains Stable Diffusion 1.5 on the latent shards"],
    );
    let print = ["check", "-c", "coffey.toml", "--print-config"];
    let (config, _) = run(command_in(folder.path(), &print), 0);
    says(&config, &["teacher = \"stable-diffusion-v1-5/"]);

    refused(init(&["quickstart"]), 2, &["coffey.toml exists; --force "]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), written);
    let (_, err) = run(init(&["quickstart", "--force"]), 0);
    says(
        &err,
        &["warning: there is no folder assets/quickstart here"],
    );
    assert!(std::fs::read_to_string(&file).unwrap() != written);
    run(init(&["quickstart", "--out", "new/below/a.toml"]), 0);
    assert!(folder.path().join("new/below/a.toml").is_file());
    for (out, words) in [
        ("new", "--out new: it is a folder"),
        ("coffey.toml/a.toml", "can't create coffey.toml: "),
        ("s3://bucket/a.toml", "--out takes a local file"),
    ] {
        for more in [&[][..], &["--force"]] {
            let arguments = [&["quickstart", "--out", out], more].concat();
            refused(init(&arguments), 2, &[words]);
        }
    }
    assert!(!folder.path().join("s3:").exists());

    let (out, _) = run(init(&["precompute-sd15", "--out", "-"]), 0);
    says(&out, &["`coffey precompute -c coffey.toml`", "[latents]"]);
}

#[test]
fn completions_and_manual_pages_have_every_command() {
    let folder = TempDir::new().unwrap();
    let script = folder.path().join("coffey.bash");
    let (out, _) = run(command(&["completions", "bash"]), 0);
    says(&out, &["precompute", "--log-file", "sd15-laion"]);
    std::fs::write(&script, out).unwrap();
    let parsed = Command::new("bash").arg("-n").arg(&script).status();
    assert!(parsed.unwrap().success());

    let (page, _) = run(command(&["man"]), 0);
    says(
        &page,
        &[
            ".TH coffey 1",
            "coffey\\-precompute(1)",
            "Exit codes: 0 done",
        ],
    );
    let pages = folder.path().join("man1");
    run(command(&["man", "--out", text(&pages)]), 0);
    let (file, no_folder) = (text(&script), "it is a file; name a folder");
    refused(command(&["man", "--out", file]), 2, &[no_folder]);
    for page in ["coffey.1", "coffey-train.1", "coffey-init.1"] {
        assert!(pages.join(page).is_file(), "{page}");
    }
}
