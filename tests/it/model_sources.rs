//! Models from the Hub, from S3 and from folders: the files that are fetched and cached, and the refusals.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::hub::{Behavior, COMMIT, Hub, TAG, User};
use crate::support::{
    self, NO_PICTURES, PRECOMPUTE, QUICKSTART, args, copy, messages, refused, teacher, terminate,
    text, timeless,
};

const ID: &str = "someone/emoji-teacher";
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const VAE: &str = "vae/diffusion_pytorch_model.safetensors";

/// `precompute` of two samples, which needs a VAE and a text encoder and takes a moment.
fn encode(user: &User, output: &str, settings: &[&str]) -> Command {
    let output = format!("latents.output={}", text(&user.path(output)));
    let own = [
        "data.shards=s3://emoji/00000.tar",
        "data.max_samples=2",
        output.as_str(),
    ];
    user.command(&args("precompute", PRECOMPUTE, own.iter().chain(settings)))
}

/// `train` for two steps, without pictures.
fn training(user: &User, output: &str, settings: &[&str]) -> Command {
    let output = format!("train.output={}", text(&user.path(output)));
    let own = [output.as_str(), "train.batch_size=2", "train.max_steps=2"];
    let all = [&own[..], &NO_PICTURES, settings].concat();
    user.command(&args("train", QUICKSTART, all))
}

/// Trains for two steps; returns their records without the clock's values.
fn train(user: &User, output: &str, settings: &[&str]) -> Vec<Value> {
    messages(training(user, output, settings));
    let records = timeless(&user.path(output));
    assert_eq!(records.len(), 2);
    records
}

/// The folder of the commit in the user's cache.
fn snapshot(user: &User) -> PathBuf {
    user.path("hf/hub/models--someone--emoji-teacher/snapshots")
        .join(COMMIT)
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
fn teacher_from_folder_hub_or_s3_gives_same_run() {
    let hub = Hub::start(ID, &teacher(), Behavior::default());
    let user = User::new(&hub.endpoint);
    // The bucket of the data, and a bucket with the teacher.
    let buckets = user.path("buckets");
    copy(Path::new("assets/quickstart/emoji"), &buckets.join("emoji"));
    copy(&teacher(), &buckets.join("models/small/teacher"));
    let embedded = format!("s3.embedded_root={}", text(&buckets));

    let folder = train(&user, "folder", &[]);
    assert!(hub.asked().is_empty());
    assert_eq!(
        train(&user, "hub", &[&format!("model.teacher={ID}")]),
        folder
    );
    assert_eq!(hub.asked_files(), named(&[&ENCODERS[..], &OTHERS].concat()));
    let from_s3 = ["model.teacher=s3://models/small/teacher", &embedded];
    assert_eq!(train(&user, "s3", &from_s3), folder);
    assert!(hub.asked().is_empty());

    // `run.json` names the commit of the Hub and the S3 server of the teacher.
    let run: Value =
        serde_json::from_slice(&std::fs::read(user.path("hub/run.json")).unwrap()).unwrap();
    assert_eq!(
        (&run["teacher"], &run["revision"]),
        (&ID.into(), &COMMIT.into())
    );
    let draw = |model: &str, out: &str| {
        let (model, out) = (user.path(model), user.path(out));
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
        messages(user.command(&args));
        image::open(out).unwrap().into_rgb8()
    };
    let image = draw("folder", "folder.png");
    assert_eq!(draw("hub", "hub.png"), image);
    assert!(
        hub.asked().is_empty(),
        "a cached commit was requested again"
    );
    assert_eq!(draw("s3", "s3.png"), image);

    // A resumed run warns when its teacher has changed.
    let path = user.path("hub/run.json");
    let other = std::fs::read_to_string(&path).unwrap().replace(COMMIT, TAG);
    std::fs::write(&path, other).unwrap();
    let teacher = format!("model.teacher={ID}");
    let more = training(&user, "hub", &[&teacher, "train.max_steps=3"]);
    let printed = messages(more);
    let warning = format!("model.revision = \"{TAG}\" goes on with the same teacher");
    assert!(printed.contains(&warning), "{printed}");
}

#[test]
fn tokenizer_file_alone_is_fetched_and_read() {
    let of_folder = User::new("http://127.0.0.1:9");
    let buckets = of_folder.path("buckets");
    copy(Path::new("assets/quickstart/emoji"), &buckets.join("emoji"));
    let saved = buckets.join("models/teacher");
    copy(&teacher(), &saved);
    let expected = train(&of_folder, "plain", &[]);
    support::save_tokenizer_file(&saved);
    let folder = format!("model.teacher={}", text(&saved));
    assert_eq!(train(&of_folder, "folder", &[&folder]), expected);

    let hub = Hub::start(ID, &saved, Behavior::default());
    let user = User::new(&hub.endpoint);
    let found = train(&user, "hub", &[&format!("model.teacher={ID}")]);
    assert_eq!(found, expected);
    let asked = hub.asked_files();
    let tokenizer: Vec<_> = asked.iter().map(|(name, _)| name.as_str()).collect();
    let tokenizer = tokenizer
        .iter()
        .filter(|name| name.starts_with("tokenizer/"));
    assert!(tokenizer.eq(&[
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json"
    ]));
    let embedded = format!("s3.embedded_root={}", text(&buckets));
    let from_s3 = ["model.teacher=s3://models/teacher", embedded.as_str()];
    assert_eq!(train(&user, "s3", &from_s3), expected);
}

#[test]
fn hub_files_are_fetched_once_and_only_if_needed() {
    let hub = Hub::start(ID, &teacher(), Behavior::default());
    let user = User::new(&hub.endpoint);
    let teacher = format!("model.teacher={ID}");
    let printed = messages(encode(&user, "a", &[&teacher]));
    assert!(
        printed.contains(&format!("fetching {ID}: {VAE}, ")),
        "{printed}"
    );
    assert_eq!(hub.asked_files(), named(&ENCODERS));
    // The cache has the layout of Python's: links to blobs, and the branch.
    let vae = std::fs::read_link(snapshot(&user).join(VAE)).unwrap();
    assert!(vae.starts_with("../../../blobs"), "{}", vae.display());
    let branch = user.path("hf/hub/models--someone--emoji-teacher/refs/main");
    assert_eq!(std::fs::read_to_string(&branch).unwrap(), COMMIT);

    messages(encode(&user, "b", &[&teacher]));
    let asked = hub.asked();
    assert_eq!(
        asked.len(),
        1,
        "only the branch should be requested: {asked:?}"
    );
    assert!(asked[0].path.ends_with("/revision/main") && asked[0].authorization.is_none());

    // Another command needs more files of the same model.
    let out = user.path("apple.png");
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
    messages(user.command(&args));
    assert_eq!(hub.asked_files(), named(&OTHERS));

    // The cache suffices without the Hub, with HF_HUB_OFFLINE or with a Hub that does not answer.
    let mut offline = encode(&user, "c", &[&teacher]);
    offline
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_ENDPOINT", "http://127.0.0.1:9");
    messages(offline);
    let mut unreachable = encode(&user, "d", &[&teacher]);
    unreachable.env("HF_ENDPOINT", "http://127.0.0.1:9");
    let printed = messages(unreachable);
    assert!(
        printed.contains("using the files in the cache"),
        "{printed}"
    );
    assert!(hub.asked().is_empty());
    let mut offline = encode(&user, "e", &["model.teacher=someone/other"]);
    offline.env("HF_HUB_OFFLINE", "1");
    refused(
        offline,
        1,
        &["someone/other", "no folder of that name", "HF_HUB_OFFLINE"],
    );
}

#[test]
fn hub_revision_selects_commit() {
    let hub = Hub::start(ID, &teacher(), Behavior::default());
    let user = User::new(&hub.endpoint);
    let teacher = format!("model.teacher={ID}");
    messages(encode(
        &user,
        "a",
        &[&teacher, &format!("model.revision={TAG}")],
    ));
    let asked = hub.asked();
    assert_eq!(asked[0].path, format!("/api/models/{ID}/revision/{TAG}"));
    messages(encode(
        &user,
        "b",
        &[&teacher, &format!("model.revision={COMMIT}")],
    ));
    assert!(hub.asked().is_empty());
    let wrong = encode(&user, "c", &[&teacher, "model.revision=v2"]);
    refused(wrong, 1, &[ID, "no revision \"v2\"", &hub.endpoint]);
    let wrong = encode(&user, "d", &["model.teacher=someone/other"]);
    refused(
        wrong,
        1,
        &["someone/other", "no such model", "no folder of that name"],
    );
    let wrong = encode(&user, "e", &["model.teacher=no/such/folder"]);
    refused(wrong, 2, &["model.teacher", "no such folder", "user/model"]);
}

#[test]
fn hub_token_opens_private_and_gated_models() {
    let private = Behavior {
        token: Some("hf_right".to_owned()),
        ..Behavior::default()
    };
    let gated = Behavior {
        gated: true,
        ..private.clone()
    };
    let hub = Hub::start(ID, &teacher(), private.clone());
    let user = User::new(&hub.endpoint);
    let teacher = format!("model.teacher={ID}");
    let licence = format!("accept its licence at {}/{ID}", hub.endpoint);
    let encode = |output: &str, token: Option<&str>| {
        let mut command = encode(&user, output, &[&teacher]);
        if let Some(token) = token {
            command.env("HF_TOKEN", token);
        }
        command
    };
    for behavior in [private, gated] {
        hub.behave(behavior);
        let words = [ID, "HTTP 401", "private or gated", &licence, "set HF_TOKEN"];
        refused(encode("a", None), 1, &words);
        let words = [ID, "HTTP 403", &licence, "HF_TOKEN"];
        refused(encode("a", Some("hf_wrong")), 1, &words);
    }
    hub.asked();
    std::fs::create_dir_all(user.path("hf")).unwrap();
    std::fs::write(user.path("hf/token"), "hf_right\n").unwrap();
    messages(encode("b", None));
    let asked = hub.asked();
    let right = Some("Bearer hf_right");
    assert!(
        asked.iter().all(|r| r.authorization.as_deref() == right),
        "{asked:?}"
    );
}

/// The size of the largest partial file. Bytes.
fn part_of(user: &User) -> u64 {
    let blobs = user.path("hf/hub/models--someone--emoji-teacher/blobs");
    let entries = blobs.read_dir().into_iter().flatten().flatten();
    let parts = entries.filter(|entry| entry.path().extension().is_some_and(|e| e == "part"));
    // A file may be renamed meanwhile.
    let sizes = parts.filter_map(|entry| Some(entry.metadata().ok()?.len()));
    sizes.max().unwrap_or(0)
}

#[test]
fn hub_download_resumes_and_is_verified() {
    let cut = Behavior {
        cut: Some(VAE.to_owned()),
        ..Behavior::default()
    };
    let hub = Hub::start(ID, &teacher(), cut);
    let teacher = format!("model.teacher={ID}");
    let user = User::new(&hub.endpoint);
    messages(encode(&user, "a", &[&teacher]));
    let bytes = |path: PathBuf| std::fs::read(path).unwrap();
    assert_eq!(
        bytes(snapshot(&user).join(VAE)),
        bytes(support::teacher().join(VAE))
    );
    let ranges: Vec<_> = hub.asked().into_iter().filter_map(|r| r.range).collect();
    let half = bytes(support::teacher().join(VAE)).len() / 2;
    assert!(ranges.contains(&format!("bytes={half}-")), "{ranges:?}");

    // A stopped process ends at once and leaves a partial file, which the next process completes.
    hub.behave(Behavior {
        silent: Some(VAE.to_owned()),
        ..Behavior::default()
    });
    let user = User::new(&hub.endpoint);
    let mut stopped = encode(&user, "b", &[&teacher]);
    let mut child = stopped.stderr(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    // The small files are smaller.
    while part_of(&user) < 500_000 {
        assert!(begun.elapsed() < Duration::from_secs(60), "no bytes arrive");
        std::thread::sleep(Duration::from_millis(20));
    }
    terminate(&child);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(!snapshot(&user).join(VAE).exists());
    let mut stalled = encode(&user, "b", &[&teacher]);
    stalled.env("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    refused(stalled, 1, &[ID, VAE, "sent nothing for 1 s"]);
    hub.asked();
    hub.behave(Behavior {
        damaged: Some(VAE.to_owned()),
        ..Behavior::default()
    });
    refused(
        encode(&user, "b", &[&teacher]),
        1,
        &[ID, VAE, "arrived damaged", "SHA-256"],
    );
    assert!(!snapshot(&user).join(VAE).exists());
    hub.behave(Behavior::default());
    messages(encode(&user, "b", &[&teacher]));

    let offline = User::new("http://127.0.0.1:9");
    let words = [
        ID,
        "no folder of that name here",
        "http://127.0.0.1:9",
        "5 attempts",
        "HF_ENDPOINT",
    ];
    refused(encode(&offline, "c", &[&teacher]), 1, &words);
    let without_scheme = User::new("hub.example");
    refused(
        encode(&without_scheme, "c", &[&teacher]),
        2,
        &["HF_ENDPOINT", "http://"],
    );
}

#[test]
fn hub_download_is_shared_by_processes() {
    let hub = Hub::start(ID, &teacher(), Behavior::default());
    let user = User::new(&hub.endpoint);
    let teacher = format!("model.teacher={ID}");
    let children: Vec<_> = ["a", "b", "c"]
        .map(|output| {
            let mut command = encode(&user, output, &[&teacher]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .into_iter()
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
    let asked = hub.asked();
    let whole = format!("/{ID}/resolve/{COMMIT}/{VAE}");
    let downloads = asked
        .iter()
        .filter(|r| r.path == whole && r.range.as_deref() == Some("bytes=0-"));
    assert_eq!(downloads.count(), 1, "{asked:?}");
}

#[test]
fn vae_comes_from_hub_or_folder() {
    let folder = teacher();
    let hub = Hub::start("someone/vae", &folder.join("vae"), Behavior::default());
    let user = User::new(&hub.endpoint);
    messages(encode(&user, "hub", &["model.vae=someone/vae"]));
    let asked = hub.asked_files();
    assert_eq!(
        asked,
        named(&["config.json", "diffusion_pytorch_model.safetensors"])
    );
    let whole = format!("model.vae={}", text(&folder));
    messages(encode(&user, "folder", &[&whole]));
    messages(encode(&user, "plain", &[]));
    let fingerprint = |output: &str| -> Value {
        let manifest = std::fs::read(user.path(output).join("manifest.json")).unwrap();
        serde_json::from_slice::<Value>(&manifest).unwrap()["fingerprint"].clone()
    };
    assert_eq!(fingerprint("hub"), fingerprint("plain"));
    assert_eq!(fingerprint("folder"), fingerprint("plain"));
}

#[test]
fn s3_model_files_are_fetched_when_changed() {
    let user = User::new("http://127.0.0.1:9");
    let buckets = user.path("buckets");
    copy(Path::new("assets/quickstart/emoji"), &buckets.join("emoji"));
    copy(&teacher(), &buckets.join("models/teacher"));
    std::fs::write(
        buckets.join("models/teacher/model.ckpt"),
        "not to be fetched",
    )
    .unwrap();
    let embedded = format!("s3.embedded_root={}", text(&buckets));
    let encode = |output: &str, teacher: &str| {
        encode(
            &user,
            output,
            &[&embedded, &format!("model.teacher={teacher}")],
        )
    };
    let fetched = |output: &str| -> BTreeSet<String> {
        let printed = messages(encode(output, "s3://models/teacher/"));
        let lines = printed.lines().filter_map(|line| {
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
