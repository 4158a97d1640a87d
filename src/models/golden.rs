//! Comparison with what diffusers and transformers computed: `tests/reference/make_golden.py` made the files.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use sha2::{Digest, Sha256};

use super::*;
use crate::ops::{self, Activations, Attention};

/// A folder of golden files.
pub(super) fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn load(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder(name).join("forward.safetensors"), &Device::Cpu).unwrap()
}

fn assert_close(what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    assert_within(1e-4, what, got, want)
}

/// Golden gradients are made in f64. PyTorch's own in f32 are up to 1e-4 from them, where sums nearly cancel.
const GRADIENT_TOLERANCE: f32 = 3e-4;

fn assert_within(tolerance: f32, what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let scale = want.abs()?.max_all()?.to_scalar::<f32>()?;
    let worst = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(
        worst <= tolerance * scale,
        "{what}: differs by {worst}, the largest value is {scale}"
    );
    Ok(())
}

const UNETS: [&str; 6] = [
    "unet-two-levels",
    "unet-three-levels",
    "unet-odd-latents",
    "unet-no-middle",
    "unet-one-level",
    "unet-text-time",
];

#[test]
fn unet_outputs_and_gradients_equal_diffusers() -> Result<()> {
    for name in UNETS {
        for (attention, activations) in [
            (Attention::MemoryEfficient, Activations::Recompute),
            (Attention::Plain, Activations::Keep),
        ] {
            let golden = load(name);
            let config = UNetConfig::read(&folder(name)).unwrap();
            let weights =
                Weights::load(&folder(name), unet::WEIGHTS_STEM, DType::F32, &Device::Cpu).unwrap();
            let vars: Vec<(String, Var)> = weights
                .into_tensors()
                .into_iter()
                .map(|(name, tensor)| (name, Var::from_tensor(&tensor).unwrap()))
                .collect();
            let tensors = vars
                .iter()
                .map(|(n, v)| (n.clone(), v.as_tensor().clone()))
                .collect();
            let weights = Weights::new(tensors, name);
            let unet = UNet::new(weights.builder(), &config, attention)
                .unwrap()
                .with_activations(activations);
            weights.expect_all_taken(&[]).unwrap();
            let conditioning = Conditioning {
                hidden: golden["encoder_hidden_states"].clone(),
                pooled: golden.get("text_embeds").cloned(),
                size: golden.get("time_ids").cloned(),
                guidance: golden.get("timestep_cond").cloned(),
            };
            let timesteps: Vec<i64> = golden["timestep"].to_vec1()?;
            let (grads, output) = ops::gradients(|| {
                let output = unet.forward(&golden["sample"], &timesteps, &conditioning)?;
                Ok((output.mul(&golden["output_grad"])?.sum_all()?, output))
            })?;
            assert_close(name, &output, &golden["output"])?;
            let wanted = golden.keys().filter(|key| key.starts_with("grad."));
            let (wanted, mut compared) = (wanted.count(), 0);
            for (param, var) in &vars {
                let grad = grads
                    .get(var)
                    .unwrap_or_else(|| panic!("{name}: {param} has no gradient"));
                if let Some(want) = golden.get(&format!("grad.{param}")) {
                    assert_within(GRADIENT_TOLERANCE, param, grad, want)?;
                    compared += 1;
                }
            }
            assert!(
                wanted >= 5 && compared == wanted,
                "{name}: {compared} of {wanted} gradients were compared"
            );
        }
    }
    Ok(())
}

/// Gives every tensor that is asked for, without storage, and notes its shape.
#[derive(Default)]
struct AnyTensor(std::sync::Arc<std::sync::Mutex<BTreeMap<String, Vec<usize>>>>);

impl SimpleBackend for AnyTensor {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let dims = shape.dims().to_vec();
        assert!(self.0.lock().unwrap().insert(name.into(), dims).is_none());
        Tensor::zeros(1, dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("{name} was asked for without a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

#[test]
fn unets_of_full_size_have_the_tensors_of_diffusers() {
    #[derive(serde::Deserialize)]
    struct FullSize {
        config: serde_json::Value,
        tensors: usize,
        parameters: usize,
        sha256: String,
    }
    let golden: BTreeMap<String, FullSize> =
        super::weights::read_json(&folder("full_size.json")).unwrap();
    assert_eq!(golden.keys().collect::<Vec<_>>(), ["sd15", "sd21", "sdxl"]);
    for (name, wanted) in golden {
        let folder = tempfile::tempdir().unwrap();
        let text = wanted.config.to_string();
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        let config = UNetConfig::read(folder.path()).unwrap();
        let backend = AnyTensor::default();
        let shapes = std::sync::Arc::clone(&backend.0);
        let vb = VarBuilder::from_backend(Box::new(backend), DType::F32, Device::Cpu);
        UNet::new(vb, &config, Attention::Plain).unwrap();
        let shapes = shapes.lock().unwrap();
        let lines = shapes.iter().map(|(name, shape)| {
            let shape: Vec<String> = shape.iter().map(ToString::to_string).collect();
            format!("{name} {}\n", shape.join(","))
        });
        let lines: String = lines.collect();
        let parameters: usize = shapes.values().map(|s| s.iter().product::<usize>()).sum();
        assert_eq!(shapes.len(), wanted.tensors, "{name}");
        assert_eq!(parameters, wanted.parameters, "{name}");
        let hash = format!("{:x}", Sha256::digest(&lines));
        assert_eq!(hash, wanted.sha256, "{name}: {lines}");
    }
}

#[test]
fn autoencoder_equals_diffusers() -> Result<()> {
    for name in ["vae", "vae-bare"] {
        compare_autoencoder(&folder(name), &load(name))?;
    }
    Ok(())
}

fn compare_autoencoder(folder: &Path, golden: &HashMap<String, Tensor>) -> Result<()> {
    let vae = AutoencoderKl::load(folder, DType::F32, &Device::Cpu).unwrap();
    assert_close(
        "moments",
        &vae.encode(&golden["pixels"])?,
        &golden["moments"],
    )?;
    // The bare one has one level less, so that it decodes to another size.
    assert_close(
        "decoded",
        &vae.decode(&golden["latents"])?,
        &golden["decoded"],
    )
}

/// A copy of a model's folder with its tensors under other names and some keys of its configuration changed.
fn altered(
    name: &str,
    stem: &str,
    rename: impl Fn(&str) -> String,
    keys: &[(&str, serde_json::Value)],
) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let mut config: serde_json::Map<String, serde_json::Value> =
        super::weights::read_json(&folder(name).join("config.json")).unwrap();
    for (key, value) in keys {
        config.insert((*key).to_owned(), value.clone());
    }
    let file = folder(name).join(format!("{stem}.safetensors"));
    let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let tensors = tensors.into_iter().map(|(name, t)| (rename(&name), t));
    save_model(copy.path(), stem, &config, &tensors.collect()).unwrap();
    copy
}

#[test]
fn autoencoder_reads_old_attention_names() -> Result<()> {
    let old = |name: &str| {
        let name = name.replace("to_q", "query").replace("to_k", "key");
        name.replace("to_v", "value")
            .replace("to_out.0", "proj_attn")
    };
    let copy = altered("vae", unet::WEIGHTS_STEM, old, &[]);
    compare_autoencoder(copy.path(), &load("vae"))
}

#[test]
fn text_encoder_equals_transformers() -> Result<()> {
    let golden = load("text_encoder");
    let ids: Vec<Vec<u32>> = golden["input_ids"].to_dtype(DType::U32)?.to_vec2()?;
    let states = |folder: &Path| {
        let model = ClipTextModel::load(folder, DType::F32, &Device::Cpu).unwrap();
        model.forward(&ids)
    };
    let want = &golden["last_hidden_state"];
    assert_close("quick_gelu", &states(&folder("text_encoder"))?, want)?;
    let same = |name: &str| name.strip_prefix("text_model.").unwrap_or(name).to_owned();
    let plain = altered("text_encoder", "model", same, &[]);
    assert_close("without prefix", &states(plain.path())?, want)?;
    let prefixed = |name: &str| format!("text_model.{}", same(name));
    let prefixed = altered("text_encoder", "model", prefixed, &[]);
    assert_close("with prefix", &states(prefixed.path())?, want)?;
    let gelu = [("hidden_act", "gelu".into())];
    let gelu = altered("text_encoder", "model", same, &gelu);
    assert_close(
        "gelu",
        &states(gelu.path())?,
        &golden["last_hidden_state.gelu"],
    )
}

#[test]
fn text_encoder_with_projection_equals_transformers() -> Result<()> {
    const NAME: &str = "text_encoder_2";
    let golden = load(NAME);
    let ids: Vec<Vec<u32>> = golden["input_ids"].to_dtype(DType::U32)?.to_vec2()?;
    let compare = |folder: &Path, pooled: &str| {
        let model = ClipTextModel::load_with_projection(folder, DType::F32, &Device::Cpu).unwrap();
        assert_eq!((model.width(), model.projection_width()), (32, Some(24)));
        let states = model.penultimate(&ids)?;
        assert_close("hidden states", &states.hidden, &golden["hidden_states"])?;
        assert_close(pooled, &states.pooled.unwrap(), &golden[pooled])
    };
    compare(&folder(NAME), "text_embeds")?;
    for (end, pooled) in [(2, "text_embeds.2"), (98, "text_embeds.98")] {
        let keys = [("eos_token_id", end.into())];
        let other = altered(NAME, "model", str::to_owned, &keys);
        compare(other.path(), pooled)?;
    }
    // Without a projection asked for, there is none; one that is asked for must be there.
    let plain = ClipTextModel::load(&folder(NAME), DType::F32, &Device::Cpu).unwrap();
    let states = plain.penultimate(&ids)?;
    assert!(plain.projection_width().is_none() && states.pooled.is_none());
    assert_close("hidden states", &states.hidden, &golden["hidden_states"])?;
    let first = folder("text_encoder");
    let missing = ClipTextModel::load_with_projection(&first, DType::F32, &Device::Cpu);
    let message = missing.unwrap_err().to_string();
    assert!(message.contains("text_projection.weight"), "{message}");
    Ok(())
}

#[test]
fn tokenizer_ids_equal_transformers() {
    let teacher =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("assets/quickstart/teacher/tokenizer");
    let tokenizer = ClipTokenizer::load(&teacher).unwrap();
    let path = folder("tokenizer.json");
    let golden: Vec<(String, Vec<u32>)> =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(golden.len() > 50);
    for (caption, ids) in golden {
        assert_eq!(tokenizer.encode(&caption).unwrap().ids, ids, "{caption:?}");
    }
}

#[test]
fn tokenizer_finds_special_tokens_as_transformers() {
    #[derive(serde::Deserialize)]
    struct Case {
        tokenizer_config: serde_json::Value,
        special_tokens_map: Option<serde_json::Value>,
        ids: Vec<(String, Vec<u32>)>,
    }
    let vocabulary =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("assets/quickstart/teacher/tokenizer");
    let cases: Vec<Case> = super::weights::read_json(&folder("special_tokens.json")).unwrap();
    assert!(cases.len() >= 5);
    for (i, case) in cases.iter().enumerate() {
        let copy = tempfile::tempdir().unwrap();
        let write = |name: &str, value: &serde_json::Value| {
            std::fs::write(copy.path().join(name), value.to_string()).unwrap();
        };
        for name in ["vocab.json", "merges.txt"] {
            std::fs::copy(vocabulary.join(name), copy.path().join(name)).unwrap();
        }
        write("tokenizer_config.json", &case.tokenizer_config);
        if let Some(map) = &case.special_tokens_map {
            write("special_tokens_map.json", map);
        }
        let tokenizer = ClipTokenizer::load(copy.path()).unwrap();
        for (caption, ids) in &case.ids {
            let found = tokenizer.encode(caption).unwrap().ids;
            assert_eq!(&found, ids, "{i}: {caption:?}");
        }
    }
}

mod needs_python {
    use super::*;

    /// diffusers finds nothing missing, unexpected or different in folders that coffey wrote.
    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with PyTorch and diffusers"]
    fn unets_written_load_in_diffusers() {
        let python = std::env::var_os("COFFEY_PYTHON")
            .expect("COFFEY_PYTHON is not set; README.md says how to run this test");
        for name in UNETS {
            let config = UNetConfig::read(&folder(name)).unwrap();
            let cpu = &Device::Cpu;
            let weights =
                Weights::load(&folder(name), unet::WEIGHTS_STEM, DType::F32, cpu).unwrap();
            let copy = tempfile::tempdir().unwrap();
            let (json, tensors) = (config.to_json(), weights.tensors());
            save_model(copy.path(), unet::WEIGHTS_STEM, json, tensors).unwrap();
            let script =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/check_unet.py");
            let output = std::process::Command::new(&python)
                .arg(script)
                .arg(copy.path())
                .arg(folder(name).join("forward.safetensors"))
                .output()
                .unwrap();
            assert!(output.status.success(), "{name}: {output:?}");
        }
    }
}

#[test]
fn unet_names_tensors_that_do_not_fit() {
    let tensor = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let config = UNetConfig::read(&folder("unet-two-levels")).unwrap();
    let load = || {
        Weights::load(
            &folder("unet-two-levels"),
            unet::WEIGHTS_STEM,
            DType::F32,
            &Device::Cpu,
        )
        .unwrap()
    };
    let error = |tensors| {
        let weights = Weights::new(tensors, "some/unet");
        match UNet::new(weights.builder(), &config, Attention::Plain) {
            Err(e) => e.to_string(),
            Ok(_) => weights.expect_all_taken(&[]).unwrap_err().to_string(),
        }
    };
    let mut missing = load().into_tensors();
    missing.remove("mid_block.resnets.1.conv2.bias");
    let message = error(missing);
    assert!(
        message.contains("some/unet") && message.contains("mid_block.resnets.1.conv2.bias"),
        "{message}"
    );
    let mut wrong = load().into_tensors();
    wrong.insert("conv_in.bias".into(), tensor(&[3]));
    let message = error(wrong);
    assert!(
        message.contains("conv_in.bias") && message.contains("[3]") && message.contains("[16]"),
        "{message}"
    );
    let mut extra = load().into_tensors();
    extra.insert("down_blocks.7.nobody".into(), tensor(&[3]));
    let message = error(extra);
    assert!(message.contains("down_blocks.7.nobody"), "{message}");
}
