//! Runs the binary as a user does, from the repository's root.

pub(crate) mod cloud;
pub(crate) mod hub;
pub(crate) mod mpi;
pub(crate) mod network;
pub(crate) mod receiver;
pub(crate) mod watched;
pub(crate) mod xl;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use coffey::models::{Weights, save_model};
use serde_json::Value;
use tempfile::TempDir;

/// The configuration of most runs.
pub(crate) const QUICKSTART: &str = "configs/quickstart.toml";
pub(crate) const QUICKSTART_LORA: &str = "configs/quickstart-lora.toml";
pub(crate) const PRECOMPUTE: &str = "configs/precompute-quickstart.toml";
/// Settings that leave out the pictures, which take time.
pub(crate) const NO_PICTURES: [&str; 3] = [
    "report.endpoint_captions=0",
    "report.grid=false",
    "validation.every=1000",
];

/// A path in the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The path of the quickstart's configuration.
pub(crate) fn quickstart() -> PathBuf {
    repository(QUICKSTART)
}

/// The quickstart's teacher.
pub(crate) fn teacher() -> PathBuf {
    repository("assets/quickstart/teacher")
}

/// A path for a command line.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The arguments `COMMAND -c CONFIG -s SETTING…`.
pub(crate) fn args<S: AsRef<str>>(
    command: &str,
    config: &str,
    settings: impl IntoIterator<Item = S>,
) -> Vec<String> {
    let mut args = [command, "-c", config].map(str::to_owned).to_vec();
    for setting in settings {
        args.extend(["-s".to_owned(), setting.as_ref().to_owned()]);
    }
    args
}

/// The command without the variables of schedulers and clouds.
pub(crate) fn command(args: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coffey"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(args);
    for name in [
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "PMI_RANK",
        "PMI_SIZE",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_ARRAY_TASK_ID",
        "JOB_COMPLETION_INDEX",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_PROFILE",
    ] {
        command.env_remove(name);
    }
    // Credentials that only the tests' servers accept.
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

/// Runs a command that must end with `code` and without a panic; returns its standard output and standard error.
#[track_caller]
pub(crate) fn run(mut command: Command, code: i32) -> (String, String) {
    let output = command.output().unwrap();
    let (out, err) = texts(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {out}{err}");
    assert!(!err.contains("panicked"), "{err}");
    (out, err)
}

/// Runs a command that must succeed; returns its messages on standard error.
#[track_caller]
pub(crate) fn messages(command: Command) -> String {
    run(command, 0).1
}

/// Every file of the finished student.
pub(crate) fn student(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for folder in ["unet", "unet_target"] {
        for entry in std::fs::read_dir(run.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("{folder}/{}", path.file_name().unwrap().to_string_lossy());
            files.insert(name, std::fs::read(path).unwrap());
        }
    }
    assert_eq!(files.len(), 4);
    files
}

/// Runs a command line that must succeed; returns its standard output.
#[track_caller]
pub(crate) fn succeed(args: &[impl AsRef<OsStr>]) -> String {
    run(command(args), 0).0
}

/// The same with JSON as standard output.
#[track_caller]
pub(crate) fn succeed_json(args: &[impl AsRef<OsStr>]) -> Value {
    serde_json::from_str(&succeed(args)).unwrap()
}

/// Runs a command that must end with `code` and one error message that contains all `words`; returns its standard error.
#[track_caller]
pub(crate) fn refused(command: Command, code: i32, words: &[&str]) -> String {
    let (_, err) = run(command, code);
    let errors = err.lines().filter(|line| line.starts_with("error: "));
    assert_eq!(errors.count(), 1, "{err}");
    says(&err, words);
    err
}

/// The same for a command line.
#[track_caller]
pub(crate) fn refuse(code: i32, args: &[impl AsRef<OsStr> + Debug], words: &[&str]) -> String {
    refused(command(args), code, words)
}

/// Asserts that a text contains all `words`.
#[track_caller]
pub(crate) fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "should contain {word:?}: {text}");
    }
}

/// Sends SIGTERM.
pub(crate) fn terminate(process: &Child) {
    send(process, "TERM");
}

/// Sends the signal of this name.
pub(crate) fn send(process: &Child, signal: &str) {
    let id = process.id().to_string();
    let kill = Command::new("kill").args(["-s", signal, &id]).status();
    assert!(kill.unwrap().success());
}

/// The peak resident memory of a command, read shortly before its end. Bytes.
pub(crate) fn peak_memory(args: &[&str]) -> u64 {
    let mut child = command(args).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let ended = loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(kilobytes.unwrap_or(0) * 1024);
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(ended.success());
    peak
}

/// A variable that a test in a module `needs_python` or `needs_browser` needs.
#[track_caller]
pub(crate) fn needed(variable: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(value) => value.into(),
        None => panic!("{variable} is not set; README.md says how to run this test"),
    }
}

/// Runs a script of `tests/reference` with the Python that `COFFEY_PYTHON` names.
#[track_caller]
pub(crate) fn python(script: &str, args: &[impl AsRef<OsStr>]) {
    let mut command = Command::new(needed("COFFEY_PYTHON"));
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .arg(repository("tests/reference").join(script))
        .args(args);
    let output = command.output().unwrap();
    let (out, err) = texts(&output);
    assert!(output.status.success(), "{script}:\n{out}\n{err}");
}

/// Copies a folder with everything in it.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The lines of a run's `metrics.jsonl`.
pub(crate) fn records(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The lines of `metrics.jsonl` without the values that depend on the clock.
pub(crate) fn timeless(run: &Path) -> Vec<Value> {
    let mut lines = records(run);
    for line in &mut lines {
        for key in ["seconds", "samples_per_second", "limiting_stage"] {
            line.as_object_mut().unwrap().remove(key);
        }
    }
    lines
}

/// The number of steps in a run's `metrics.jsonl`; 0 before the file is there.
pub(crate) fn steps_made(run: &Path) -> usize {
    std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// Waits until a run has made `steps` steps.
pub(crate) fn wait_for_steps(run: &Path, steps: usize) {
    let begun = Instant::now();
    while steps_made(run) < steps {
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "no step within two minutes"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Flips a bit of a file's last byte.
pub(crate) fn damage(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(file, bytes).unwrap();
}

/// A copy of the teacher in which `part` lacks a tensor.
pub(crate) fn without_tensor(folder: &TempDir, part: &str, stem: &str, tensor: &str) -> PathBuf {
    changed_teacher(folder, part, stem, |tensors| {
        tensors.remove(tensor).unwrap();
    })
}

/// A copy of the teacher with other weights of `part`, as f32.
pub(crate) fn changed_teacher(
    folder: &TempDir,
    part: &str,
    stem: &str,
    change: impl FnOnce(&mut BTreeMap<String, Tensor>),
) -> PathBuf {
    let pipeline = folder.path().join("changed");
    copy(&teacher(), &pipeline);
    let part = pipeline.join(part);
    let mut tensors = Weights::load(&part, stem, DType::F32, &Device::Cpu)
        .unwrap()
        .into_tensors();
    change(&mut tensors);
    let config: Value =
        serde_json::from_str(&std::fs::read_to_string(part.join("config.json")).unwrap()).unwrap();
    save_model(&part, stem, config.as_object().unwrap(), &tensors).unwrap();
    pipeline
}

/// Gives the tokenizer of a pipeline the form of transformers 5: `tokenizer.json` in place of vocabulary and merges.
pub(crate) fn save_tokenizer_file(pipeline: &Path) {
    let folder = pipeline.join("tokenizer");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let vocab: Value = serde_json::from_str(&read("vocab.json")).unwrap();
    let merges = read("merges.txt");
    let merges = merges.lines().filter(|line| !line.starts_with("#version"));
    let merges: Vec<Vec<&str>> = merges.map(|line| line.split(' ').collect()).collect();
    let added = ["<|startoftext|>", "<|endoftext|>"].map(|token| {
        serde_json::json!({
            "id": vocab[token], "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true
        })
    });
    let words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
    let file = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<|endoftext|>", "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab,
            "merges": merges},
    });
    std::fs::write(folder.join("tokenizer.json"), file.to_string()).unwrap();
    for name in ["vocab.json", "merges.txt", "special_tokens_map.json"] {
        std::fs::remove_file(folder.join(name)).unwrap();
    }
}
