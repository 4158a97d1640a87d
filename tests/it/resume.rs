//! What a run leaves in a folder and in S3, and how it goes on from there: other machines, other configurations, places that
//! refuse to be written to.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::cloud::Cloud;
use crate::support::cloud::proxy::{Fault, chance_writing, clean};
use crate::support::{command, texts};
use serde_json::Value;
use tempfile::TempDir;

/// Without the pictures that take time.
const SMALL: [&str; 4] = [
    "train.batch_size=2",
    "report.endpoint_captions=0",
    "report.grid=false",
    "validation.every=1000",
];

fn train(config: &Path, output: &str, more: &[&str]) -> Command {
    let output = format!("train.output={output}");
    let mut args = vec!["train", "-c", config.to_str().unwrap()];
    for setting in SMALL.iter().chain([&output.as_str()]).chain(more) {
        args.extend(["-s", setting]);
    }
    command(&args)
}

fn quickstart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/quickstart.toml")
}

/// Runs it to its end; what was said.
#[track_caller]
fn run(mut command: Command, code: i32) -> String {
    let output: Output = command.output().unwrap();
    let (_, said) = texts(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// Every line but what depends on the clock.
fn timeless(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            for key in ["seconds", "samples_per_second", "limiting_stage"] {
                line.as_object_mut().unwrap().remove(key);
            }
            line
        })
        .collect()
}

/// Every file of the finished student.
fn student(run: &Path) -> BTreeMap<String, Vec<u8>> {
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

fn checkpoints(run: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("state.json").is_file())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_run_in_s3_goes_on_elsewhere_as_one_in_a_folder_does() {
    let cloud = Cloud::start(chance_writing(1, 0.1, 1 << 20));
    let folder = TempDir::new().unwrap();
    let local = folder.path().join("local");
    run(
        train(
            &quickstart(),
            local.to_str().unwrap(),
            &["train.max_steps=6"],
        ),
        0,
    );
    let place = "s3://out/runs/first";
    let audit = format!("audit.dir={place}/audit");
    let on = |machine: &str, more: &[&str]| {
        let scratch = format!("train.scratch={}", folder.path().join(machine).display());
        let all = [&[scratch.as_str(), "s3.max_attempts=20"], more].concat();
        train(&cloud.config, place, &all)
    };
    let said = run(
        on(
            "one",
            &[
                "train.max_steps=4",
                "checkpoint.every=1",
                "checkpoint.keep=2",
                &audit,
                "audit.steps=1",
            ],
        ),
        0,
    );
    let remote = cloud.out().join("runs/first");
    assert!(
        said.contains("saved s3://out/runs/first/checkpoint-4"),
        "{said}"
    );
    assert_eq!(checkpoints(&remote), ["checkpoint-3", "checkpoint-4"]);
    for name in [
        "run.json",
        "config.toml",
        "metrics.jsonl",
        "skipped.jsonl",
        "loss.png",
        "unet/config.json",
        "audit/meta.json",
        "audit/step-000001.00.safetensors",
        "audit/unet_final/config.json",
    ] {
        assert!(remote.join(name).is_file(), "{name}");
    }
    // On another machine, past a damaged checkpoint, and over a half written one.
    let optimizer = remote.join("checkpoint-4/optimizer.safetensors");
    let mut bytes = std::fs::read(&optimizer).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&optimizer, bytes).unwrap();
    crate::support::copy(&remote.join("checkpoint-3"), &remote.join("checkpoint-5"));
    std::fs::remove_file(remote.join("checkpoint-5/state.json")).unwrap();
    let said = run(on("two", &["train.max_steps=5"]), 0);
    assert!(
        said.contains("passed over: s3://out/runs/first/checkpoint-4: damaged checkpoint: optimizer.safetensors"),
        "{said}"
    );
    assert!(
        said.contains("going on from s3://out/runs/first/checkpoint-3 (step 3)"),
        "{said}"
    );
    assert_eq!(timeless(&remote).len(), 5);
    // Named, from a folder of this machine's; and to the end.
    let named = format!("checkpoint.resume={place}/checkpoint-5/");
    let said = run(on("three", &[&named, "train.max_steps=6"]), 0);
    assert!(said.contains("checkpoint-5 (step 5)"), "{said}");
    assert_eq!(timeless(&remote), timeless(&local));
    assert!(student(&remote) == student(&local));
    let elsewhere = folder.path().join("elsewhere");
    let said = run(
        train(
            &cloud.config,
            elsewhere.to_str().unwrap(),
            &[&named, "train.max_steps=6"],
        ),
        0,
    );
    assert!(said.contains("going on from s3://out/"), "{said}");
    assert!(student(&elsewhere) == student(&local));
    // An upload whose first answer was lost is cleared away by the next start.
    cloud.proxy.follow(clean());
    run(on("four", &["checkpoint.resume=never"]), 2);
    assert_eq!(cloud.uploads(), 0);
}

#[test]
fn saving_beside_training_and_in_its_way_make_the_same_files() {
    let folder = TempDir::new().unwrap();
    let made = |name: &str, more: &[&str]| {
        let place = folder.path().join(name);
        let all = [&["train.max_steps=4", "checkpoint.every=2"], more].concat();
        let said = run(train(&quickstart(), place.to_str().unwrap(), &all), 0);
        assert_eq!(said.matches("saved ").count(), 2, "{said}");
        place
    };
    let beside = made("beside", &[]);
    let between = made("between", &["checkpoint.background=false"]);
    for name in [
        "checkpoint-2/unet/diffusion_pytorch_model.safetensors",
        "checkpoint-2/unet_target/diffusion_pytorch_model.safetensors",
        "checkpoint-2/optimizer.safetensors",
        "checkpoint-4/optimizer.safetensors",
    ] {
        let read = |run: &Path| std::fs::read(run.join(name)).unwrap();
        assert!(read(&beside) == read(&between), "{name}");
    }
    assert_eq!(timeless(&beside), timeless(&between));
}

#[test]
fn a_configuration_that_contradicts_the_checkpoint_is_refused_with_both_values() {
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("run");
    let go = |more: &[&str]| train(&quickstart(), place.to_str().unwrap(), more);
    run(go(&["train.max_steps=1"]), 0);
    let said = run(
        go(&[
            "train.max_steps=2",
            "image.resolution=32",
            "train.seed=7",
            "optimizer.beta2=0.99",
        ]),
        2,
    );
    for words in [
        "checkpoint-1 is of a run with another configuration",
        "image.resolution was 64 and is 32",
        "train.seed was 453645634 and is 7",
        "optimizer.beta2 was 0.999 and is 0.99",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let said = run(
        go(&[
            "train.max_steps=2",
            "data.decode_threads=1",
            "checkpoint.every=7",
            "validation.prompts=[\"red apple\"]",
            "optimizer.learning_rate=1e-5",
        ]),
        0,
    );
    assert!(
        said.contains("warning: optimizer.learning_rate was 0.0003 and is 0.00001"),
        "{said}"
    );
}

#[test]
fn s3_that_refuses_for_a_while_costs_a_checkpoint_and_nothing_else() {
    let cloud = Cloud::start(Box::new(|head, _| {
        let refused = head.starts_with("put ") && head.contains("/checkpoint-2/");
        refused.then_some(Fault::Status(403, "AccessDenied"))
    }));
    let place = "s3://out/run";
    let more = ["train.max_steps=6", "checkpoint.every=2"];
    let said = run(train(&cloud.config, place, &more), 0);
    assert!(
        said.contains("warning: checkpoint-2 could not be saved: s3://out/run/checkpoint-2/"),
        "{said}"
    );
    assert!(
        said.contains("s3:PutObject") && said.contains("none stands yet"),
        "{said}"
    );
    let remote = cloud.out().join("run");
    assert_eq!(checkpoints(&remote), ["checkpoint-4", "checkpoint-6"]);
    assert_eq!(timeless(&remote).len(), 6);

    // To the end.
    cloud.proxy.follow(Box::new(|head, _| {
        head.starts_with("put ")
            .then_some(Fault::Status(403, "AccessDenied"))
    }));
    let more = ["train.max_steps=8", "checkpoint.every=2"];
    let said = run(train(&cloud.config, place, &more), 1);
    assert!(
        said.contains("error: the state of step 8 could not be saved")
            && said.contains("checkpoint-6 stands"),
        "{said}"
    );
    cloud.proxy.follow(clean());
    let said = run(train(&cloud.config, place, &more), 0);
    assert!(said.contains("checkpoint-6 (step 6)"), "{said}");
    assert_eq!(timeless(&remote).len(), 8);
    // And one that is not there at all.
    let said = run(train(&cloud.config, "s3://nobody/run", &more), 1);
    assert!(said.contains("s3://nobody/run"), "{said}");
}

/// The same command under a limit on the size of files, which refuses as a full disk does.
fn limited(command: &Command, kilobytes: u32) -> Command {
    let mut shell = Command::new("bash");
    let limit = format!("trap '' XFSZ; ulimit -f {kilobytes}; exec \"$0\" \"$@\"");
    shell
        .args(["-c", &limit])
        .arg(command.get_program())
        .args(command.get_args())
        .current_dir(command.get_current_dir().unwrap());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
}

#[test]
fn a_disk_that_takes_no_more_ends_a_run_only_when_it_has_to() {
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("run");
    let more = ["train.max_steps=4", "checkpoint.every=2"];
    let whole = train(&quickstart(), place.to_str().unwrap(), &more);
    let said = run(limited(&whole, 3000), 1);
    assert!(
        said.contains("warning: checkpoint-2 could not be saved") && said.contains("ulimit -f"),
        "{said}"
    );
    assert!(
        said.contains("error: the state of step 4 could not be saved")
            && said.contains("no checkpoint stands"),
        "{said}"
    );
    assert_eq!(timeless(&place).len(), 4);
    let names: Vec<String> = std::fs::read_dir(&place)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("checkpoint") || name.starts_with(".writing"))
        .collect();
    assert_eq!(names, [""; 0]);
    run(whole, 0);
    assert_eq!(timeless(&place).len(), 4);
}

#[test]
fn a_folder_that_becomes_read_only_is_said_and_harms_nothing() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("run");
    std::fs::create_dir(&place).unwrap();
    let mode = |path: &Path, mode: u32| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    };
    mode(folder.path(), 0o755);
    mode(&place, 0o777);
    let more = ["train.max_steps=24", "checkpoint.every=7"];
    let whole = || train(&quickstart(), place.to_str().unwrap(), &more);
    let mut command = whole();
    // Root may write anywhere.
    if std::fs::metadata(folder.path()).unwrap().uid() == 0 {
        command.uid(65534).gid(65534);
    }
    let said = folder.path().join("said");
    let child = command
        .stderr(std::fs::File::create(&said).unwrap())
        .spawn();
    let Ok(mut child) = child else {
        eprintln!("nobody may run the binary here: not tested");
        return;
    };
    let lines = || std::fs::read_to_string(place.join("metrics.jsonl")).unwrap_or_default();
    while lines().is_empty() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    mode(&place, 0o555);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let said = std::fs::read_to_string(said).unwrap();
    assert!(
        said.contains("could not be saved") && said.contains("Permission denied"),
        "{said}"
    );
    assert!(said.contains("error: the state of step 24"), "{said}");
    assert_eq!(timeless(&place).len(), 24);
    mode(&place, 0o777);
    let half = std::fs::read_dir(&place).unwrap().flatten();
    let half = half.filter(|entry| entry.file_name().to_string_lossy().starts_with(".writing"));
    assert_eq!(half.count(), 0);
    run(whole(), 0);
    assert_eq!(timeless(&place).len(), 24);
}

#[test]
fn lines_that_a_full_disk_refused_are_written_when_it_takes_them() {
    // The limit is below what six lines take, and is above the other files that are written before the first checkpoint.
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("run");
    let more = ["train.max_steps=30", "checkpoint.every=1000"];
    let whole = train(&quickstart(), place.to_str().unwrap(), &more);
    let said = run(limited(&whole, 4), 1);
    assert!(
        said.contains("metrics.jsonl") && said.contains("the lines are kept"),
        "{said}"
    );
    // No line is torn.
    let text = std::fs::read_to_string(place.join("metrics.jsonl")).unwrap();
    assert!(text.ends_with('\n') && text.lines().count() > 5, "{text}");
    assert_eq!(timeless(&place).len(), text.lines().count());
}
