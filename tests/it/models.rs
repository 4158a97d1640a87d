//! Pipelines with mismatched parts or damaged files: every command refuses them before it writes anything.

use std::path::Path;

use crate::support::{PRECOMPUTE, QUICKSTART, copy, refuse, succeed_json, teacher, text};
use candle_core::{DType, Device, Tensor};
use coffey::models::unet::WEIGHTS_STEM;
use coffey::models::{UNetConfig, Weights, save_model};
use serde_json::json;
use tempfile::TempDir;

/// Runs `train`, `check`, `precompute` and `sample` with a teacher that each must refuse with its code and without output.
fn refused_by_all(folder: &TempDir, teacher: &Path, codes: [i32; 4], words: &[&str]) {
    let out = |name: &str| folder.path().join(name);
    let teacher_key = format!("model.teacher={}", teacher.display());
    let run = format!("train.output={}", out("run").display());
    let latents = format!("latents.output={}", out("latents").display());
    let image = out("image.png");
    let commands = [
        &["train", "-c", QUICKSTART, "-s", &teacher_key, "-s", &run],
        &["check", "-c", QUICKSTART, "-s", &teacher_key, "-s", &run],
        &[
            "precompute",
            "-c",
            PRECOMPUTE,
            "-s",
            &teacher_key,
            "-s",
            &latents,
        ],
        &[
            "sample",
            "--model",
            text(teacher),
            "--prompt",
            "x",
            "--out",
            text(&image),
        ],
    ];
    for (args, code) in commands.into_iter().zip(codes) {
        refuse(code, args, words);
    }
    for name in ["run/metrics.jsonl", "latents/manifest.json", "image.png"] {
        assert!(!out(name).exists(), "{name}");
    }
}

#[test]
fn text_encoder_of_other_width_is_refused() {
    let folder = TempDir::new().unwrap();
    let pipeline = folder.path().join("teacher");
    copy(&teacher(), &pipeline);
    let unet = pipeline.join("unet");
    // The same UNet for text embeddings of width 48; the encoder's are 64 wide.
    let mut config = UNetConfig::read(&unet).unwrap().to_json().clone();
    config.insert("cross_attention_dim".to_owned(), json!(48));
    let weights = Weights::load(&unet, WEIGHTS_STEM, DType::F32, &Device::Cpu).unwrap();
    let tensors = weights.into_tensors().into_iter().map(|(name, tensor)| {
        let of_text = name.contains("attn2.to_k") || name.contains("attn2.to_v");
        let tensor = if of_text {
            tensor.narrow(1, 0, 48).unwrap().contiguous().unwrap()
        } else {
            tensor
        };
        (name, tensor)
    });
    save_model(&unet, WEIGHTS_STEM, &config, &tensors.collect()).unwrap();
    refused_by_all(&folder, &pipeline, [2, 2, 2, 1], &["width", "64", "48"]);
}

#[test]
fn damaged_text_encoder_file_is_named() {
    let folder = TempDir::new().unwrap();
    let pipeline = folder.path().join("teacher");
    copy(&teacher(), &pipeline);
    let file = pipeline.join("text_encoder/model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 7]).unwrap();
    refused_by_all(&folder, &pipeline, [1; 4], &[text(&file), "cut short"]);
}

#[test]
fn text_encoder_with_rows_for_unknown_tokens_is_refused() {
    let folder = TempDir::new().unwrap();
    let pipeline = folder.path().join("teacher");
    copy(&teacher(), &pipeline);
    // A textual inversion: one more token embedding.
    let part = pipeline.join("text_encoder");
    let weights = Weights::load(&part, "model", DType::F32, &Device::Cpu).unwrap();
    let mut tensors = weights.into_tensors();
    let (_, rows) = tensors
        .iter_mut()
        .find(|(name, _)| name.ends_with("token_embedding.weight"))
        .unwrap();
    *rows = Tensor::cat(&[&*rows, &rows.narrow(0, 5, 1).unwrap()], 0).unwrap();
    let config = std::fs::read_to_string(part.join("config.json")).unwrap();
    let mut config: serde_json::Map<_, _> = serde_json::from_str(&config).unwrap();
    config.insert("vocab_size".to_owned(), json!(1771));
    save_model(&part, "model", &config, &tensors).unwrap();
    let words = ["1770", "1771", "vocab_size", "added_tokens.json"];
    refused_by_all(&folder, &pipeline, [1, 1, 1, 1], &words);

    // With its token the pipeline is complete.
    let tokens = json!({"<cat-toy>": 1770}).to_string();
    std::fs::write(pipeline.join("tokenizer/added_tokens.json"), tokens).unwrap();
    let teacher = format!("model.teacher={}", pipeline.display());
    let output = format!("train.output={}", folder.path().join("run").display());
    let report = succeed_json(&[
        "check", "-c", QUICKSTART, "--json", "-s", &teacher, "-s", &output,
    ]);
    assert!(report.to_string().contains("1771 tokens"), "{report}");
}
