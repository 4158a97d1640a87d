mod real_unets;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::{DType, Device, Result, Tensor};
use tempfile::TempDir;

use super::*;
use crate::models::write_safetensors;

/// Adapters of some modules, filled with numbers that differ.
fn adapters(modules: &Modules, rank: usize, alpha: f64) -> Lora {
    let mut seed = 0.0;
    let adapters = modules.iter().map(|(module, shape)| {
        let mut filled = |shape: Vec<usize>| {
            seed += 1.0;
            let values = (0..shape.iter().product()).map(|i| (i as f32 * 0.7 + seed).sin());
            Tensor::from_iter(values, &Device::Cpu)
                .unwrap()
                .reshape(shape)
                .unwrap()
        };
        let mut up = vec![shape[0], rank];
        up.extend(&shape[2..].iter().map(|_| 1).collect::<Vec<_>>());
        let adapter = Adapter {
            down: filled([&[rank], &shape[1..]].concat()),
            up: filled(up),
            alpha,
        };
        (module.to_owned(), adapter)
    });
    Lora {
        adapters: adapters.collect(),
    }
}

/// A linear module and a convolution.
fn two_modules() -> Modules {
    let shapes = [
        ("a.to_q.weight", vec![6, 4]),
        ("b.0.conv1.weight", vec![5, 3, 3, 3]),
        ("a.norm.weight", vec![4]),
        ("a.to_q.bias", vec![6]),
    ];
    shapes
        .into_iter()
        .map(|(name, shape)| (name.to_owned(), shape))
        .collect()
}

fn write(folder: &TempDir, tensors: &[(&str, Tensor)], metadata: &[(&str, &str)]) -> PathBuf {
    let path = folder.path().join("lora.safetensors");
    let mut file = std::fs::File::create(&path).unwrap();
    let metadata: HashMap<_, _> = metadata
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    let tensors = tensors.iter().map(|(name, tensor)| (*name, tensor));
    write_safetensors(&mut file, tensors, Some(metadata)).unwrap();
    path
}

fn changes(lora: &Lora) -> BTreeMap<String, Vec<f32>> {
    let base = lora.adapters.iter().map(|(module, adapter)| {
        let [out, r] = [0, 1].map(|dim| adapter.up.dim(dim).unwrap());
        assert_eq!(r, adapter.rank());
        let shape = [&[out], &adapter.down.dims()[1..]].concat();
        let zeros = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        (format!("{module}.weight"), zeros)
    });
    let mut base = base.collect();
    merge(&mut base, lora, 1.0).unwrap();
    base.into_iter()
        .map(|(name, tensor)| (name, tensor.flatten_all().unwrap().to_vec1().unwrap()))
        .collect()
}

#[test]
fn every_layout_reads_back_as_it_was() {
    let folder = TempDir::new().unwrap();
    let modules = two_modules();
    let lora = adapters(&modules, 2, 5.0);
    for layout in [
        Layout::Diffusers,
        Layout::DiffusersWithAlpha,
        Layout::Kohya(Some(BaseVersion::Sd2)),
        Layout::Peft,
    ] {
        let path = folder.path().join("adapter_model.safetensors");
        let contents = lora.contents(layout, DType::F32).unwrap();
        let mut bytes = [Vec::new(), Vec::new()];
        for bytes in &mut bytes {
            contents.write(bytes).unwrap();
        }
        assert_eq!(bytes[0], bytes[1]);
        std::fs::write(&path, &bytes[0]).unwrap();
        let config = folder.path().join("adapter_config.json");
        std::fs::write(config, lora.adapter_config()).unwrap();
        let read = read(&path, &modules).unwrap();
        assert_eq!(read.warning(&path), None);
        for (module, adapter) in &read.lora.adapters {
            let folded = layout == Layout::Diffusers;
            assert_eq!(
                adapter.alpha,
                if folded { 2.0 } else { 5.0 },
                "{layout:?} {module}"
            );
        }
        let (got, want) = (changes(&read.lora), changes(&lora));
        assert_eq!(got.len(), 2);
        for (name, want) in want {
            for (got, want) in got[&name].iter().zip(want) {
                assert!((got - want).abs() < 1e-5, "{layout:?} {name}");
            }
        }
    }
}

#[test]
fn alphas_that_differ_are_in_the_metadata() {
    let folder = TempDir::new().unwrap();
    let modules = two_modules();
    let mut lora = adapters(&modules, 2, 5.0);
    let other = adapters(&modules, 3, 1.5)
        .adapters
        .remove("a.to_q")
        .unwrap();
    lora.adapters.insert("a.to_q".to_owned(), other);
    let contents = lora
        .contents(Layout::DiffusersWithAlpha, DType::F32)
        .unwrap();
    let path = folder.path().join("x.safetensors");
    contents
        .write(&mut std::fs::File::create(&path).unwrap())
        .unwrap();
    let read = read(&path, &modules).unwrap().lora;
    let found = ["a.to_q", "b.0.conv1"].map(|module| {
        let adapter = &read.adapters[module];
        (adapter.rank(), adapter.alpha)
    });
    assert_eq!(found, [(3, 1.5), (2, 5.0)]);
    let third = lora.adapters["b.0.conv1"].clone();
    lora.adapters.insert("c".to_owned(), third);
    let contents = lora.contents(Layout::Kohya(None), DType::F32).unwrap();
    let alphas = contents.tensors.iter();
    let alphas = alphas.filter(|(name, _)| name.ends_with(".alpha"));
    let alphas: Vec<f32> = alphas.map(|(_, t)| t.to_scalar().unwrap()).collect();
    assert_eq!(alphas, [5.0; 3]);
    let want = (&lora.adapters["a.to_q"].up * 1.5).unwrap();
    let got = (&contents.tensors["lora_unet_a_to_q.lora_up.weight"] * 5.0).unwrap();
    let apart = (want - got).unwrap().abs().unwrap().max_all().unwrap();
    assert!(apart.to_scalar::<f32>().unwrap() < 1e-5);
}

#[test]
fn merged_weight_has_the_scaled_product() -> Result<()> {
    let lora = adapters(&two_modules(), 2, 5.0);
    let conv = &lora.adapters["b.0.conv1"];
    let (up, down) = (
        conv.up.flatten_all()?.to_vec1::<f32>()?,
        conv.down.flatten_all()?.to_vec1::<f32>()?,
    );
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    let mut base: BTreeMap<String, Tensor> = [
        ("a.to_q.weight".to_owned(), ones(&[6, 4])),
        ("b.0.conv1.weight".to_owned(), ones(&[5, 3, 3, 3])),
        ("conv_out.weight".to_owned(), ones(&[2])),
    ]
    .into();
    merge(&mut base, &lora, 0.5).unwrap();
    let merged = base["b.0.conv1.weight"].flatten_all()?.to_vec1::<f32>()?;
    for (i, got) in merged.iter().enumerate() {
        let (out, rest) = (i / 27, i % 27);
        let product = up[2 * out] * down[rest] + up[2 * out + 1] * down[27 + rest];
        assert!((got - (1.0 + 0.5 * 2.5 * product)).abs() < 1e-5);
    }
    assert_eq!(base["conv_out.weight"].to_vec1::<f32>()?, [1.0; 2]);
    base.insert("a.to_q.weight".to_owned(), ones(&[6, 5]));
    let error = merge(&mut base, &lora, 1.0).unwrap_err().to_string();
    assert!(
        error.contains("a.to_q.weight") && error.contains("[6, 4]"),
        "{error}"
    );
    Ok(())
}

#[test]
fn reduced_rank_keeps_the_largest_singular_values() {
    // A LoRA of rank 3 with orthogonal directions of the sizes 4, 2 and 1, at the scaling 2.
    let unit = |rows: usize, columns: &[f32]| {
        let values = (0..rows).flat_map(|row| {
            let at = move |(j, value): (usize, &f32)| if row == j { *value } else { 0.0 };
            columns.iter().enumerate().map(at).collect::<Vec<_>>()
        });
        Tensor::from_iter(values, &Device::Cpu)
            .unwrap()
            .reshape((rows, columns.len()))
            .unwrap()
    };
    let adapter = Adapter {
        up: unit(6, &[1.0, 4.0, 2.0]),
        down: unit(4, &[1.0, 1.0, 1.0]).t().unwrap().contiguous().unwrap(),
        alpha: 6.0,
    };
    let mut lora = Lora::default();
    lora.adapters.insert("a.to_q".to_owned(), adapter);
    let (smaller, kept) = reduce_rank(&lora, 2).unwrap();
    assert_eq!((smaller.rank(), kept.module.as_str()), (2, "a.to_q"));
    assert_eq!(smaller.adapters["a.to_q"].alpha, 2.0);
    assert!(
        (kept.share - (20f64 / 21.0).sqrt()).abs() < 1e-9,
        "{kept:?}"
    );
    let got = &changes(&smaller)["a.to_q.weight"];
    let mut want = changes(&lora)["a.to_q.weight"].clone();
    want[0] = 0.0;
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() < 1e-5);
    }
    let (same, kept) = reduce_rank(&lora, 3).unwrap();
    assert_eq!(kept.share, 1.0);
    assert_eq!(changes(&same), changes(&lora));
    // More than the module's own rank, and an adapter that changes nothing.
    let wide = adapters(&two_modules(), 8, 8.0);
    let (full, kept) = reduce_rank(&wide, 7).unwrap();
    assert!(
        kept.share > 0.999_999 && full.adapters["a.to_q"].rank() == 4,
        "{kept:?}"
    );
    for (name, want) in changes(&wide) {
        for (got, want) in changes(&full)[&name].iter().zip(want) {
            assert!((got - want).abs() < 1e-4, "{name}");
        }
    }
    let zero = lora.adapters["a.to_q"].up.zeros_like().unwrap();
    lora.adapters.get_mut("a.to_q").unwrap().up = zero;
    let (smaller, kept) = reduce_rank(&lora, 1).unwrap();
    assert_eq!((smaller.rank(), kept.share), (1, 1.0));
}

#[test]
fn files_of_older_versions_are_read() {
    let folder = TempDir::new().unwrap();
    let modules: Modules = [
        ("m.attn1.to_q.weight".to_owned(), vec![3, 2]),
        ("m.attn1.to_out.0.weight".to_owned(), vec![3, 2]),
    ]
    .into_iter()
    .collect();
    let tensor = |shape: &[usize]| Tensor::ones(shape, DType::F16, &Device::Cpu).unwrap();
    let (down, up) = (tensor(&[1, 2]), tensor(&[3, 1]));
    for names in [
        [
            "unet.m.attn1.processor.to_q_lora.down.weight",
            "unet.m.attn1.processor.to_q_lora.up.weight",
            "unet.m.attn1.processor.to_out_lora.down.weight",
            "unet.m.attn1.processor.to_out_lora.up.weight",
        ],
        [
            "unet.m.attn1.to_q.lora.down.weight",
            "unet.m.attn1.to_q.lora.up.weight",
            "unet.m.attn1.to_out.0.lora.down.weight",
            "unet.m.attn1.to_out.0.lora.up.weight",
        ],
        [
            "unet.base_model.model.m.attn1.to_q.lora_A.weight",
            "unet.base_model.model.m.attn1.to_q.lora_B.weight",
            "m.attn1.to_out.0.lora_A.default.weight",
            "m.attn1.to_out.0.lora_B.default.weight",
        ],
    ] {
        let tensors = [&down, &up, &down, &up];
        let tensors: Vec<_> = names.into_iter().zip(tensors.map(Tensor::clone)).collect();
        let path = write(&folder, &tensors, &[]);
        let read = read(&path, &modules).unwrap().lora;
        let found: Vec<_> = read.adapters.keys().collect();
        assert_eq!(found, ["m.attn1.to_out.0", "m.attn1.to_q"]);
    }
}

#[test]
fn faults_of_files_are_named() {
    let folder = TempDir::new().unwrap();
    let modules = two_modules();
    let tensor = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    const A: &str = "unet.a.to_q.lora_A.weight";
    const B: &str = "unet.a.to_q.lora_B.weight";
    let nan = Tensor::full(f32::NAN, (6, 2), &Device::Cpu).unwrap();
    let whole = vec![(A, tensor(&[2, 4])), (B, tensor(&[6, 2]))];
    let with = |more: &[(&'static str, Tensor)]| [&whole, more].concat();
    let metadata = r#"{"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q"]}"#;
    let other_rank = r#"{"unet.r": 8, "unet.lora_alpha": 4}"#;
    let pattern = r#"{"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"a.*": 2}}"#;
    type Case<'a> = (Vec<(&'a str, Tensor)>, &'a str, &'a [&'a str]);
    let cases: Vec<Case<'_>> = vec![
        (vec![(A, tensor(&[2, 4]))], "", &[A, "without its B"]),
        (vec![(B, tensor(&[6, 2]))], "", &[B, "without its A"]),
        (
            vec![(A, tensor(&[2, 5])), (B, tensor(&[6, 2]))],
            "",
            &[A, "[2, 5]", "[rank, 4]"],
        ),
        (
            vec![(A, tensor(&[2, 4])), (B, tensor(&[6, 3]))],
            "",
            &[B, "[6, 3]", "[6, 2]", "of rank 2"],
        ),
        (vec![(A, tensor(&[2, 4])), (B, nan)], "", &[B, "not finite"]),
        (
            with(&[("unet.c.lora_A.weight", tensor(&[2, 4]))]),
            "",
            &["unet.c.lora_A.weight", "no module", "0 others of 3"],
        ),
        (
            with(&[("lora_unet_a_to_q.lora_down.weight", tensor(&[2, 4]))]),
            "",
            &["lora_unet_a_to_q.lora_down.weight", A],
        ),
        (
            with(&[("lora_unet_a_to_q.alpha", tensor(&[2]))]),
            "",
            &["lora_unet_a_to_q.alpha", "one finite number"],
        ),
        (
            with(&[("lora_unet_a_to_q.alpha", tensor(&[]))]),
            metadata,
            &["both alpha tensors and alphas in its metadata"],
        ),
        (whole.clone(), other_rank, &["rank 8 of a.to_q", "rank 2"]),
        (whole.clone(), pattern, &["pattern \"a.*\""]),
        (whole.clone(), "{", &["lora_adapter_metadata"]),
        (whole.clone(), r#"{"unet.r": 2}"#, &["lora_alpha"]),
        (
            with(&[("lora_unet_a_to_q.hada_w1_a", tensor(&[2]))]),
            "",
            &["hada_w1_a", "LoHa"],
        ),
        (
            vec![("conv_in.weight", tensor(&[2]))],
            "",
            &["conv_in.weight", "no part of a LoRA"],
        ),
        (
            vec![("lora_te_text_model.alpha", tensor(&[]))],
            "",
            &[
                "no adapter of a UNet",
                "only 1 tensors of adapters of text encoders",
            ],
        ),
    ];
    for (tensors, metadata, words) in cases {
        let metadata = match metadata {
            "" => vec![("format", "pt")],
            text => vec![("format", "pt"), ("lora_adapter_metadata", text)],
        };
        let path = write(&folder, &tensors, &metadata);
        let error = read(&path, &modules).unwrap_err().to_string();
        for word in words.iter().chain(&["lora.safetensors"]) {
            assert!(error.contains(word), "{word}? {error}");
        }
    }
    let path = write(
        &folder,
        &with(&[("lora_te1_x.lora_up.weight", tensor(&[1]))]),
        &[],
    );
    let found = read(&path, &modules).unwrap();
    let warning = found.warning(&path).unwrap();
    assert!(
        warning.contains("1 tensors of adapters of text encoders"),
        "{warning}"
    );
    let mut lora = found.lora;
    lora.adapters.get_mut("a.to_q").unwrap().alpha = 1e6;
    let error = lora.contents(Layout::Diffusers, DType::F16).unwrap_err();
    assert!(
        error.to_string().contains("a.to_q.lora_B.weight"),
        "{error}"
    );
}
