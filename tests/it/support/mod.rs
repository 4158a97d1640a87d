//! Runs the binary as a user does, from the repository's root.

pub(crate) mod cloud;
pub(crate) mod hub;
pub(crate) mod receiver;
pub(crate) mod watched;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device};
use coffey::models::{Weights, save_model};
use serde_json::Value;
use tempfile::TempDir;

/// The command with no scheduler's or cloud's variables set.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coffey"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(args);
    for name in [
        "RANK",
        "WORLD_SIZE",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_PROFILE",
    ] {
        command.env_remove(name);
    }
    // Found, and not valid anywhere: the tests' servers ask for none.
    command
        .env("AWS_ACCESS_KEY_ID", "test")
        .env("AWS_SECRET_ACCESS_KEY", "test")
        .env("AWS_REGION", "us-east-1");
    command
}

/// Standard output and standard error as text.
pub(crate) fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// Runs a command that must succeed; its standard output.
#[track_caller]
pub(crate) fn succeed(args: &[&str]) -> String {
    let output = command(args).output().unwrap();
    let (out, err) = texts(&output);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {err}");
    out
}

/// Runs a command that must end with `code` and one message that says every one of `words`.
#[track_caller]
pub(crate) fn refuse(code: i32, args: &[&str], words: &[&str]) -> String {
    let output = command(args).output().unwrap();
    let (_, err) = texts(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {err}");
    assert_eq!(
        err.lines()
            .filter(|line| line.starts_with("error: "))
            .count(),
        1,
        "{args:?}: {err}"
    );
    assert!(!err.contains("panicked"), "{err}");
    for word in words {
        assert!(err.contains(word), "{args:?} should say {word:?}: {err}");
    }
    err
}

/// Runs a script of `tests/reference` with the Python that `COFFEY_PYTHON` names; without one, says that it did not and
/// returns false.
#[track_caller]
pub(crate) fn python(script: &str, args: &[&Path]) -> bool {
    let Some(python) = std::env::var_os("COFFEY_PYTHON") else {
        eprintln!("COFFEY_PYTHON is not set: {script} was not run");
        return false;
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = folder.join("tests/reference").join(script);
    let output = Command::new(python)
        .current_dir(folder)
        .arg(&script)
        .args(args)
        .output()
        .unwrap();
    let (out, err) = texts(&output);
    assert!(
        output.status.success(),
        "{}:\n{out}\n{err}",
        script.display()
    );
    true
}

/// Copies a folder with all that is in it.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// A path for a command line.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The quickstart's teacher.
pub(crate) fn teacher() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/quickstart/teacher")
}

/// A copy of the teacher whose `part` lacks a tensor.
pub(crate) fn damaged(folder: &TempDir, part: &str, stem: &str, tensor: &str) -> PathBuf {
    let pipeline = folder.path().join("damaged");
    copy(&teacher(), &pipeline);
    let part = pipeline.join(part);
    let mut tensors = Weights::load(&part, stem, DType::F32, &Device::Cpu)
        .unwrap()
        .into_tensors();
    tensors.remove(tensor).unwrap();
    let config: Value =
        serde_json::from_str(&std::fs::read_to_string(part.join("config.json")).unwrap()).unwrap();
    save_model(&part, stem, config.as_object().unwrap(), &tensors).unwrap();
    pipeline
}
