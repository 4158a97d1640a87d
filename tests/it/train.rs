//! `coffey train`: the files of a run, also against diffusers; stopping and resuming.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use candle_core::{DType, Device, Tensor};
use coffey::models::{Conditioning, Denoiser, UNet};
use coffey::ops::Attention;
use coffey::random::{generator, normal};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::cloud::write_config;
use crate::support::{
    self, NO_PICTURES, QUICKSTART, args, command, copy, damage, messages, python, records, refuse,
    repository, says, succeed, terminate, text, timeless, wait_for_steps,
};

/// The arguments of a small `train` on the quickstart's data, without pictures.
pub(crate) fn train_args(output: &Path, more: &[&str]) -> Vec<String> {
    let output = format!("train.output={}", output.display());
    let small = [output.as_str(), "train.batch_size=4"];
    args(
        "train",
        QUICKSTART,
        [&small[..], &NO_PICTURES, more].concat(),
    )
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

/// Runs three steps, of which two are audited; returns the run's folder and the audit's.
fn audited_run(folder: &TempDir) -> (PathBuf, PathBuf) {
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
    assert_eq!(succeed(&args).trim(), text(&run));
    (run, audit)
}

#[test]
fn run_leaves_records_pictures_and_students() {
    let folder = TempDir::new().unwrap();
    let (run, _) = audited_run(&folder);
    let lines = records(&run);
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
}

mod needs_python {
    use super::*;

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with PyTorch and diffusers"]
    fn audited_run_and_student_match_pytorch() {
        let folder = TempDir::new().unwrap();
        let (run, audit) = audited_run(&folder);
        python("replay_audit.py", &[audit]);

        let student = run.join("unet_target");
        let forward = folder.path().join("forward.safetensors");
        write_forward(&student, &forward);
        python("check_unet.py", &[student, forward]);
    }
}

/// Writes inputs and output of one forward pass, which diffusers repeats.
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
fn numbers_do_not_depend_on_threads_or_resume() {
    let folder = TempDir::new().unwrap();
    let run = |name: &str, threads: &str, more: &[&str]| -> PathBuf {
        let run = folder.path().join(name);
        let args = train_args(&run, more);
        let mut command = command(&args);
        command.env("RAYON_NUM_THREADS", threads);
        messages(command);
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

/// A shard of 40 samples, of which one in five has no caption and one in ten a cut picture.
fn broken_shard(path: &Path) {
    let source = repository("assets/quickstart/emoji/00000.tar");
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
fn skipped_samples_are_listed_once_across_kills() {
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
    let printed = messages(command(&args(&whole, "train.max_steps=12")));
    says(&printed, &["left out since step 1: decode_error"]);
    let all = skipped(&whole);
    let lines: Vec<Value> = all
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let of = |reason: &str| lines.iter().filter(|line| line["reason"] == reason).count();
    // The shard has fewer than 48 whole samples, so it is read once and a second time in part.
    assert!(of("no_caption") >= 8 && of("decode_error") >= 4, "{all}");
    assert_eq!(of("no_caption") + of("decode_error"), lines.len());
    assert!(
        lines
            .iter()
            .all(|line| line["shard"] == shard.to_str().unwrap())
    );
    let steps: Vec<u64> = lines.iter().map(|l| l["step"].as_u64().unwrap()).collect();
    assert!(steps.is_sorted() && steps.iter().all(|step| (1..=12).contains(step)));

    // Stops at a checkpoint; then the state of a kill two steps after one, within a line.
    let parts = folder.path().join("parts");
    succeed(&args(&parts, "train.max_steps=4"));
    let first = skipped(&parts);
    assert!(
        all.starts_with(&first) && first.len() < all.len(),
        "{first}"
    );
    succeed(&args(&parts, "train.max_steps=10"));
    std::fs::remove_dir_all(parts.join("checkpoint-10")).unwrap();
    let torn = skipped(&parts) + "{\"step\":11,\"sha";
    std::fs::write(parts.join("skipped.jsonl"), torn).unwrap();
    succeed(&args(&parts, "train.max_steps=12"));
    assert_eq!(skipped(&parts), all);
    assert_eq!(timeless(&parts), timeless(&whole));
}

#[test]
fn skipped_samples_are_listed_if_no_step_is_made() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let list = run.join("skipped.jsonl");
    // The captions of the endpoint error are read before the first step, in the order of the shards.
    for captions in [0, 4] {
        let captions = format!("report.endpoint_captions={captions}");
        let args = train_args(&run, &["data.caption_keys=[\"cls\"]", &captions]);
        let said = refuse(
            1,
            &args,
            &[
                "no_caption",
                "txt is text: add \"txt\" to data.caption_keys",
            ],
        );
        says(&said, &["skipped samples are listed in", text(&list)]);
        let listed = std::fs::read_to_string(&list).unwrap();
        let lines = listed.lines();
        assert!(lines.clone().count() >= 100, "{listed}");
        assert!(
            lines
                .map(|line| serde_json::from_str::<Value>(line).unwrap())
                .all(|line| line["step"] == 1 && line["reason"] == "no_caption")
        );
    }
}

#[test]
fn sigterm_saves_and_next_run_resumes() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let args = train_args(&run, &["train.max_steps=400", "checkpoint.every=1000"]);
    let mut child = command(&args).stderr(Stdio::null()).spawn().unwrap();
    wait_for_steps(&run, 2);
    terminate(&child);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let made = records(&run).len();
    assert!(run.join(format!("checkpoint-{made}/state.json")).is_file());
    assert!(!run.join("unet").exists());

    let max = format!("train.max_steps={}", made + 1);
    let args = train_args(&run, &[&max]);
    says(&messages(command(&args)), &["going on from"]);
    assert_eq!(records(&run).len(), made + 1);
}

#[test]
fn checkpoint_of_other_version_is_refused() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let args = train_args(&run, &["train.max_steps=1", "checkpoint.every=1"]);
    succeed(&args);
    let state = run.join("checkpoint-1/state.json");
    std::fs::write(
        &state,
        r#"{"format": 1, "step": 1, "cursor": {"version": 1}}"#,
    )
    .unwrap();
    let args = train_args(&run, &["train.max_steps=2"]);
    refuse(
        1,
        &args,
        &["checkpoint-1: written by another version of coffey, in format 1"],
    );
}

#[test]
fn damaged_checkpoint_is_named_and_passed_over() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    succeed(&train_args(
        &run,
        &[
            "train.max_steps=2",
            "checkpoint.every=1",
            "checkpoint.keep=2",
        ],
    ));
    damage(&run.join("checkpoint-2/optimizer.safetensors"));
    let printed = messages(command(&train_args(&run, &["train.max_steps=3"])));
    says(
        &printed,
        &[
            "checkpoint-2",
            "optimizer.safetensors",
            "going on from",
            "checkpoint-1",
        ],
    );
    assert_eq!(records(&run).len(), 3);
}

#[test]
fn train_refuses_bad_input() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let refused = |code: i32, more: &[&str], words: &[&str]| {
        refuse(code, &train_args(&run, more), words);
    };
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
            "data.check_shards=false",
        ],
        &["s3://emoji/00004.tar"],
    );
    refused(
        1,
        &["data.shards=s3://emoji/{00003..00005}.tar"],
        &[
            "2 of 3 shards",
            "s3://emoji/00004.tar",
            "s3://emoji/00005.tar",
        ],
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
    write_config(&own, &format!("http://127.0.0.1:{port}"), 2);
    let output = format!("train.output={}", run.display());
    let settings = [output.as_str(), "report.endpoint_captions=0"];
    refuse(
        1,
        &args("train", text(&own), settings),
        &["s3://emoji/0000", &port.to_string()],
    );

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
