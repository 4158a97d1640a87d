//! A small SDXL teacher, made of the quickstart's: two text encoders, two tokenizers, size ids.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use coffey::models::unet::WEIGHTS_STEM;
use coffey::models::{TEXT_ENCODER_STEM, UNetConfig, Weights, save_model};
use serde_json::{Map, Value, json};

use super::{copy, teacher};

/// Width of the quickstart's text encoder.
const TEXT: usize = 64;
/// Width of the pooled embedding.
pub(crate) const POOLED: usize = 20;
/// Width of a size id's sinusoid.
const ID: usize = 8;

fn tensors(folder: &Path, stem: &str) -> BTreeMap<String, Tensor> {
    let weights = Weights::load(folder, stem, DType::F32, &Device::Cpu);
    weights.unwrap().into_tensors()
}

fn read(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A tensor whose values look random, `scale` at most.
fn weights(shape: &[usize], scale: f32) -> Tensor {
    let count: usize = shape.iter().product();
    let values = (0..count).map(|i| scale * ((i * 7919 % 2003) as f32 / 1001.0 - 1.0));
    Tensor::from_vec(values.collect(), shape, &Device::Cpu).unwrap()
}

/// Writes the teacher as the folder `xl` in `folder`.
pub(crate) fn xl_teacher(folder: &Path) -> PathBuf {
    let xl = folder.join("xl");
    copy(&teacher(), &xl);
    second_text_encoder(&xl);
    second_tokenizer(&xl);
    unet(&xl.join("unet"));
    let index = xl.join("model_index.json");
    let mut map = read(&index);
    for (key, value) in [
        ("_class_name", json!("StableDiffusionXLPipeline")),
        ("image_encoder", json!([null, null])),
        ("force_zeros_for_empty_prompt", json!(true)),
        (
            "text_encoder_2",
            json!(["transformers", "CLIPTextModelWithProjection"]),
        ),
        ("tokenizer_2", json!(["transformers", "CLIPTokenizer"])),
    ] {
        map.insert(key.to_owned(), value);
    }
    for key in ["requires_safety_checker", "safety_checker"] {
        map.remove(key);
    }
    std::fs::write(index, Value::Object(map).to_string()).unwrap();
    xl
}

fn second_text_encoder(xl: &Path) {
    let first = xl.join("text_encoder");
    let mut config = read(&first.join("config.json"));
    for (key, value) in [
        ("architectures", json!(["CLIPTextModelWithProjection"])),
        ("dtype", json!("float32")),
        ("eos_token_id", json!(2)),
        ("hidden_act", json!("gelu")),
        ("projection_dim", json!(POOLED)),
    ] {
        config.insert(key.to_owned(), value);
    }
    let tensors = tensors(&first, TEXT_ENCODER_STEM).into_iter();
    let tensors = tensors.map(|(name, tensor)| {
        let short = name.strip_prefix("text_model.").unwrap_or(&name);
        (format!("text_model.{short}"), tensor)
    });
    let projection = (
        "text_projection.weight".to_owned(),
        weights(&[POOLED, TEXT], 0.2),
    );
    let tensors = tensors.chain([projection]).collect();
    let folder = xl.join("text_encoder_2");
    save_model(&folder, TEXT_ENCODER_STEM, &config, &tensors).unwrap();
}

/// The same vocabulary, padded with `!`, a special token with the id 0.
fn second_tokenizer(xl: &Path) {
    let folder = xl.join("tokenizer_2");
    copy(&xl.join("tokenizer"), &folder);
    let special = |content: &str| json!({"content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true});
    let (start, end) = ("<|startoftext|>", "<|endoftext|>");
    let roles = json!({"bos_token": start, "eos_token": end, "pad_token": "!", "unk_token": end});
    let mut config = roles.clone();
    config["model_max_length"] = json!(77);
    config["tokenizer_class"] = json!("CLIPTokenizer");
    config["added_tokens_decoder"] =
        json!({"0": special("!"), "1768": special(start), "1769": special(end)});
    for (name, content) in [("tokenizer_config", config), ("special_tokens_map", roles)] {
        std::fs::write(folder.join(format!("{name}.json")), content.to_string()).unwrap();
    }
}

/// Gives the UNet hidden states of both text encoders, pooled embeddings and size ids.
fn unet(folder: &Path) {
    let mut config = UNetConfig::read(folder).unwrap().to_json().clone();
    for (key, value) in [
        ("cross_attention_dim", json!(2 * TEXT)),
        ("addition_embed_type", json!("text_time")),
        ("addition_time_embed_dim", json!(ID)),
        (
            "projection_class_embeddings_input_dim",
            json!(POOLED + 6 * ID),
        ),
    ] {
        config.insert(key.to_owned(), value);
    }
    let mut tensors = tensors(folder, WEIGHTS_STEM);
    for (name, tensor) in &mut tensors {
        if name.ends_with("attn2.to_k.weight") || name.ends_with("attn2.to_v.weight") {
            let second = (&*tensor * 0.25).unwrap();
            *tensor = Tensor::cat(&[&*tensor, &second], 1).unwrap();
        }
    }
    let width = tensors["time_embedding.linear_2.weight"].dims()[0];
    for (name, shape) in [
        ("linear_1.weight", &[width, POOLED + 6 * ID][..]),
        ("linear_1.bias", &[width]),
        ("linear_2.weight", &[width, width]),
        ("linear_2.bias", &[width]),
    ] {
        tensors.insert(format!("add_embedding.{name}"), weights(shape, 0.05));
    }
    save_model(folder, WEIGHTS_STEM, &config, &tensors).unwrap();
}
