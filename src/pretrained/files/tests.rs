//! Which files are chosen of a folder, a Stable Diffusion repository or an SDXL one.

use super::*;

/// Files of a Stable Diffusion 1.5 repository.
fn hub() -> BTreeSet<String> {
    [
        ".gitattributes",
        "README.md",
        "feature_extractor/preprocessor_config.json",
        "model_index.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "v1-5-pruned-emaonly.ckpt",
        "v1-5-pruned-emaonly.safetensors",
        "vae/config.json",
        "vae/diffusion_flax_model.msgpack",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    .map(str::to_owned)
    .into()
}

fn sorted(plan: FetchPlan) -> Vec<String> {
    let mut files = plan.files;
    files.sort();
    files
}

#[test]
fn plan_has_the_files_of_each_command() {
    let training = sorted(plan(&Components::training(true), &hub()).unwrap());
    assert_eq!(
        training,
        [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "tokenizer/merges.txt",
            "tokenizer/special_tokens_map.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer/vocab.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        ]
    );
    let encoding = sorted(plan(&Components::encoding(false), &hub()).unwrap());
    assert!(encoding.iter().all(|file| {
        ["model_index", "tokenizer/", "text_encoder/"]
            .iter()
            .any(|start| file.starts_with(start))
    }));
    assert_eq!(encoding.len(), 7);
    let vae = plan(&Components::vae(), &hub()).unwrap();
    assert_eq!(
        vae.files,
        ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    );
    let alone = ["config.json", "diffusion_pytorch_model.safetensors"];
    let available = alone.map(str::to_owned).into();
    assert_eq!(plan(&Components::vae(), &available).unwrap().files, alone);
}

#[test]
fn plan_takes_one_form_of_tokenizer() {
    let tokenizer = |available: &BTreeSet<String>| {
        let files = sorted(plan(&Components::encoding(true), available)?);
        let names = files
            .iter()
            .filter_map(|name| name.strip_prefix("tokenizer/"));
        Ok::<_, String>(names.collect::<Vec<_>>().join(" "))
    };
    let mut available = hub();
    available.insert("tokenizer/added_tokens.json".to_owned());
    assert_eq!(
        tokenizer(&available).unwrap(),
        "added_tokens.json merges.txt special_tokens_map.json tokenizer_config.json vocab.json"
    );
    available.remove("tokenizer/merges.txt");
    assert_eq!(
        tokenizer(&available).unwrap_err(),
        "it has no tokenizer/merges.txt"
    );
    available.insert("tokenizer/tokenizer.json".to_owned());
    assert_eq!(
        tokenizer(&available).unwrap(),
        "added_tokens.json special_tokens_map.json tokenizer.json tokenizer_config.json"
    );
    available.retain(|name| !name.starts_with("tokenizer/"));
    assert_eq!(
        tokenizer(&available).unwrap_err(),
        "it has no folder tokenizer"
    );
    available.insert("tokenizer/tokenizer_config.json".to_owned());
    assert_eq!(
        tokenizer(&available).unwrap_err(),
        "it has no tokenizer/tokenizer.json and no tokenizer/vocab.json"
    );
}

/// Files of an SDXL repository.
fn sdxl() -> BTreeSet<String> {
    let second = [
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer_2/merges.txt",
        "tokenizer_2/special_tokens_map.json",
        "tokenizer_2/tokenizer_config.json",
        "tokenizer_2/vocab.json",
    ];
    let second = second.map(str::to_owned);
    hub().into_iter().chain(second).collect()
}

#[test]
fn plan_has_the_second_text_encoder_of_a_model_that_has_one() {
    let second = |components: &Components, available: &BTreeSet<String>| {
        let files = sorted(plan(components, available)?);
        let is_second = |name: &String| name.contains("_2/");
        Ok::<_, String>(files.into_iter().filter(is_second).count())
    };
    for components in [
        Components::training(true),
        Components::encoding(false),
        Components::without_unet(),
        Components::sampling(None, true),
    ] {
        assert_eq!(second(&components, &sdxl()), Ok(6));
        assert_eq!(second(&components, &hub()), Ok(0));
        let mut available = sdxl();
        available.retain(|name| !name.starts_with("tokenizer_2/"));
        let error = second(&components, &available).unwrap_err();
        assert_eq!(error, "it has no folder tokenizer_2");
        available.insert("tokenizer_2/merges.txt".to_owned());
        let error = second(&components, &available).unwrap_err();
        assert!(error.contains("tokenizer_2/vocab.json"), "{error}");
    }
    for components in [Components::tokenizer(), Components::sampling(None, false)] {
        assert_eq!(second(&components, &sdxl()), Ok(0));
    }
}

#[test]
fn index_names_a_second_text_encoder_that_is_not_there() {
    let lacks = |index: Value| {
        let components = Components::training(true).of_index(Some(&index));
        plan(&components, &hub()).err()
    };
    let named = serde_json::json!({
        "_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": true,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]
    });
    let error = lacks(named).unwrap();
    assert_eq!(
        error,
        "it has no folder text_encoder_2; no folder tokenizer_2"
    );
    for index in [
        serde_json::json!({"text_encoder_2": [null, null]}),
        serde_json::json!({"text_encoder_2": null, "force_zeros_for_empty_prompt": true}),
        serde_json::json!([]),
    ] {
        assert_eq!(lacks(index), None);
    }
}

#[test]
fn sampling_plan_prefers_the_target() {
    let mut available = hub();
    let unet =
        |available: &_, name| sorted(plan(&Components::sampling(name, false), available).unwrap());
    assert!(unet(&available, None).contains(&"unet/config.json".to_owned()));
    for name in ["config.json", "diffusion_pytorch_model.safetensors"] {
        available.insert(format!("unet_target/{name}"));
    }
    assert_eq!(
        unet(&available, None),
        [
            "model_index.json",
            "unet_target/config.json",
            "unet_target/diffusion_pytorch_model.safetensors"
        ]
    );
    assert!(unet(&available, Some("unet")).contains(&"unet/config.json".to_owned()));
    let error = plan(&Components::sampling(Some("other"), true), &available).unwrap_err();
    assert_eq!(error, "it has no folder other");
    available.retain(|name| !name.starts_with("vae/"));
    assert!(plan(&Components::sampling(None, true), &available).is_ok());
}

#[test]
fn plan_takes_one_form_of_weights() {
    let whole = "unet/diffusion_pytorch_model.safetensors";
    let half = "unet/diffusion_pytorch_model.fp16.safetensors";
    let index = format!("{whole}.index.json");
    let training = |available: &_| plan(&Components::training(true), available);
    let mut available = hub();
    available.insert(index.clone());
    let found = training(&available).unwrap();
    assert_eq!(found.indexes, std::slice::from_ref(&index));
    assert!(found.files.contains(&index) && !found.files.contains(&whole.to_owned()));
    available.remove(&index);
    available.remove(whole);
    let error = training(&available).unwrap_err();
    for word in [
        whole,
        "diffusion_pytorch_model.bin",
        half.trim_start_matches("unet/"),
    ] {
        assert!(error.contains(word), "{word:?}? {error}");
    }
    available.remove("unet/diffusion_pytorch_model.bin");
    let found = training(&available).unwrap();
    assert_eq!(found.variants, [half]);
    assert!(found.files.contains(&half.to_owned()), "{:?}", found.files);
    available.remove(half);
    let error = training(&available).unwrap_err();
    assert!(
        error.contains(whole) && error.contains("non_ema"),
        "{error}"
    );
    assert!(plan(&Components::encoding(true), &available).is_ok());
}

#[test]
fn plan_names_everything_that_is_missing() {
    let mut available = hub();
    available.retain(|name| !name.starts_with("vae/") && !name.ends_with("merges.txt"));
    available.remove("text_encoder/model.safetensors");
    let error = plan(&Components::training(true), &available).unwrap_err();
    for word in [
        "no tokenizer/merges.txt;",
        "no weights text_encoder/model.safetensors",
        "pytorch_model.bin",
        "no folder vae",
    ] {
        assert!(error.contains(word), "{word:?}? {error}");
    }
}

#[test]
fn folder_without_a_shard_is_incomplete() {
    let folder = tempfile::tempdir().unwrap();
    let vae = folder.path().join("vae");
    std::fs::create_dir(&vae).unwrap();
    let write = |name: &str, text: &str| std::fs::write(vae.join(name), text).unwrap();
    let state = || completeness(&Components::vae(), folder.path());
    write("config.json", "{}");
    assert_eq!(state(), Completeness::Incomplete);
    write(
        "diffusion_pytorch_model.safetensors.index.json",
        r#"{"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}"#,
    );
    write("x-1.safetensors", "");
    assert_eq!(state(), Completeness::Incomplete);
    write("x-2.safetensors", "");
    assert_eq!(state(), Completeness::Complete);
    for name in [
        "diffusion_pytorch_model.safetensors.index.json",
        "x-1.safetensors",
    ] {
        std::fs::remove_file(vae.join(name)).unwrap();
    }
    write("diffusion_pytorch_model.fp16.safetensors", "");
    assert_eq!(state(), Completeness::Variant);
}
