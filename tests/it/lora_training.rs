//! Training a LoRA: what a run leaves, resuming, refusals, and that the teacher's weights are in memory once.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use candle_core::safetensors::load;
use candle_core::{DType, Device, Tensor};
use coffey::models::unet::WEIGHTS_STEM;
use tempfile::TempDir;

use crate::support::{
    NO_PICTURES, QUICKSTART_LORA, args, changed_teacher, command, messages, refused, says,
    succeed_json, text, timeless,
};

/// A small `train` of a LoRA without pictures into `output`.
fn train(output: &Path, more: &[&str]) -> Command {
    let output = format!("train.output={}", text(output));
    let small = [output.as_str(), "train.batch_size=2", "lora.rank=4"];
    let settings = [&small[..], &NO_PICTURES, more].concat();
    command(&args("train", QUICKSTART_LORA, settings))
}

fn lora(folder: &Path) -> BTreeMap<String, Tensor> {
    let path = folder.join("unet_lora/pytorch_lora_weights.safetensors");
    load(path, &Device::Cpu).unwrap().into_iter().collect()
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn lora_run_leaves_both_layouts_and_small_checkpoints() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let pictures = [
        "train.max_steps=2",
        "checkpoint.every=1",
        "validation.every=2",
        "validation.prompts=['red apple']",
        "validation.steps=1",
    ];
    let said = messages(train(&run, &pictures));
    says(
        &said,
        &["training a LoRA of rank 4 on ", " layers of the UNet"],
    );
    // A LoRA has no moving average.
    assert!(run.join("samples/step-2-online.png").is_file());
    assert!(!run.join("samples/step-2-target.png").exists());
    for missing in ["unet", "unet_target"] {
        assert!(!run.join(missing).exists() && !run.join("checkpoint-1").join(missing).exists());
    }
    let (saved, finished) = (lora(&run.join("checkpoint-2")), lora(&run));
    assert_eq!(
        saved.keys().collect::<Vec<_>>(),
        finished.keys().collect::<Vec<_>>()
    );
    for (name, tensor) in &saved {
        assert_eq!(
            (tensor.dtype(), finished[name].dtype()),
            (DType::F32, DType::F16)
        );
        let rounded = tensor.to_dtype(DType::F16).unwrap();
        let values = |t: &Tensor| {
            t.flatten_all()
                .unwrap()
                .to_dtype(DType::F32)
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        assert_eq!(values(&rounded), values(&finished[name]), "{name}");
        assert!(
            values(tensor).iter().any(|x| *x != 0.0),
            "{name} is not trained"
        );
    }
    let kohya = load(run.join("unet_lora/lora_kohya.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(kohya.len(), finished.len() / 2 * 3);
    // The optimiser holds the moments of the adapters and no others.
    let moments = load(run.join("checkpoint-2/optimizer.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(moments.len(), 2 * finished.len());
    assert!(moments.keys().all(|name| name.contains(".lora_")));
}

#[test]
fn resumed_lora_equals_one_that_was_never_stopped() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let settings = [
        "lora.dropout=0.1",
        "optimizer.kind=adamw8bit",
        "train.teacher_dtype=f16",
    ];
    let run = |name: &str, steps: &str| {
        let steps = format!("train.max_steps={steps}");
        messages(train(&at(name), &[&settings[..], &[&steps]].concat()))
    };
    run("whole", "4");
    run("resumed", "2");
    says(&run("resumed", "4"), &["going on from", "checkpoint-2"]);
    assert_eq!(timeless(&at("whole")), timeless(&at("resumed")));
    for file in [
        "unet_lora/pytorch_lora_weights.safetensors",
        "unet_lora/lora_kohya.safetensors",
        "checkpoint-4/unet_lora/pytorch_lora_weights.safetensors",
        "checkpoint-4/optimizer.safetensors",
    ] {
        assert!(
            bytes(&at("whole").join(file)) == bytes(&at("resumed").join(file)),
            "{file}"
        );
    }
    // Other adapters, or another teacher, would make another student.
    let other = |more: &[&str], words: &[&str]| {
        let all = [&settings[..], &["train.max_steps=6"], more].concat();
        refused(train(&at("whole"), &all), 2, words);
    };
    other(
        &["lora.rank=8"],
        &["another configuration", "lora.rank was 4 and is 8"],
    );
    other(&["lora.alpha=2"], &["lora.alpha was 4"]);
    let teacher = changed_teacher(&folder, "unet", WEIGHTS_STEM, |tensors| {
        let bias = tensors.get_mut("conv_in.bias").unwrap();
        *bias = (&*bias + 1.0).unwrap();
    });
    other(
        &[&format!("model.teacher={}", text(&teacher))],
        &["other models", "UNet"],
    );
}

#[test]
fn recomputed_activations_change_no_bit_of_a_lora() {
    let folder = TempDir::new().unwrap();
    let students = ["true", "false"].map(|recompute| {
        let run = folder.path().join(recompute);
        let recompute = format!("train.gradient_checkpointing={recompute}");
        messages(train(
            &run,
            &[
                "train.max_steps=2",
                "lora.dropout=0.2",
                "lora.save_dtype=f32",
                &recompute,
            ],
        ));
        bytes(&run.join("unet_lora/pytorch_lora_weights.safetensors"))
    });
    assert!(students[0] == students[1]);
}

#[test]
fn keys_that_do_not_go_with_a_lora_are_refused() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let refuse = |setting: &str, words: &[&str]| refused(train(&run, &[setting]), 2, words);
    refuse(
        "distill.ema_decay=0.9",
        &["distill.ema_decay", "does not go with [lora]"],
    );
    refuse(
        "model.time_cond_proj_dim=64",
        &["model.time_cond_proj_dim", "does not go with [lora]"],
    );
    refuse("lora.targets=[]", &["lora.targets", "at least one"]);
    refuse("lora.save=['safetensors']", &["lora.save", "peft"]);
    assert!(!run.exists());
    refuse("lora.targets=['to_qq']", &["lora.targets", "to_qq", "to_q"]);
}

#[test]
fn shared_teacher_saves_memory() {
    let folder = TempDir::new().unwrap();
    let output = format!("train.output={}", text(&folder.path().join("run")));
    let plan = |config: &str| {
        let plan = succeed_json(&["check", "--json", "-c", config, "-s", &output]);
        let parts = plan["memory"]["parts"].as_array().unwrap().clone();
        let bytes = |what: &str| {
            let part = parts.iter().find(|part| part["what"] == what);
            part.map_or(0, |part| part["bytes"].as_u64().unwrap())
        };
        ["teacher", "student", "target", "optimizer"].map(bytes)
    };
    let (full, lora) = (plan("configs/quickstart.toml"), plan(QUICKSTART_LORA));
    assert_eq!(lora[0], full[0]);
    assert!(
        lora[1] * 2 < full[1] && lora[2] == 0 && lora[3] * 2 < full[3],
        "{full:?} {lora:?}"
    );
}

#[test]
fn lora_saved_for_kohya_alone_is_drawn_with() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    messages(train(&run, &["train.max_steps=1", "lora.save=['kohya']"]));
    assert!(
        !run.join("unet_lora/pytorch_lora_weights.safetensors")
            .exists()
    );
    let out = folder.path().join("apple.png");
    let drawing = ["--prompt", "red apple", "--steps", "1", "--out", text(&out)];
    let said = messages(command(
        &[&["sample", "--model", text(&run)][..], &drawing].concat(),
    ));
    says(&said, &["lora_kohya.safetensors", "LCM"]);
    assert!(out.is_file());
}
