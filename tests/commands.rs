//! Drives `inspect`, `bench`, `check` and `sample` as a user does, on the quickstart's assets.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};
use coffey::models::unet::{WEIGHTS_STEM, student_tensors};
use coffey::models::{UNetConfig, Weights, save_model};
use npyz::WriterBuilder;
use serde_json::{Value, json};
use tempfile::TempDir;

const TEACHER: &str = "assets/quickstart/teacher";
const QUICKSTART: &str = "configs/quickstart.toml";
const SHARD: &str = "assets/quickstart/emoji/00000.tar";

fn coffey(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coffey"));
    // The repository's root, where the paths of the configurations start, and no scheduler's variables.
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(args);
    for name in ["RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"] {
        command.env_remove(name);
    }
    command.output().unwrap()
}

#[track_caller]
fn done(args: &[&str]) -> String {
    let output = coffey(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn done_json(args: &[&str]) -> Value {
    serde_json::from_str(&done(args)).unwrap()
}

/// A command that has to end with `code`, and to say every one of `words` on standard error.
#[track_caller]
fn refused(code: i32, args: &[&str], words: &[&str]) {
    let output = coffey(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
    for word in words {
        assert!(error.contains(word), "{args:?} should say {word:?}: {error}");
    }
    assert!(!error.contains("panicked"), "{error}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn copy(from: &Path, to: &Path) {
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

fn teacher() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(TEACHER)
}

/// A copy of the teacher whose `part` lacks a tensor.
fn damaged(folder: &TempDir, part: &str, stem: &str, tensor: &str) -> PathBuf {
    let pipeline = folder.path().join("damaged");
    copy(&teacher(), &pipeline);
    let part = pipeline.join(part);
    let mut tensors = Weights::load(&part, stem, DType::F32, &Device::Cpu).unwrap().into_tensors();
    tensors.remove(tensor).unwrap();
    let config: Value = serde_json::from_str(&std::fs::read_to_string(part.join("config.json")).unwrap()).unwrap();
    save_model(&part, stem, config.as_object().unwrap(), &tensors).unwrap();
    pipeline
}

// --- inspect ---

#[test]
fn inspect_counts_what_is_in_the_shards() {
    let report = done_json(&["inspect", "-c", QUICKSTART, "--json"]);
    assert_eq!(report["shards"].as_array().unwrap().len(), 4);
    assert_eq!(report["unreadable"], json!([]));
    let totals = &report["totals"];
    let samples = totals["samples"].as_u64().unwrap();
    assert!(samples > 100, "{totals}");
    assert_eq!(totals["members"], json!({"json": samples, "png": samples, "txt": samples}));
    assert_eq!(totals["formats"], json!({"png": samples}));
    assert_eq!((&totals["width"]["min"], &totals["width"]["max"]), (&json!(64), &json!(64)));
    assert_eq!(totals["problems"], json!(0));
    let sum: u64 = report["shards"].as_array().unwrap().iter().map(|s| s["samples"].as_u64().unwrap()).sum();
    assert_eq!(sum, samples);
}

#[test]
fn inspect_is_readable() {
    let said = done(&["inspect", SHARD, "assets/quickstart/emoji/{00001..00002}.tar"]);
    assert!(said.starts_with("assets/quickstart/emoji/00000.tar\n"), "{said}");
    for words in ["64-64 (mean 64) pixels", "total: 3 shards", "problems  none"] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn inspect_reports_a_shard_that_is_cut_off() {
    let folder = TempDir::new().unwrap();
    let cut = folder.path().join("cut.tar");
    let whole = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(SHARD)).unwrap();
    std::fs::write(&cut, &whole[..100_000]).unwrap();
    let report = done_json(&["inspect", text(&cut), "--json"]);
    assert_eq!(report["totals"]["broken_shards"], json!(1));
    assert!(report["shards"][0]["broken"].is_string());
    assert!(done(&["inspect", text(&cut)]).contains("broken"));
}

#[test]
fn inspect_goes_on_after_a_shard_that_can_not_be_read() {
    let folder = TempDir::new().unwrap();
    let not_a_tar = folder.path().join("text.tar");
    std::fs::write(&not_a_tar, "not a tar at all ".repeat(100)).unwrap();
    let output = coffey(&["inspect", text(&not_a_tar), "nowhere/0.tar", SHARD, "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["unreadable"].as_array().unwrap().len(), 2);
    assert_eq!(report["totals"]["unreadable_shards"], json!(2));
    assert_eq!(report["shards"].as_array().unwrap().len(), 1);
    assert!(report["unreadable"][0]["error"].as_str().unwrap().contains("is not a tar"));
    assert!(report["unreadable"][1]["error"].as_str().unwrap().contains("not found"));
}

#[test]
fn inspect_refuses_what_it_can_not_look_for() {
    refused(1, &["inspect", "s3://emoji/99999.tar", "-c", QUICKSTART], &["s3://emoji/99999.tar", "not found"]);
    refused(2, &["inspect"], &["<URL>"]);
    refused(2, &["inspect", "{0..9.tar"], &["{0..9.tar"]);
    refused(2, &["inspect", "nowhere/"], &["nowhere/"]);
    refused(2, &["inspect", "-c", "nowhere.toml"], &["nowhere.toml"]);
}

// --- bench ---

#[test]
fn bench_says_which_stage_is_the_limit() {
    let args = ["bench", "-c", QUICKSTART, "--samples", "100"];
    let measured = done_json(&[&args[..], &["--json"]].concat());
    // Batches of 16.
    assert_eq!((&measured["samples"], &measured["batches"]), (&json!(112), &json!(7)));
    for key in ["images_per_second", "megabytes_per_second", "first_batch_seconds", "cpu_ms_per_image"] {
        assert!(measured[key].as_f64().unwrap() > 0.0, "{key}: {measured}");
    }
    let stage = |name: &str| measured["stages"].as_array().unwrap().iter().find(|s| s["stage"] == name).unwrap();
    assert!(stage("decode")["items"].as_u64().unwrap() >= 112);
    assert!(measured["limiting_stage"].is_string());
    let table = done(&args);
    for words in ["starved s", "\ndecode ", "images/s", "first batch", "limit "] {
        assert!(table.contains(words), "{words}: {table}");
    }
    assert!(!table.contains("\ntrain "), "{table}");
}

#[test]
fn bench_reads_the_part_of_a_rank() {
    let args = ["bench", "-c", QUICKSTART, "--samples", "16", "--json", "--rank", "1", "--world", "2"];
    assert_eq!(done_json(&args)["samples"], json!(16));
    refused(2, &["bench", "-c", QUICKSTART, "--rank", "0", "--world", "5"], &["4 shards", "5 ranks"]);
}

#[test]
fn bench_refuses_bad_input() {
    let bench = |set: &str, code, words: &[&str]| refused(code, &["bench", "-c", QUICKSTART, "-s", set], words);
    bench("data.shards=s3://emoji/99999.tar", 2, &["s3://emoji/99999.tar", "not found"]);
    bench("data.shards=s3://nobucket/0.tar", 2, &["s3://nobucket/0.tar", "not found"]);
    bench("data.shards=Cargo.toml", 1, &["Cargo.toml", "is not a tar"]);
    bench("data.open_shard=3", 2, &["data.open_shard", "open_shards"]);
    bench("data.open_shards=many", 2, &["data.open_shards", "whole number"]);
    bench("s3.embedded_root=nowhere", 2, &["s3.embedded_root", "nowhere"]);
    refused(2, &["bench", "-c", QUICKSTART, "--samples", "0"], &["--samples"]);
    refused(2, &["bench"], &["--config"]);
}

// --- check ---

/// `check` on the quickstart with an output of its own.
fn check(folder: &TempDir, more: &[&str]) -> Vec<String> {
    let output = format!("train.output={:?}", text(&folder.path().join("run")));
    let args = ["check", "-c", QUICKSTART, "-s", &output];
    args.iter().chain(more).map(|arg| (*arg).to_owned()).collect()
}

fn refs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

#[test]
fn check_tries_every_step() {
    let folder = TempDir::new().unwrap();
    let report = done_json(&refs(&check(&folder, &["--json"])));
    let steps: Vec<(&str, &str)> = report["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| (line["step"].as_str().unwrap(), line["status"].as_str().unwrap()))
        .collect();
    let names =
        ["configuration", "sources", "first sample", "encoders", "teacher", "dry run", "memory", "output"];
    assert_eq!(steps, names.map(|name| (name, "ok")));
    let parts = report["memory"]["parts"].as_array().unwrap();
    let part = |what: &str| parts.iter().find(|p| p["what"] == what).unwrap()["bytes"].as_u64().unwrap();
    assert_eq!(part("optimizer"), 2 * part("student"));
    assert!(part("student") > part("teacher"));
    assert!(part("shuffle buffer") > 0 && part("activations") > 0);
    let said = done(&refs(&check(&folder, &[])));
    assert!(said.contains("ok       teacher") && said.contains("M parameters"), "{said}");
    assert!(!folder.path().join("run").exists(), "a check leaves nothing behind");
}

#[test]
fn check_knows_what_a_configuration_is_for() {
    let said = done(&["check", "-c", "configs/precompute-quickstart.toml"]);
    assert!(said.contains("coffey precompute") && !said.contains("teacher "), "{said}");
}

#[test]
fn check_prints_the_configuration_in_full() {
    let toml = done(&["check", "-c", QUICKSTART, "--print-config", "-s", "train.max_steps=7"]);
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("full.toml");
    std::fs::write(&path, &toml).unwrap();
    assert!(toml.contains("max_steps = 7") && toml.contains("max_bad_fraction = 0.05"), "{toml}");
    assert_eq!(done(&["check", "-c", text(&path), "--print-config"]), toml);
}

#[test]
fn check_ends_at_the_first_fault() {
    let folder = TempDir::new().unwrap();
    let faulty = |set: &str, code, step: &str, words: &[&str]| {
        let args = check(&folder, &["-s", set]);
        refused(code, &refs(&args), words);
        let said = String::from_utf8(coffey(&refs(&args)).stdout).unwrap();
        let last = said.lines().last().unwrap();
        assert!(last.starts_with(&format!("error    {step}")), "{last}");
    };
    faulty("train.max_step=3", 2, "configuration", &["train.max_step", "max_steps"]);
    faulty("image.resolution=63", 2, "configuration", &["image.resolution", "multiple of 8"]);
    faulty("model.teacher=nowhere", 2, "configuration", &["model.teacher", "nowhere"]);
    faulty("data.shards=s3://emoji/nothing/", 2, "sources", &["s3://emoji/nothing/"]);
    faulty("data.shards=s3://emoji/99999.tar", 2, "first sample", &["99999.tar", "not found"]);
    faulty("data.shards=Cargo.toml", 1, "first sample", &["is not a tar"]);
    faulty("data.image_keys=[\"gif\"]", 1, "first sample", &["no image"]);
}

#[test]
fn check_names_what_is_wrong_with_a_model() {
    let folder = TempDir::new().unwrap();
    let pipeline = damaged(&folder, "unet", WEIGHTS_STEM, "conv_in.weight");
    let set = format!("model.teacher={:?}", text(&pipeline));
    let args = check(&folder, &["-s", &set]);
    refused(1, &refs(&args), &["conv_in.weight", "is missing", "[48, 4, 3, 3]"]);
    std::fs::remove_dir_all(pipeline.join("tokenizer")).unwrap();
    refused(1, &refs(&args), &["tokenizer", "vocab.json"]);
}

#[test]
fn check_refuses_an_output_that_can_not_be_written() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("run"), "a file").unwrap();
    refused(2, &refs(&check(&folder, &[])), &["train.output", "is not a folder"]);
}

// --- sample ---

fn sample(model: &Path, out: &Path, more: &[&str]) -> Vec<String> {
    let args = ["sample", "--model", text(model), "--out", text(out)];
    args.iter().chain(more).map(|arg| (*arg).to_owned()).collect()
}

fn write_npy(path: &Path, shape: &[u64], values: &[f32]) {
    let file = std::fs::File::create(path).unwrap();
    let options = npyz::WriteOptions::new().default_dtype().shape(shape);
    let mut writer = options.writer(file).begin_nd().unwrap();
    writer.extend(values.iter().copied()).unwrap();
    writer.finish().unwrap();
}

#[test]
fn a_teacher_draws_the_same_image_again() {
    let folder = TempDir::new().unwrap();
    let draw = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let prompt = ["--prompt", "red apple", "--guidance", "4"];
        let said = done(&refs(&sample(&teacher(), &out, &[&prompt, more].concat())));
        assert_eq!(said.trim_end(), text(&out));
        image::open(&out).unwrap().into_rgb8()
    };
    let image = draw("a.png", &["--steps", "2"]);
    assert_eq!(image.dimensions(), (64, 64));
    assert_eq!(draw("new/b.png", &["--steps", "2"]), image);
    assert_ne!(draw("c.png", &["--steps", "2", "--seed", "1"]), image);
    assert_ne!(draw("d.png", &["--steps", "2", "--scheduler", "lcm"]), image);
    assert_eq!(draw("e.png", &["--steps", "1", "--height", "32", "--width", "48"]).dimensions(), (48, 32));
}

#[test]
fn several_prompts_make_a_grid_of_the_same_images() {
    let folder = TempDir::new().unwrap();
    let noise: Vec<f32> = (0..4 * 16 * 16).map(|i| ((i * 37 % 101) as f32 - 50.0) / 29.0).collect();
    let file = folder.path().join("noise.npy");
    write_npy(&file, &[1, 4, 16, 16], &noise);
    let draw = |prompts: &[&str]| {
        let out = folder.path().join("image.png");
        let settings = ["--steps", "1", "--init-latents", text(&file), "--prompt"];
        done(&refs(&sample(&teacher(), &out, &[&settings, prompts].concat())));
        image::open(&out).unwrap().into_rgb8()
    };
    let grid = draw(&["cat face", "red apple", "cat face"]);
    assert_eq!(grid.dimensions(), (128, 128));
    let part = |x, y| image::imageops::crop_imm(&grid, x, y, 64, 64).to_image();
    assert_eq!(part(0, 0), part(0, 64));
    assert_ne!(part(0, 0), part(64, 0));
    let alone = draw(&["red apple"]);
    let largest = alone.iter().zip(part(64, 0).iter()).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(largest <= Some(1), "{largest:?}");
}

/// A run's folder with a student that has learned nothing.
fn student_run(folder: &TempDir) -> PathBuf {
    let run = folder.path().join("run");
    let unet = teacher().join("unet");
    let config = UNetConfig::read(&unet).unwrap().with_guidance_embedding(8);
    let tensors = Weights::load(&unet, WEIGHTS_STEM, DType::F32, &Device::Cpu).unwrap().into_tensors();
    let tensors: BTreeMap<String, Tensor> =
        student_tensors(tensors, &config, |count, bound| (0..count).map(|i| bound * (i % 3) as f32).collect()).unwrap();
    save_model(&run.join("checkpoint-5/unet_target"), WEIGHTS_STEM, config.to_json(), &tensors).unwrap();
    save_model(&run.join("unet"), WEIGHTS_STEM, config.to_json(), &tensors).unwrap();
    let description = json!({"teacher": TEACHER, "vae": null});
    std::fs::write(run.join("run.json"), description.to_string()).unwrap();
    run
}

#[test]
fn a_run_and_its_checkpoints_draw() {
    let folder = TempDir::new().unwrap();
    let run = student_run(&folder);
    let out = folder.path().join("image.png");
    let draw = |model: &Path, more: &[&str]| {
        let prompt = ["--prompt", "sunflower"];
        let output = coffey(&refs(&sample(model, &out, &[&prompt, more].concat())));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{said}");
        (image::open(&out).unwrap().into_rgb8(), said)
    };
    let (image, said) = draw(&run, &[]);
    assert!(said.contains("4 LCM steps"), "{said}");
    assert_eq!(draw(&run.join("checkpoint-5"), &[]).0, image);
    assert_eq!(draw(&run, &["--teacher", TEACHER, "--unet", "unet"]).0, image);
    assert_ne!(draw(&run, &["--guidance", "2"]).0, image);
    assert_ne!(draw(&run, &["--scheduler", "ddim", "--steps", "4"]).0, image);
    std::fs::remove_file(run.join("run.json")).unwrap();
    refused(1, &refs(&sample(&run, &out, &["--prompt", "x"])), &["text_encoder", "--teacher"]);
    refused(1, &refs(&sample(&run, &out, &["--prompt", "x", "--unet", "lora"])), &["no folder lora"]);
}

#[test]
fn sample_refuses_bad_options() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("image.png");
    let wrong = |more: &[&str], words: &[&str]| {
        refused(2, &refs(&sample(&teacher(), &out, &[&["--prompt", "x"], more].concat())), words);
    };
    wrong(&["--steps", "0"], &["--steps 0", "between 1 and"]);
    wrong(&["--steps", "51", "--scheduler", "lcm"], &["--steps 51", "50"]);
    wrong(&["--height", "30"], &["--height 30", "multiple of 8"]);
    wrong(&["--guidance", "inf"], &["--guidance"]);
    wrong(&["--scheduler", "euler"], &["euler", "lcm", "ddim"]);
    wrong(&["--teacher", "nowhere"], &["--teacher nowhere"]);
    let file = folder.path().join("noise.npy");
    write_npy(&file, &[1, 4, 8, 16], &[0.0; 512]);
    wrong(&["--init-latents", text(&file), "--height", "64"], &["[1, 4, 8, 16]", "needs [1, 4, 16, width]"]);
    write_npy(&file, &[3, 4, 16, 16], &[0.0; 3072]);
    wrong(&["--init-latents", text(&file)], &["[3, 4, 16, 16]"]);
    wrong(&["--init-latents", "nowhere.npy"], &["nowhere.npy"]);
    refused(2, &["sample", "--model", "nowhere", "--prompt", "x", "--out", text(&out)], &["--model nowhere"]);
    refused(2, &["sample", "--model", TEACHER, "--prompt", "x", "--out", "x.jpg"], &["--out x.jpg", ".png"]);
    refused(2, &["sample", "--model", TEACHER, "--out", text(&out)], &["--prompt"]);
    assert!(!out.exists());
}

#[test]
fn sample_names_what_is_wrong_with_a_model() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("image.png");
    let pipeline = damaged(&folder, "vae", WEIGHTS_STEM, "decoder.conv_out.weight");
    refused(1, &refs(&sample(&pipeline, &out, &["--prompt", "x"])), &["decoder.conv_out.weight", "is missing"]);
    std::fs::write(pipeline.join("unet").join(format!("{WEIGHTS_STEM}.safetensors")), "cut").unwrap();
    refused(1, &refs(&sample(&pipeline, &out, &["--prompt", "x"])), &["not a readable safetensors file"]);
    std::fs::remove_dir_all(pipeline.join("unet")).unwrap();
    refused(1, &refs(&sample(&pipeline, &out, &["--prompt", "x"])), &["no folder unet_target or unet"]);
}
