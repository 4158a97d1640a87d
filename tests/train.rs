//! Drives `train` as a user does: what it leaves behind, against diffusers; stopping and going on.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "these are tests"
)]

mod support;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use coffey::models::{Conditioning, Denoiser, UNet};
use coffey::ops::Attention;
use coffey::random::{generator, normal};
use serde_json::Value;
use support::{command, copy, python, refuse, succeed};
use tempfile::TempDir;

/// `train` on the quickstart's data, small, without the pictures that take time.
fn train_args(output: &Path, more: &[&str]) -> Vec<String> {
    let fixed = ["train", "-c", "configs/quickstart.toml"].map(str::to_owned);
    let output = format!("train.output={}", output.display());
    let small = [
        "train.batch_size=4",
        "report.endpoint_captions=0",
        "report.grid=false",
        "validation.every=1000",
    ];
    let settings = std::iter::once(output.as_str())
        .chain(small)
        .chain(more.iter().copied());
    fixed
        .into_iter()
        .chain(settings.flat_map(|s| ["-s".to_owned(), s.to_owned()]))
        .collect()
}

fn refs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn lines(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Every line but what depends on the clock.
fn timeless(run: &Path) -> Vec<Value> {
    let mut lines = lines(run);
    for line in &mut lines {
        for key in ["seconds", "samples_per_second", "limiting_stage"] {
            line.as_object_mut().unwrap().remove(key);
        }
    }
    lines
}

fn weights(folder: &Path) -> BTreeMap<String, Vec<f32>> {
    let path = folder.join("diffusion_pytorch_model.safetensors");
    let tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
    tensors
        .into_iter()
        .map(|(name, t)| (name, flat(t)))
        .collect()
}

#[test]
fn a_run_leaves_everything_behind_and_pytorch_agrees() {
    let folder = TempDir::new().unwrap();
    let (run, audit) = (folder.path().join("run"), folder.path().join("audit"));
    let audit_dir = format!("audit.dir={}", audit.display());
    let args = train_args(
        &run,
        &[
            &audit_dir,
            "audit.steps=2",
            "optimizer.learning_rate=2e-5",
            "train.max_steps=3",
            "train.gradient_accumulation=2",
            "checkpoint.every=2",
            "validation.every=3",
            "report.endpoint_captions=4",
            "report.endpoint_every=2",
        ],
    );
    let out = succeed(&refs(&args));
    assert_eq!(out.trim(), run.to_str().unwrap());
    let lines = lines(&run);
    assert_eq!(lines.len(), 3);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(line["step"], i + 1);
        assert_eq!(line["samples"], 8 * (i + 1));
        for key in ["loss", "lr", "grad_norm", "samples_per_second"] {
            assert!(line[key].as_f64().unwrap() > 0.0, "{line}");
        }
    }
    assert!(lines[1]["endpoint_error"].as_f64().unwrap() > 0.0);
    for picture in [
        "loss.png",
        "samples/step-3-target.png",
        "samples/step-3-online.png",
    ] {
        let picture = image::open(run.join(picture)).unwrap();
        assert!(picture.width() > 100 && picture.height() > 50);
    }
    for name in [
        "checkpoint-2/unet",
        "checkpoint-3/unet_target",
        "unet",
        "unet_target",
    ] {
        let config: Value = serde_json::from_str(
            &std::fs::read_to_string(run.join(name).join("config.json")).unwrap(),
        )
        .unwrap();
        assert_eq!(config["time_cond_proj_dim"], 64);
    }
    assert_ne!(
        weights(&run.join("unet")),
        weights(&run.join("unet_target"))
    );
    python("replay_audit.py", &[&audit]);

    let forward = folder.path().join("forward.safetensors");
    write_forward(&run.join("unet_target"), &forward);
    python("check_unet.py", &[&run.join("unet_target"), &forward]);
}

/// One forward pass of ours, for diffusers to repeat.
fn write_forward(unet: &Path, path: &Path) {
    let cpu = &Device::Cpu;
    let network = UNet::load(unet, DType::F32, cpu, Attention::MemoryEfficient).unwrap();
    let config = network.config().clone();
    let mut rng = generator(7, "test", 0, 0);
    let sample = normal(&mut rng, &[2, config.in_channels, 16, 24], cpu).unwrap();
    let embeds = normal(&mut rng, &[2, 77, config.cross_attention_dim], cpu).unwrap();
    let guidance = normal(&mut rng, &[2, config.time_cond_proj_dim.unwrap()], cpu).unwrap();
    let conditioning = Conditioning::text(embeds.clone()).with_guidance(Some(guidance.clone()));
    let output = network.forward(&sample, &[19, 999], &conditioning).unwrap();
    let tensors = HashMap::from([
        ("sample", sample),
        ("timestep", Tensor::new(&[19i64, 999], cpu).unwrap()),
        ("encoder_hidden_states", embeds),
        ("timestep_cond", guidance),
        ("output", output),
    ]);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

#[test]
fn the_same_numbers_on_any_number_of_threads_with_recomputation_and_across_a_stop() {
    let folder = TempDir::new().unwrap();
    let run = |name: &str, threads: &str, more: &[&str]| -> PathBuf {
        let run = folder.path().join(name);
        let args = train_args(&run, more);
        let status = command(&refs(&args))
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap()
            .status;
        assert_eq!(status.code(), Some(0));
        run
    };
    let whole = run("whole", "2", &["train.max_steps=4"]);
    let other = run(
        "other",
        "1",
        &[
            "train.max_steps=4",
            "data.decode_threads=1",
            "encode.devices=[\"cpu\", \"cpu\"]",
            "train.gradient_checkpointing=true",
        ],
    );
    assert_eq!(timeless(&whole), timeless(&other));
    assert_eq!(weights(&whole.join("unet")), weights(&other.join("unet")));

    run("parts", "2", &["train.max_steps=2"]);
    let parts = run("parts", "2", &["train.max_steps=4"]);
    assert_eq!(timeless(&whole), timeless(&parts));
    for name in ["unet", "unet_target"] {
        assert_eq!(weights(&whole.join(name)), weights(&parts.join(name)));
    }
}

/// A shard of 40 samples of which one in five has no caption and one in ten no whole picture.
fn broken_shard(path: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/quickstart/emoji/00000.tar");
    let mut from = tar::Archive::new(std::fs::File::open(source).unwrap());
    let mut to = tar::Builder::new(std::fs::File::create(path).unwrap());
    for (index, entry) in from.entries().unwrap().take(120).enumerate() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().into_owned();
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
        let (sample, extension) = (index / 3, name.extension().unwrap());
        if sample % 5 == 1 && extension == "txt" {
            continue;
        }
        if sample % 10 == 7 && extension == "png" {
            content.truncate(50);
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        to.append_data(&mut header, name, content.as_slice())
            .unwrap();
    }
    to.finish().unwrap();
}

#[test]
fn what_was_left_out_is_listed_once_across_stops_and_kills() {
    let folder = TempDir::new().unwrap();
    let shard = folder.path().join("broken.tar");
    broken_shard(&shard);
    let shards = format!("data.shards={}", shard.display());
    let args = |run: &Path, steps: &str| {
        train_args(
            run,
            &[
                &shards,
                steps,
                "data.shuffle_buffer=6",
                "data.max_bad_fraction=0.9",
                "checkpoint.every=4",
            ],
        )
    };
    let skipped = |run: &Path| std::fs::read_to_string(run.join("skipped.jsonl")).unwrap();
    let whole = folder.path().join("whole");
    let output = command(&refs(&args(&whole, "train.max_steps=12")))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(
        said.contains("left out since step 1: decode_error"),
        "{said}"
    );
    let all = skipped(&whole);
    let lines: Vec<Value> = all
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let of = |reason: &str| lines.iter().filter(|line| line["reason"] == reason).count();
    // 48 samples are more than the shard has whole: it was read once and begun again.
    assert!(of("no_caption") >= 8 && of("decode_error") >= 4, "{all}");
    assert_eq!(of("no_caption") + of("decode_error"), lines.len());
    assert!(
        lines
            .iter()
            .all(|line| line["shard"] == shard.to_str().unwrap())
    );
    let steps: Vec<u64> = lines.iter().map(|l| l["step"].as_u64().unwrap()).collect();
    assert!(steps.is_sorted() && steps.iter().all(|step| (1..=12).contains(step)));

    // Stopped at a checkpoint, then as if killed two steps after one, within a line.
    let parts = folder.path().join("parts");
    succeed(&refs(&args(&parts, "train.max_steps=4")));
    let first = skipped(&parts);
    assert!(
        all.starts_with(&first) && first.len() < all.len(),
        "{first}"
    );
    succeed(&refs(&args(&parts, "train.max_steps=10")));
    std::fs::remove_dir_all(parts.join("checkpoint-10")).unwrap();
    let torn = skipped(&parts) + "{\"step\":11,\"sha";
    std::fs::write(parts.join("skipped.jsonl"), torn).unwrap();
    succeed(&refs(&args(&parts, "train.max_steps=12")));
    assert_eq!(skipped(&parts), all);
    assert_eq!(timeless(&parts), timeless(&whole));
}

#[test]
fn a_signal_saves_and_the_next_run_goes_on() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let args = train_args(&run, &["train.max_steps=400", "checkpoint.every=1000"]);
    let mut child = command(&refs(&args))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |t| t.lines().count()) < 2 {
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "no step within two minutes"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let kill = std::process::Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let made = lines(&run).len();
    assert!(run.join(format!("checkpoint-{made}/state.json")).is_file());
    assert!(!run.join("unet").exists());

    let max = format!("train.max_steps={}", made + 1);
    let args = train_args(&run, &[&max]);
    let output = command(&refs(&args)).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stderr).contains("going on from"));
    assert_eq!(lines(&run).len(), made + 1);
}

#[test]
fn a_checkpoint_of_another_version_is_refused_and_not_passed_over() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let args = train_args(&run, &["train.max_steps=1", "checkpoint.every=1"]);
    succeed(&refs(&args));
    let state = run.join("checkpoint-1/state.json");
    std::fs::write(
        &state,
        r#"{"format": 1, "step": 1, "cursor": {"version": 1}}"#,
    )
    .unwrap();
    let args = train_args(&run, &["train.max_steps=2"]);
    let output = command(&refs(&args)).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("checkpoint-1: written by another version of coffey, in format 1"),
        "{said}"
    );
}

#[test]
fn a_damaged_checkpoint_is_named_and_passed_over() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    succeed(&refs(&train_args(
        &run,
        &[
            "train.max_steps=2",
            "checkpoint.every=1",
            "checkpoint.keep=2",
        ],
    )));
    let path = run.join("checkpoint-2/optimizer.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let output = command(&refs(&train_args(&run, &["train.max_steps=3"])))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(
        said.contains("checkpoint-2") && said.contains("optimizer.safetensors"),
        "{said}"
    );
    assert!(
        said.contains("going on from") && said.contains("checkpoint-1"),
        "{said}"
    );
    assert_eq!(lines(&run).len(), 3);
}

#[test]
fn what_cannot_be_trained_is_refused_with_one_message() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let refused = |code: i32, more: &[&str], words: &[&str]| {
        refuse(code, &refs(&train_args(&run, more)), words);
    };
    let config = "configs/quickstart.toml";
    refuse(2, &["train"], &["--config"]);
    refuse(2, &["train", "-c", "nowhere.toml"], &["nowhere.toml"]);
    refused(
        2,
        &["train.max_step=3"],
        &["train.max_step", "train.max_steps"],
    );
    refused(2, &["train.max_steps=many"], &["train.max_steps", "many"]);
    refused(
        2,
        &["data.kind=latents"],
        &["no manifest.json", "data.kind"],
    );
    refused(2, &["data.shards=[]"], &["data.shards"]);
    refused(2, &["model.teacher=nowhere"], &["model.teacher", "nowhere"]);
    refused(2, &["image.resolution=60"], &["image.resolution", "8"]);
    refused(
        1,
        &[
            "data.shards=s3://emoji/{00003..00004}.tar",
            "data.resample_shards=false",
        ],
        &["s3://emoji/00004.tar"],
    );
    refused(
        1,
        &["data.shards=s3://nobody/0.tar"],
        &["s3://nobody/0.tar"],
    );
    refused(
        1,
        &["data.shards=s3://teacher/unet/config.json"],
        &["s3://teacher/unet/config.json", "tar"],
    );
    refused(
        1,
        &["data.shards=s3://emoji/nothing/"],
        &["s3://emoji/nothing/"],
    );

    // An endpoint where nothing listens.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let own = folder.path().join("own.toml");
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(config)).unwrap();
    let endpoint = format!(
        "endpoint_url = \"http://127.0.0.1:{port}\"\npath_style = true\nmax_attempts = 2 #"
    );
    std::fs::write(
        &own,
        text.replace("embedded_root = ", &format!("{endpoint} ")),
    )
    .unwrap();
    let output = format!("train.output={}", run.display());
    let args = [
        "train",
        "-c",
        own.to_str().unwrap(),
        "-s",
        &output,
        "-s",
        "report.endpoint_captions=0",
    ];
    refuse(1, &args, &["s3://emoji/0000", &port.to_string()]);

    // A model folder with a missing tensor.
    let teacher = folder.path().join("teacher");
    copy(&support::teacher(), &teacher);
    let unet = teacher.join("unet/diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&unet, &Device::Cpu).unwrap();
    tensors.remove("conv_out.bias").unwrap();
    candle_core::safetensors::save(&tensors, &unet).unwrap();
    let setting = format!("model.teacher={}", teacher.display());
    refused(1, &[&setting], &["conv_out.bias", "unet"]);
    std::fs::write(&unet, b"not safetensors").unwrap();
    refused(1, &[&setting], &["diffusion_pytorch_model.safetensors"]);
}
