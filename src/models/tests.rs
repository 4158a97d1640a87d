//! Weights in all their files, and folders that are refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};
use tempfile::{TempDir, tempdir};

use super::golden::folder as golden;
use super::*;
use crate::ops::Attention;

const STEM: &str = unet::WEIGHTS_STEM;

fn tensors(dtype: DType) -> BTreeMap<String, Tensor> {
    let weights = Weights::load(&golden("unet-one-level"), STEM, dtype, &Device::Cpu).unwrap();
    weights.into_tensors()
}

/// A folder with the configuration of a golden model, changed, and no weights.
fn with_config(name: &str, change: impl Fn(&mut Map<String, Value>)) -> TempDir {
    let folder = tempdir().unwrap();
    let mut config = super::weights::read_json(&golden(name).join("config.json")).unwrap();
    change(&mut config);
    let text = Value::Object(config).to_string();
    std::fs::write(folder.path().join("config.json"), text).unwrap();
    folder
}

fn save(path: PathBuf, tensors: &BTreeMap<String, Tensor>) {
    let tensors = tensors.iter().map(|(n, t)| (n.as_str(), t));
    safetensors::serialize_to_file(tensors, None, &path).unwrap();
}

/// Writes two shards and their index.
fn save_shards(folder: &Path, index: &str, tensors: &BTreeMap<String, Tensor>) {
    let mut shards = [BTreeMap::new(), BTreeMap::new()];
    let mut weight_map = Map::new();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        shards[i % 2].insert(name.clone(), tensor.clone());
        weight_map.insert(name.clone(), json!(format!("part-{}.safetensors", i % 2)));
    }
    for (i, shard) in shards.iter().enumerate() {
        save(folder.join(format!("part-{i}.safetensors")), shard);
    }
    let text = json!({"metadata": {"total_size": 1}, "weight_map": weight_map}).to_string();
    std::fs::write(folder.join(index), text).unwrap();
}

fn load_unet(folder: &Path) -> Result<UNet, String> {
    UNet::load(folder, DType::F32, &Device::Cpu, Attention::Plain).map_err(|e| e.to_string())
}

#[track_caller]
fn refused(folder: &Path, words: &[&str]) {
    let message = load_unet(folder).unwrap_err();
    for word in words {
        assert!(message.contains(word), "should say {word:?}: {message}");
    }
}

#[test]
fn write_safetensors_equals_the_reference_writer() {
    let cpu = &Device::Cpu;
    let tensors = BTreeMap::from([
        ("b".to_owned(), Tensor::new(&[1f32, 2.0, 3.0], cpu).unwrap()),
        ("codes".to_owned(), Tensor::new(&[1u8, 2, 3], cpu).unwrap()),
        ("a".to_owned(), Tensor::new(&[[4f32], [5.0]], cpu).unwrap()),
    ]);
    let named = || tensors.iter().map(|(name, t)| (name.as_str(), t));
    let metadata = super::model_metadata();
    let expected = safetensors::serialize(named(), Some(metadata.clone())).unwrap();
    let mut written = Vec::new();
    super::write_safetensors(&mut written, named(), Some(metadata)).unwrap();
    assert_eq!(written, expected);
}

#[test]
fn weights_load_from_every_layout_and_dtype() {
    let want = tensors(DType::F32);
    for (name, sharded) in [
        ("diffusion_pytorch_model.safetensors", false),
        ("diffusion_pytorch_model.fp16.safetensors", false),
        ("diffusion_pytorch_model.safetensors.index.json", true),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", true),
        ("diffusion_pytorch_model.safetensors.fp16.index.json", true),
    ] {
        for dtype in [DType::F16, DType::BF16, DType::F32] {
            let folder = with_config("unet-one-level", |_| {});
            if sharded {
                save_shards(folder.path(), name, &tensors(dtype));
            } else {
                save(folder.path().join(name), &tensors(dtype));
            }
            load_unet(folder.path()).unwrap();
            let got = Weights::load(folder.path(), STEM, DType::F32, &Device::Cpu).unwrap();
            assert_eq!(got.tensors().len(), want.len(), "{name}");
            for (key, want) in &want {
                let got = &got.tensors()[key];
                assert_eq!(got.dtype(), DType::F32);
                let off = (got - want).unwrap().abs().unwrap().max_all().unwrap();
                let most = want.abs().unwrap().max_all().unwrap();
                let (off, most): (f32, f32) = (off.to_scalar().unwrap(), most.to_scalar().unwrap());
                let least = if dtype == DType::BF16 { 0.01 } else { 0.0 };
                assert!(off <= least * most, "{name}, {dtype:?}, {key}: {off}");
            }
        }
    }
}

#[test]
fn weights_name_damaged_files() {
    let folder = with_config("unet-one-level", |_| {});
    refused(
        folder.path(),
        &["no weights", "diffusion_pytorch_model.safetensors"],
    );
    let file = folder.path().join(format!("{STEM}.safetensors"));
    save(file.clone(), &tensors(DType::F16));
    let whole = std::fs::read(&file).unwrap();
    let name = file.to_str().unwrap();
    for length in [whole.len() - 1, whole.len() / 2, 100, 5] {
        std::fs::write(&file, &whole[..length]).unwrap();
        refused(
            folder.path(),
            &[name, "cut short", &format!("{length} bytes")],
        );
    }
    std::fs::write(&file, "").unwrap();
    refused(folder.path(), &[name, "empty"]);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n";
    std::fs::write(&file, pointer).unwrap();
    refused(folder.path(), &[name, "git lfs pull"]);
    std::fs::remove_file(&file).unwrap();
    save_shards(
        folder.path(),
        &format!("{STEM}.safetensors.index.json"),
        &tensors(DType::F16),
    );
    std::fs::remove_file(folder.path().join("part-1.safetensors")).unwrap();
    refused(
        folder.path(),
        &["index.json", "part-1.safetensors", "not in the folder"],
    );
    let index = folder.path().join(format!("{STEM}.safetensors.index.json"));
    std::fs::write(&index, r#"{"weight_map": {"a": "../a.safetensors"}}"#).unwrap();
    refused(folder.path(), &["index.json", "../a.safetensors"]);
}

#[test]
fn weights_are_read_as_diffusers_chooses() {
    let (full, half) = (tensors(DType::F32), tensors(DType::F16));
    let scaled = |tensors: &BTreeMap<String, Tensor>| -> BTreeMap<String, Tensor> {
        let scaled = tensors.iter().map(|(n, t)| (n.clone(), (t * 1.5).unwrap()));
        scaled.collect()
    };
    let folder = with_config("unet-one-level", |_| {});
    save_shards(
        folder.path(),
        &format!("{STEM}.safetensors.index.json"),
        &full,
    );
    save(
        folder.path().join(format!("{STEM}.fp16.safetensors")),
        &scaled(&half),
    );
    save(
        folder.path().join(format!("{STEM}.non_ema.safetensors")),
        &scaled(&full),
    );
    save(
        folder.path().join(format!("{STEM}.safetensors")),
        &scaled(&full),
    );
    let read = || {
        let weights = Weights::load(folder.path(), STEM, DType::F32, &Device::Cpu).unwrap();
        weights.tensors()["conv_in.weight"].to_vec_of_all()
    };
    assert_eq!(read(), full["conv_in.weight"].to_vec_of_all());
    std::fs::remove_file(folder.path().join(format!("{STEM}.safetensors.index.json"))).unwrap();
    assert_eq!(read(), scaled(&full)["conv_in.weight"].to_vec_of_all());
}

/// All values of a tensor of f32.
trait Values {
    fn to_vec_of_all(&self) -> Vec<f32>;
}

impl Values for Tensor {
    fn to_vec_of_all(&self) -> Vec<f32> {
        self.flatten_all().unwrap().to_vec1().unwrap()
    }
}

#[test]
fn weights_lose_the_prefixes_of_wrappers() {
    let plain = tensors(DType::F32);
    for (prefix, inner) in [
        ("_orig_mod.", ""),
        ("module._orig_mod.", ""),
        ("", "_orig_mod."),
    ] {
        let folder = with_config("unet-one-level", |_| {});
        let wrapped: BTreeMap<_, _> = plain
            .iter()
            .map(|(name, t)| {
                (
                    format!("{prefix}{}", name.replacen('.', &format!(".{inner}"), 1)),
                    t.clone(),
                )
            })
            .collect();
        save_shards(
            folder.path(),
            &format!("{STEM}.safetensors.index.json"),
            &wrapped,
        );
        load_unet(folder.path()).unwrap();
        let got = Weights::load(folder.path(), STEM, DType::F32, &Device::Cpu).unwrap();
        assert!(got.tensors().keys().eq(plain.keys()), "{prefix}{inner}");
    }
}

#[test]
fn weights_of_other_programs_are_named() {
    let rename = |rename: &dyn Fn(&str) -> String| {
        let folder = with_config("unet-one-level", |_| {});
        let tensors = tensors(DType::F32);
        let tensors = tensors.iter().map(|(name, t)| (rename(name), t.clone()));
        save(
            folder.path().join(format!("{STEM}.safetensors")),
            &tensors.collect(),
        );
        folder
    };
    let peft = rename(&|name| name.replace("conv1.weight", "conv1.base_layer.weight"));
    refused(peft.path(), &["missing", "base_layer", "merge_and_unload"]);
    let part = rename(&|name| format!("unet.{name}"));
    refused(
        part.path(),
        &["missing", "prefix \"unet.\"", "save_pretrained"],
    );
    let original = rename(&|name| format!("model.diffusion_model.{name}"));
    refused(original.path(), &["from_single_file"]);
}

#[test]
fn tensor_in_two_shards_is_refused() {
    let folder = with_config("unet-one-level", |_| {});
    let mut tensors = tensors(DType::F32);
    save_shards(
        folder.path(),
        &format!("{STEM}.safetensors.index.json"),
        &tensors,
    );
    let second = folder.path().join("part-1.safetensors");
    tensors.retain(|name, _| name == "conv_in.bias" || name.len() % 2 == 1);
    save(second, &tensors);
    refused(
        folder.path(),
        &["part-0.safetensors", "part-1.safetensors", "already"],
    );
}

#[test]
fn weights_name_the_shard_of_tensors_that_do_not_fit() {
    let change = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let folder = with_config("unet-one-level", |_| {});
        let mut tensors = tensors(DType::F16);
        change(&mut tensors);
        let index = format!("{STEM}.safetensors.index.json");
        save_shards(folder.path(), &index, &tensors);
        folder
    };
    let zeros = || Tensor::zeros(3, DType::F16, &Device::Cpu).unwrap();
    let wrong = change(&|t| drop(t.insert("conv_in.bias".to_owned(), zeros())));
    refused(
        wrong.path(),
        &["part-0.safetensors", "conv_in.bias", "[3]", "[9]"],
    );
    let extra = change(&|t| drop(t.insert("zz.nobody".to_owned(), zeros())));
    refused(extra.path(), &["part-", "zz.nobody", "no place"]);
    let missing = change(&|t| drop(t.remove("conv_out.bias")));
    refused(
        missing.path(),
        &["index.json", "conv_out.bias", "missing", "[4]"],
    );
}

#[test]
fn config_refuses_keys_that_are_not_built_by_name() {
    for (key, value, words) in [
        ("act_fn", json!("elu"), &["elu", "mish"][..]),
        ("act_func", json!("silu"), &["did you mean \"act_fn\""]),
        (
            "layer_per_block",
            json!(2),
            &["did you mean \"layers_per_block\""],
        ),
        (
            "quantization_config",
            json!({"quant_method": "bitsandbytes"}),
            &["quantization_config", "null"],
        ),
        (
            "_class_name",
            json!("UNet3DConditionModel"),
            &["UNet2DConditionModel"],
        ),
        ("block_out_channels", json!([]), &["1 to 10 numbers"]),
        (
            "block_out_channels",
            json!([9, 9]),
            &["down_block_types", "2"],
        ),
        (
            "down_block_types",
            json!(["AttnDownBlock2D"]),
            &["AttnDownBlock2D", "DownBlock2D"],
        ),
        (
            "up_block_types",
            json!(["UpBlock2D", "UpBlock2D"]),
            &["up_block_types", "1"],
        ),
        (
            "mid_block_type",
            json!("UNetMidBlock2DSimpleCrossAttn"),
            &["UNetMidBlock2D"],
        ),
        ("layers_per_block", json!([1, 2]), &["one value or 1"]),
        ("layers_per_block", json!(0), &["from 1 to 1000"]),
        ("layers_per_block", json!("two"), &["two", "one value"]),
        ("norm_num_groups", json!(null), &["null"]),
        ("norm_num_groups", json!(2), &["divisor"]),
        ("attention_head_dim", json!(0), &["attention_head_dim"]),
        ("attention_head_dim", json!(10), &["from 1 to 9"]),
        ("num_attention_heads", json!(3), &["num_attention_heads"]),
        (
            "transformer_layers_per_block",
            json!([[1]]),
            &["reverse_transformer"],
        ),
        (
            "reverse_transformer_layers_per_block",
            json!([[1]]),
            &["2 of them"],
        ),
        (
            "class_embed_type",
            json!("timestep"),
            &["class_embed_type", "null"],
        ),
        ("encoder_hid_dim", json!(8), &["encoder_hid_dim"]),
        (
            "addition_embed_type",
            json!("text_time"),
            &["addition_embed_type"],
        ),
        ("attention_type", json!("gated"), &["attention_type"]),
        (
            "dual_cross_attention",
            json!(true),
            &["dual_cross_attention"],
        ),
        ("dropout", json!(0.1), &["dropout"]),
        (
            "downsample_padding",
            json!(2),
            &["downsample_padding", "0, 1"],
        ),
        ("conv_in_kernel", json!(4), &["odd"]),
        (
            "resnet_time_scale_shift",
            json!("ada_group"),
            &["scale_shift"],
        ),
        ("time_embedding_type", json!("fourier"), &["positional"]),
    ] {
        let folder = with_config("unet-one-level", |config| {
            config.insert(key.to_owned(), value.clone());
        });
        let message = UNetConfig::read(folder.path()).unwrap_err().to_string();
        for word in words.iter().chain(&["config.json"]) {
            assert!(message.contains(word), "{key} {value}: {word:?}? {message}");
        }
    }
    let mixed = with_config("unet-odd-latents", |config| {
        config.insert("cross_attention_dim".to_owned(), json!([6, 6, 5]));
        config.insert(
            "mid_block_type".to_owned(),
            json!("UNetMidBlock2DCrossAttn"),
        );
    });
    let message = UNetConfig::read(mixed.path()).unwrap_err().to_string();
    assert!(message.contains("cross_attention_dim"), "{message}");
    for (key, value) in [
        ("act_fn", json!("elu")),
        ("scaling_facto", json!(1.0)),
        ("latents_mean", json!([0.0])),
        ("shift_factor", json!(0.1)),
        ("norm_num_groups", json!(3)),
        ("in_channels", json!(4)),
    ] {
        let folder = with_config("vae", |config| {
            config.insert(key.to_owned(), value.clone());
        });
        let message = VaeConfig::read(folder.path()).unwrap_err().to_string();
        assert!(message.contains(key), "{key}: {message}");
    }
}

#[test]
fn config_names_all_faults_at_once() {
    let folder = with_config("unet-one-level", |config| {
        for (key, value) in [
            ("act_fn", json!("elu")),
            ("layer_per_block", json!(2)),
            ("class_embed_type", json!("timestep")),
            ("conv_in_kernel", json!(4)),
            ("in_channels", json!("four")),
            ("mid_block_type", json!("Other")),
        ] {
            config.insert(key.to_owned(), value);
        }
    });
    let message = UNetConfig::read(folder.path()).unwrap_err().to_string();
    for word in [
        "elu",
        "layer_per_block",
        "class_embed_type",
        "odd",
        "four",
        "Other",
    ] {
        assert!(message.contains(word), "{word}? {message}");
    }
    assert_eq!(message.matches("config.json").count(), 1, "{message}");
    let folder = with_config("text_encoder", |config| {
        config.insert("hidden_act".to_owned(), json!("gelu_new"));
        config.insert("num_attention_heads".to_owned(), json!(5));
    });
    let error = ClipTextModel::load(folder.path(), DType::F32, &Device::Cpu).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("gelu_new") && message.contains("num_attention_heads"),
        "{message}"
    );
}

#[test]
fn config_ignores_keys_that_diffusers_ignores() {
    let ema = [
        ("decay", json!(0.9999)),
        ("inv_gamma", json!(1.0)),
        ("min_decay", json!(0.0)),
        ("optimization_step", json!(5)),
        ("power", json!(2.0 / 3.0)),
        ("update_after_step", json!(0)),
        ("use_ema_warmup", json!(false)),
        ("colour", json!("green")),
        ("quantization_config", json!(null)),
    ];
    for name in ["unet-one-level", "vae"] {
        let folder = with_config(name, |config| {
            config.extend(
                ema.iter()
                    .map(|(key, value)| ((*key).to_owned(), value.clone())),
            );
        });
        if name == "vae" {
            VaeConfig::read(folder.path()).unwrap();
            continue;
        }
        // diffusers' constructor takes none of them, and a student's configuration goes to it.
        let student = UNetConfig::read(folder.path())
            .unwrap()
            .with_guidance_embedding(8);
        for (key, _) in &ema {
            assert!(!student.to_json().contains_key(*key), "{key}");
        }
    }
}

#[test]
fn config_reads_defaults_and_keys_without_effect() {
    let folder = tempdir().unwrap();
    std::fs::write(
        folder.path().join("config.json"),
        "\u{feff}{\"_diffusers_version\": \"0.2.2\", \"_note\": NaN}",
    )
    .unwrap();
    let config = UNetConfig::read(folder.path()).unwrap();
    assert_eq!(config.cross_attention_dim, 1280);
    assert_eq!(config.base_channels(), 320);
    assert_eq!(config.sample_size, [64, 64]);
    assert_eq!(
        UNetConfig::read(&golden("unet-one-level"))
            .unwrap()
            .sample_size,
        [6, 3]
    );
}

#[test]
fn text_encoder_refuses_what_is_not_built_by_name() {
    for (key, value) in [
        ("hidden_act", json!("gelu_new")),
        ("model_type", json!("clip")),
        ("num_attention_heads", json!(5)),
        ("hidden_size", json!(null)),
    ] {
        let folder = with_config("text_encoder", |config| {
            config.insert(key.to_owned(), value.clone());
        });
        let error = ClipTextModel::load(folder.path(), DType::F32, &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains(key), "{key}: {error}");
    }
    let model = ClipTextModel::load(&golden("text_encoder"), DType::F32, &Device::Cpu).unwrap();
    for (ids, words) in [
        (vec![98, 100, 99], ["100", "vocabulary"]),
        (vec![98; 78], ["78", "77"]),
    ] {
        let message = model.forward(&[ids]).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
}
