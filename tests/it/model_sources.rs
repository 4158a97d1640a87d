//! Models from the Hub and from S3, as a user names them: what is fetched, what is kept, and what is said when it can't be had.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::hub::{COMMIT, Hub, Manner, TAG};
use crate::support::{command, copy, teacher, text, texts};
use serde_json::Value;
use tempfile::TempDir;

const ID: &str = "someone/emoji-teacher";
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const VAE: &str = "vae/diffusion_pytorch_model.safetensors";

/// Caches and the Hub, as a user's environment would say.
struct Place {
    folder: TempDir,
    endpoint: String,
}

impl Place {
    fn new(endpoint: &str) -> Self {
        Self {
            folder: TempDir::new().unwrap(),
            endpoint: endpoint.to_owned(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = command(args);
        for name in [
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_HUB_OFFLINE",
            "HF_HUB_DOWNLOAD_TIMEOUT",
        ] {
            command.env_remove(name);
        }
        command
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HF_HOME", self.path("hf"))
            .env("XDG_CACHE_HOME", self.path("cache"));
        command
    }

    /// `precompute` over the first shard, with more settings; it needs a VAE and a text encoder and is done in a moment.
    fn encode(&self, output: &str, settings: &[&str]) -> Command {
        let output = format!("latents.output={}", text(&self.path(output)));
        let fixed = [
            "data.shards=s3://emoji/00000.tar",
            "data.max_samples=2",
            output.as_str(),
        ];
        let mut args = vec!["precompute", "-c", "configs/precompute-quickstart.toml"];
        for setting in fixed.iter().chain(settings) {
            args.extend(["-s", setting]);
        }
        self.command(&args)
    }

    /// `train` for two steps, without pictures.
    fn training(&self, output: &str, settings: &[&str]) -> Command {
        let output = format!("train.output={}", text(&self.path(output)));
        let fixed = [
            output.as_str(),
            "train.batch_size=2",
            "train.max_steps=2",
            "report.endpoint_captions=0",
            "report.grid=false",
            "validation.every=1000",
        ];
        let mut args = vec!["train", "-c", "configs/quickstart.toml"];
        for setting in fixed.iter().chain(settings) {
            args.extend(["-s", setting]);
        }
        self.command(&args)
    }

    /// Two steps of training; what they made, but for the clock.
    fn train(&self, output: &str, settings: &[&str]) -> Vec<Value> {
        done(self.training(output, settings));
        let lines = self.path(output).join("metrics.jsonl");
        let lines = std::fs::read_to_string(lines).unwrap();
        let mut lines: Vec<Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        for line in &mut lines {
            for key in ["seconds", "samples_per_second", "limiting_stage"] {
                line.as_object_mut().unwrap().remove(key);
            }
        }
        lines
    }

    fn snapshot(&self) -> PathBuf {
        self.path("hf/hub/models--someone--emoji-teacher/snapshots")
            .join(COMMIT)
    }
}

/// Runs a command that must succeed; what it said.
#[track_caller]
fn done(mut command: Command) -> String {
    ends(command.output().unwrap(), 0, &[])
}

/// Runs a command that must end with `code`, saying all of `words`.
#[track_caller]
fn refused(mut command: Command, code: i32, words: &[&str]) {
    let said = ends(command.output().unwrap(), code, words);
    let errors = said.lines().filter(|line| line.starts_with("error: "));
    assert_eq!(errors.count(), 1, "{said}");
}

#[track_caller]
fn ends(output: Output, code: i32, words: &[&str]) -> String {
    let (_, said) = texts(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    for word in words {
        assert!(said.contains(word), "should say {word:?}: {said}");
    }
    said
}

fn named(files: &[&str]) -> BTreeSet<(String, String)> {
    let files = files
        .iter()
        .map(|file| ((*file).to_owned(), COMMIT.to_owned()));
    files.collect()
}

const ENCODERS: [&str; 9] = [
    "model_index.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "vae/config.json",
    VAE,
];
const OTHERS: [&str; 3] = ["scheduler/scheduler_config.json", "unet/config.json", UNET];

#[test]
fn a_teacher_gives_the_same_run_from_everywhere() {
    let hub = Hub::start(ID, &teacher(), Manner::default());
    let place = Place::new(&hub.endpoint);
    // The data's buckets with one more, which holds the teacher.
    let buckets = place.path("buckets");
    copy(Path::new("assets/quickstart/emoji"), &buckets.join("emoji"));
    copy(&teacher(), &buckets.join("models/small/teacher"));
    let embedded = format!("s3.embedded_root={}", text(&buckets));

    let folder = place.train("folder", &[]);
    assert!(hub.asked().is_empty());
    assert_eq!(
        place.train("hub", &[&format!("model.teacher={ID}")]),
        folder
    );
    assert_eq!(hub.asked_files(), named(&[&ENCODERS[..], &OTHERS].concat()));
    let from_s3 = ["model.teacher=s3://models/small/teacher", &embedded];
    assert_eq!(place.train("s3", &from_s3), folder);
    assert!(hub.asked().is_empty());

    // A run knows where its teacher came from: of the Hub's commits this one, of the servers its own.
    let run: Value =
        serde_json::from_slice(&std::fs::read(place.path("hub/run.json")).unwrap()).unwrap();
    assert_eq!(
        (&run["teacher"], &run["revision"]),
        (&ID.into(), &COMMIT.into())
    );
    let draw = |model: &str, out: &str| {
        let (model, out) = (place.path(model), place.path(out));
        let args = [
            "sample",
            "--prompt",
            "red apple",
            "--steps",
            "1",
            "--model",
            text(&model),
            "--out",
            text(&out),
        ];
        done(place.command(&args));
        image::open(out).unwrap().into_rgb8()
    };
    let image = draw("folder", "folder.png");
    assert_eq!(draw("hub", "hub.png"), image);
    assert!(
        hub.asked().is_empty(),
        "a commit that is here needs no question"
    );
    assert_eq!(draw("s3", "s3.png"), image);

    // A run whose teacher is another one now says so when it goes on.
    let path = place.path("hub/run.json");
    let other = std::fs::read_to_string(&path).unwrap().replace(COMMIT, TAG);
    std::fs::write(&path, other).unwrap();
    let teacher = format!("model.teacher={ID}");
    let more = place.training("hub", &[&teacher, "train.max_steps=3"]);
    let said = done(more);
    let warning = format!("model.revision = \"{TAG}\" goes on with the same teacher");
    assert!(said.contains(&warning), "{said}");
}

#[test]
fn only_what_is_needed_is_fetched_and_only_once() {
    let hub = Hub::start(ID, &teacher(), Manner::default());
    let place = Place::new(&hub.endpoint);
    let teacher = format!("model.teacher={ID}");
    let said = done(place.encode("a", &[&teacher]));
    assert!(said.contains(&format!("fetching {ID}: {VAE}, ")), "{said}");
    assert_eq!(hub.asked_files(), named(&ENCODERS));
    // Links into Python's cache, which knows the branch.
    let vae = std::fs::read_link(place.snapshot().join(VAE)).unwrap();
    assert!(vae.starts_with("../../../blobs"), "{}", vae.display());
    let branch = place.path("hf/hub/models--someone--emoji-teacher/refs/main");
    assert_eq!(std::fs::read_to_string(&branch).unwrap(), COMMIT);

    done(place.encode("b", &[&teacher]));
    let asked = hub.asked();
    assert_eq!(
        asked.len(),
        1,
        "the branch is asked for, and nothing else: {asked:?}"
    );
    assert!(asked[0].path.ends_with("/revision/main") && asked[0].authorization.is_none());

    // Another command needs more of the same model.
    let out = place.path("apple.png");
    let args = [
        "sample",
        "--model",
        ID,
        "--prompt",
        "red apple",
        "--steps",
        "1",
        "--out",
        text(&out),
    ];
    done(place.command(&args));
    assert_eq!(hub.asked_files(), named(&OTHERS));

    // Without the Hub the cache is enough, whether that is known or found out.
    let mut offline = place.encode("c", &[&teacher]);
    offline
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_ENDPOINT", "http://127.0.0.1:9");
    done(offline);
    let mut cut_off = place.encode("d", &[&teacher]);
    cut_off.env("HF_ENDPOINT", "http://127.0.0.1:9");
    let said = done(cut_off);
    assert!(said.contains("taking what the cache has"), "{said}");
    assert!(hub.asked().is_empty());
    let mut offline = place.encode("e", &["model.teacher=someone/other"]);
    offline.env("HF_HUB_OFFLINE", "1");
    refused(offline, 1, &["someone/other", "HF_HUB_OFFLINE"]);
}

#[test]
fn revisions_are_the_hubs() {
    let hub = Hub::start(ID, &teacher(), Manner::default());
    let place = Place::new(&hub.endpoint);
    let teacher = format!("model.teacher={ID}");
    done(place.encode("a", &[&teacher, &format!("model.revision={TAG}")]));
    let asked = hub.asked();
    assert_eq!(asked[0].path, format!("/api/models/{ID}/revision/{TAG}"));
    done(place.encode("b", &[&teacher, &format!("model.revision={COMMIT}")]));
    assert!(hub.asked().is_empty());
    let wrong = place.encode("c", &[&teacher, "model.revision=v2"]);
    refused(wrong, 1, &[ID, "has no revision \"v2\"", &hub.endpoint]);
    let wrong = place.encode("d", &["model.teacher=someone/other"]);
    refused(
        wrong,
        1,
        &["someone/other", "no such model", "no folder of that name"],
    );
    let wrong = place.encode("e", &["model.teacher=no/such/folder"]);
    refused(wrong, 2, &["model.teacher", "no such folder", "user/model"]);
}

#[test]
fn a_token_opens_what_is_private_or_gated() {
    let private = Manner {
        token: Some("hf_right".to_owned()),
        ..Manner::default()
    };
    let gated = Manner {
        gated: true,
        ..private.clone()
    };
    let hub = Hub::start(ID, &teacher(), private.clone());
    let place = Place::new(&hub.endpoint);
    let teacher = format!("model.teacher={ID}");
    let licence = format!("accept its licence at {}/{ID}", hub.endpoint);
    let encode = |output: &str, token: Option<&str>| {
        let mut command = place.encode(output, &[&teacher]);
        if let Some(token) = token {
            command.env("HF_TOKEN", token);
        }
        command
    };
    for manner in [private, gated] {
        hub.behave(manner);
        let words = [ID, "HTTP 401", "private or gated", &licence, "set HF_TOKEN"];
        refused(encode("a", None), 1, &words);
        let words = [ID, "HTTP 403", &licence, "HF_TOKEN"];
        refused(encode("a", Some("hf_wrong")), 1, &words);
    }
    hub.asked();
    std::fs::create_dir_all(place.path("hf")).unwrap();
    std::fs::write(place.path("hf/token"), "hf_right\n").unwrap();
    done(encode("b", None));
    let asked = hub.asked();
    let right = Some("Bearer hf_right");
    assert!(
        asked.iter().all(|r| r.authorization.as_deref() == right),
        "{asked:?}"
    );
}

/// Bytes of the largest file that is not whole yet.
fn part_of(place: &Place) -> u64 {
    let blobs = place.path("hf/hub/models--someone--emoji-teacher/blobs");
    let entries = blobs.read_dir().into_iter().flatten().flatten();
    let parts = entries.filter(|entry| entry.path().extension().is_some_and(|e| e == "part"));
    // One may be renamed meanwhile.
    let sizes = parts.filter_map(|entry| Some(entry.metadata().ok()?.len()));
    sizes.max().unwrap_or(0)
}

#[test]
fn a_transfer_that_breaks_off_goes_on_and_is_checked() {
    let cut = Manner {
        cut: Some(VAE.to_owned()),
        ..Manner::default()
    };
    let hub = Hub::start(ID, &teacher(), cut);
    let teacher = format!("model.teacher={ID}");
    let place = Place::new(&hub.endpoint);
    done(place.encode("a", &[&teacher]));
    let bytes = |path: PathBuf| std::fs::read(path).unwrap();
    assert_eq!(
        bytes(place.snapshot().join(VAE)),
        bytes(crate::support::teacher().join(VAE))
    );
    let ranges: Vec<_> = hub.asked().into_iter().filter_map(|r| r.range).collect();
    let half = bytes(crate::support::teacher().join(VAE)).len() / 2;
    assert!(ranges.contains(&format!("bytes={half}-")), "{ranges:?}");

    // A process that is stopped ends at once and leaves half a file, which the next one completes.
    hub.behave(Manner {
        silent: Some(VAE.to_owned()),
        ..Manner::default()
    });
    let place = Place::new(&hub.endpoint);
    let mut stopped = place.encode("b", &[&teacher]);
    let mut child = stopped.stderr(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    // More than any of the small files has.
    while part_of(&place) < 500_000 {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing comes");
        std::thread::sleep(Duration::from_millis(20));
    }
    let process = child.id().to_string();
    let kill = Command::new("kill").args(["-TERM", &process]).status();
    assert!(kill.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(!place.snapshot().join(VAE).exists());
    let mut stalled = place.encode("b", &[&teacher]);
    stalled.env("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    refused(stalled, 1, &[ID, VAE, "sent nothing for 1 s"]);
    hub.asked();
    hub.behave(Manner {
        damaged: Some(VAE.to_owned()),
        ..Manner::default()
    });
    refused(
        place.encode("b", &[&teacher]),
        1,
        &[ID, VAE, "arrived damaged", "SHA-256"],
    );
    assert!(!place.snapshot().join(VAE).exists());
    hub.behave(Manner::default());
    done(place.encode("b", &[&teacher]));

    let nobody = Place::new("http://127.0.0.1:9");
    let words = [ID, "http://127.0.0.1:9", "5 attempts", "HF_ENDPOINT"];
    refused(nobody.encode("c", &[&teacher]), 1, &words);
    let nowhere = Place::new("hub.example");
    refused(
        nowhere.encode("c", &[&teacher]),
        2,
        &["HF_ENDPOINT", "http://"],
    );
}

#[test]
fn processes_that_want_the_same_model_share_the_work() {
    let hub = Hub::start(ID, &teacher(), Manner::default());
    let place = Place::new(&hub.endpoint);
    let teacher = format!("model.teacher={ID}");
    let children: Vec<_> = ["a", "b", "c"]
        .map(|output| {
            let mut command = place.encode(output, &[&teacher]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .into_iter()
        .collect();
    for child in children {
        ends(child.wait_with_output().unwrap(), 0, &[]);
    }
    let asked = hub.asked();
    let whole = format!("/{ID}/resolve/{COMMIT}/{VAE}");
    let downloads = asked
        .iter()
        .filter(|r| r.path == whole && r.range.as_deref() == Some("bytes=0-"));
    assert_eq!(downloads.count(), 1, "{asked:?}");
}

#[test]
fn another_vae_is_named_in_the_same_ways() {
    let folder = teacher();
    let hub = Hub::start("someone/vae", &folder.join("vae"), Manner::default());
    let place = Place::new(&hub.endpoint);
    done(place.encode("hub", &["model.vae=someone/vae"]));
    let asked = hub.asked_files();
    assert_eq!(
        asked,
        named(&["config.json", "diffusion_pytorch_model.safetensors"])
    );
    let whole = format!("model.vae={}", text(&folder));
    done(place.encode("folder", &[&whole]));
    done(place.encode("plain", &[]));
    let fingerprint = |output: &str| -> Value {
        let manifest = std::fs::read(place.path(output).join("manifest.json")).unwrap();
        serde_json::from_slice::<Value>(&manifest).unwrap()["fingerprint"].clone()
    };
    assert_eq!(fingerprint("hub"), fingerprint("plain"));
    assert_eq!(fingerprint("folder"), fingerprint("plain"));
}

#[test]
fn objects_of_s3_are_fetched_when_they_change() {
    let place = Place::new("http://127.0.0.1:9");
    let buckets = place.path("buckets");
    copy(Path::new("assets/quickstart/emoji"), &buckets.join("emoji"));
    copy(&teacher(), &buckets.join("models/teacher"));
    std::fs::write(
        buckets.join("models/teacher/model.ckpt"),
        "not to be fetched",
    )
    .unwrap();
    let embedded = format!("s3.embedded_root={}", text(&buckets));
    let encode = |output: &str, teacher: &str| {
        place.encode(output, &[&embedded, &format!("model.teacher={teacher}")])
    };
    let fetched = |output: &str| -> BTreeSet<String> {
        let said = done(encode(output, "s3://models/teacher/"));
        let lines = said.lines().filter_map(|line| {
            let line = line.strip_prefix("fetching s3://models/teacher/: ")?;
            Some(line.split_once(',').unwrap().0.to_owned())
        });
        lines.collect()
    };
    assert_eq!(fetched("a"), ENCODERS.map(str::to_owned).into());
    assert!(fetched("b").is_empty());
    let config = buckets.join("models/teacher/vae/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{text}\n")).unwrap();
    assert_eq!(fetched("c"), ["vae/config.json".to_owned()].into());

    refused(
        encode("d", "s3://models/other"),
        1,
        &["s3://models/other/", "nothing under"],
    );
    refused(
        encode("d", "s3://nobucket/x"),
        1,
        &["s3://nobucket/x/", "not found"],
    );
    std::fs::remove_file(buckets.join("models/teacher").join(VAE)).unwrap();
    refused(
        encode("d", "s3://models/teacher"),
        1,
        &["it has no weights", VAE],
    );
    refused(encode("d", "s3://"), 2, &["model.teacher", "has no bucket"]);
}
