//! Comparison with what diffusers and transformers computed: `tests/reference/make_golden.py` made the files.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Result, Tensor, Var};

use super::*;
use crate::ops::Attention;

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn load(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder(name).join("forward.safetensors"), &Device::Cpu).unwrap()
}

fn assert_close(what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let scale = want.abs()?.max_all()?.to_scalar::<f32>()?;
    let worst = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(
        worst <= 1e-4 * scale,
        "{what}: differs by {worst}, the largest value is {scale}"
    );
    Ok(())
}

#[test]
fn unet_outputs_and_gradients_equal_diffusers() -> Result<()> {
    for name in ["unet-two-levels", "unet-three-levels"] {
        for attention in [Attention::MemoryEfficient, Attention::Plain] {
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
            let unet = UNet::new(&weights.root(), &config, attention).unwrap();
            weights.expect_all_taken(&[]).unwrap();
            let conditioning = Conditioning {
                prompt_embeds: golden["encoder_hidden_states"].clone(),
                guidance_embedding: golden.get("timestep_cond").cloned(),
            };
            let output = unet.forward(
                &golden["sample"],
                &golden["timestep"].to_vec1()?,
                &conditioning,
            )?;
            assert_close(name, &output, &golden["output"])?;
            let grads = output.mul(&golden["output_grad"])?.sum_all()?.backward()?;
            let mut compared = 0;
            for (param, var) in &vars {
                let grad = grads
                    .get(var)
                    .unwrap_or_else(|| panic!("{name}: {param} has no gradient"));
                if let Some(want) = golden.get(&format!("grad.{param}")) {
                    assert_close(param, grad, want)?;
                    compared += 1;
                }
            }
            assert!(compared >= 10, "only {compared} gradients were compared");
        }
    }
    Ok(())
}

#[test]
fn autoencoder_equals_diffusers() -> Result<()> {
    let golden = load("vae");
    let vae = AutoencoderKl::load(&folder("vae"), DType::F32, &Device::Cpu).unwrap();
    assert_close(
        "moments",
        &vae.encode(&golden["pixels"])?,
        &golden["moments"],
    )?;
    assert_close(
        "decoded",
        &vae.decode(&golden["latents"])?,
        &golden["decoded"],
    )
}

#[test]
fn text_encoder_equals_transformers() -> Result<()> {
    let golden = load("text_encoder");
    let ids: Vec<Vec<u32>> = golden["input_ids"].to_dtype(DType::U32)?.to_vec2()?;
    let model = ClipTextModel::load(&folder("text_encoder"), DType::F32, &Device::Cpu).unwrap();
    assert_close(
        "quick_gelu",
        &model.forward(&ids)?,
        &golden["last_hidden_state"],
    )
}

#[test]
fn token_ids_equal_transformers() {
    let teacher =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("assets/quickstart/teacher/tokenizer");
    let tokenizer = ClipTokenizer::load(&teacher).unwrap();
    let path = folder("tokenizer.json");
    let golden: Vec<(String, Vec<u32>)> =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(golden.len() > 50);
    for (caption, ids) in golden {
        assert_eq!(tokenizer.encode(&caption).unwrap(), ids, "{caption:?}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
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
        match UNet::new(&weights.root(), &config, Attention::Plain) {
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
