//! The forms of model folders that people have: which are read and how, and what is said of the others.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use coffey::models::unet::WEIGHTS_STEM;
use coffey::models::{UNetConfig, Weights, save_model};
use serde_json::{Value, json};

use crate::support::hub::{Behavior, Hub, User};
use crate::support::{
    NO_PICTURES, QUICKSTART, args, copy, messages, refused, says, teacher, text, timeless,
};

/// `train` for two steps, without pictures.
fn training(user: &User, output: &str, settings: &[&str]) -> std::process::Command {
    let output = format!("train.output={}", text(&user.path(output)));
    let own = [output.as_str(), "train.batch_size=2", "train.max_steps=2"];
    let all = [&own[..], &NO_PICTURES, settings].concat();
    user.command(&args("train", QUICKSTART, all))
}

/// The records of two steps without the clock's values, and the messages.
fn train(user: &User, output: &str, settings: &[&str]) -> (Vec<Value>, String) {
    let printed = messages(training(user, output, settings));
    let records = timeless(&user.path(output));
    assert_eq!(records.len(), 2);
    (records, printed)
}

/// A copy of the quickstart's teacher.
fn teacher_in(user: &User, name: &str) -> PathBuf {
    let folder = user.path(name);
    copy(&teacher(), &folder);
    folder
}

/// Changes keys of a JSON file.
fn set(path: &Path, keys: &[(&str, Value)]) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    for (key, new) in keys {
        value[*key] = new.clone();
    }
    fs::write(path, value.to_string()).unwrap();
}

/// Replaces the weights of a UNet by two shards in f32 and their index, beside an fp16 file of other values.
fn shard(unet: &Path) {
    let config = UNetConfig::read(unet).unwrap().to_json().clone();
    let weights = Weights::load(unet, WEIGHTS_STEM, DType::F32, &Device::Cpu).unwrap();
    fs::remove_file(unet.join(format!("{WEIGHTS_STEM}.safetensors"))).unwrap();
    let mut shards = [BTreeMap::new(), BTreeMap::new()];
    let mut half: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut weight_map = serde_json::Map::new();
    for (i, (name, tensor)) in weights.tensors().iter().enumerate() {
        let other = (tensor * 1.5).unwrap().to_dtype(DType::F16).unwrap();
        half.insert(name.clone(), other);
        shards[i % 2].insert(name.clone(), tensor.clone());
        let file = format!("{WEIGHTS_STEM}-0000{}-of-00002.safetensors", i % 2 + 1);
        weight_map.insert(name.clone(), file.into());
    }
    for (i, shard) in shards.iter().enumerate() {
        let stem = format!("{WEIGHTS_STEM}-0000{}-of-00002", i + 1);
        save_model(unet, &stem, &config, shard).unwrap();
    }
    save_model(unet, &format!("{WEIGHTS_STEM}.fp16"), &config, &half).unwrap();
    let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    let path = unet.join(format!("{WEIGHTS_STEM}.safetensors.index.json"));
    fs::write(path, index.to_string()).unwrap();
}

/// diffusers reads the shards; the fp16 file has other numbers.
#[test]
fn shards_beside_fp16_are_read_from_folder_hub_and_s3() {
    let user = User::new("http://127.0.0.1:9");
    let (plain, _) = train(&user, "plain", &[]);
    let buckets = user.path("buckets");
    copy(Path::new("assets/quickstart/emoji"), &buckets.join("emoji"));
    let sharded = buckets.join("models/teacher");
    copy(&teacher(), &sharded);
    shard(&sharded.join("unet"));
    let teacher = format!("model.teacher={}", text(&sharded));
    assert_eq!(train(&user, "folder", &[&teacher]).0, plain);
    let embedded = format!("s3.embedded_root={}", text(&buckets));
    let from_s3 = ["model.teacher=s3://models/teacher", &embedded];
    assert_eq!(train(&user, "s3", &from_s3).0, plain);
    let hub = Hub::start("someone/sharded", &sharded, Behavior::default());
    let of_hub = User::new(&hub.endpoint);
    let from_hub = ["model.teacher=someone/sharded"];
    assert_eq!(train(&of_hub, "hub", &from_hub).0, plain);

    let missing = format!("{WEIGHTS_STEM}-00002-of-00002.safetensors");
    fs::remove_file(sharded.join("unet").join(&missing)).unwrap();
    for settings in [&[teacher.as_str()][..], &from_s3] {
        let command = training(&user, "refused", settings);
        refused(command, 1, &["index.json", &missing]);
    }
}

#[test]
fn average_of_diffusers_ema_model_trains_as_its_model() {
    let user = User::new("http://127.0.0.1:9");
    let (plain, _) = train(&user, "plain", &[]);
    let folder = teacher_in(&user, "ema");
    let ema = [
        ("decay", json!(0.9999)),
        ("inv_gamma", json!(1.0)),
        ("min_decay", json!(0.0)),
        ("optimization_step", json!(0)),
        ("power", json!(2.0 / 3.0)),
        ("update_after_step", json!(0)),
        ("use_ema_warmup", json!(false)),
    ];
    let config = folder.join("unet/config.json");
    set(&config, &ema);
    let teacher = format!("model.teacher={}", text(&folder));
    let (records, printed) = train(&user, "ema-run", &[&teacher]);
    assert_eq!(records, plain);
    assert!(!printed.contains("warning"), "{printed}");
    let student = fs::read_to_string(user.path("ema-run/unet/config.json")).unwrap();
    assert!(!student.contains("use_ema_warmup"), "{student}");

    set(&config, &[("of_a_fork", json!(1))]);
    set(
        &folder.join("scheduler/scheduler_config.json"),
        &[("note", json!("x"))],
    );
    let (records, printed) = train(&user, "fork-run", &[&teacher]);
    assert_eq!(records, plain);
    for word in ["\"of_a_fork\"", "\"note\""] {
        assert_eq!(printed.matches(word).count(), 1, "{printed}");
    }
    set(
        &config,
        &[
            ("class_embed_type", json!("timestep")),
            ("layer_per_block", json!(2)),
            ("dropout", json!(0.5)),
        ],
    );
    let words = [
        "class_embed_type",
        "did you mean \"layers_per_block\"",
        "dropout",
    ];
    refused(training(&user, "refused", &[&teacher]), 1, &words);
}

/// The message for a teacher; `train` must end with `code`.
fn said(user: &User, teacher: &str, code: i32, words: &[&str]) {
    let command = training(user, "refused", &[&format!("model.teacher={teacher}")]);
    let message = refused(command, code, words);
    for never in ["No such file", "network"] {
        assert!(!message.contains(never), "{message}");
    }
    assert!(!user.path("refused/metrics.jsonl").exists());
}

#[test]
fn weights_in_other_forms_are_named_with_the_remedy() {
    let user = User::new("http://127.0.0.1:9");
    let folder = teacher_in(&user, "teacher");
    let unet = folder.join("unet");
    let file = |form: &str| unet.join(format!("{WEIGHTS_STEM}.{form}"));
    fs::rename(file("safetensors"), file("bin")).unwrap();
    let name = text(&folder);
    let words = [
        "no weights unet/diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bin",
        "safe_serialization=True",
    ];
    said(&user, name, 1, &words);
    // Everything at once.
    fs::remove_file(folder.join("vae/config.json")).unwrap();
    said(
        &user,
        name,
        1,
        &[&words[..], &["no vae/config.json"]].concat(),
    );
    copy(&teacher().join("vae"), &folder.join("vae"));
    fs::rename(file("bin"), file("non_ema.safetensors")).unwrap();
    said(
        &user,
        name,
        1,
        &["variant=\"non_ema\"", "without a variant"],
    );
    fs::rename(file("non_ema.safetensors"), file("msgpack")).unwrap();
    said(&user, name, 1, &["Flax"]);
}

#[test]
fn teachers_that_are_something_else_are_named() {
    let user = User::new("http://127.0.0.1:9");
    let make = |name: &str, files: &[(&str, &str)]| -> PathBuf {
        let folder = user.path(name);
        for (file, content) in files {
            let path = folder.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        folder
    };
    let unet = r#"{"_class_name": "UNet2DConditionModel"}"#;
    for (name, files, words) in [
        (
            "run",
            &[
                ("run.json", r#"{"teacher": "some/teacher"}"#),
                ("unet/config.json", unet),
                ("config.toml", ""),
            ][..],
            &["run of coffey", "some/teacher"][..],
        ),
        (
            "lora",
            &[("pytorch_lora_weights.safetensors", "")],
            &["LoRA", "coffey export"],
        ),
        (
            "peft",
            &[
                ("adapter_config.json", "{}"),
                ("adapter_model.safetensors", ""),
            ],
            &["LoRA"],
        ),
        (
            "models--some--model",
            &[("refs/main", "c"), ("snapshots/c/model_index.json", "{}")],
            &[
                "cache folder of the Hub's model some/model",
                "\"some/model\"",
            ],
        ),
        (
            "cache",
            &[("hub/models--some--model/refs", ""), ("token", "")],
            &["cache of models of the Hub", "\"some/model\""],
        ),
        (
            "single",
            &[("v1-5-pruned.safetensors", "")],
            &["v1-5-pruned.safetensors", "from_single_file"],
        ),
        (
            "unet",
            &[
                ("config.json", unet),
                ("diffusion_pytorch_model.safetensors", ""),
            ],
            &["a UNet alone", "the folder above"],
        ),
        (
            "control",
            &[
                ("config.json", r#"{"_class_name": "ControlNetModel"}"#),
                ("diffusion_pytorch_model.safetensors", ""),
            ],
            &["ControlNetModel", "a ControlNet"],
        ),
        (
            "accelerate",
            &[("optimizer.bin", ""), ("unet/config.json", unet)],
            &["state of a training run", "optimizer.bin"],
        ),
        ("onnx", &[("unet/model.onnx", "")], &["ONNX"]),
        ("shards", &[("00000.tar", "")], &["data.shards"]),
        (
            "flux",
            &[
                ("model_index.json", r#"{"_class_name": "FluxPipeline"}"#),
                ("transformer/config.json", "{}"),
            ],
            &["transformer in place of the UNet", "FluxPipeline"],
        ),
    ] {
        said(&user, text(&make(name, files)), 2, words);
    }
    let pipeline = teacher_in(&user, "refiner");
    fs::rename(
        pipeline.join("text_encoder"),
        pipeline.join("text_encoder_2"),
    )
    .unwrap();
    set(
        &pipeline.join("model_index.json"),
        &[("_class_name", json!("StableDiffusionXLPipeline"))],
    );
    said(
        &user,
        text(&pipeline),
        2,
        &["the refiner of SDXL", "StableDiffusionXLPipeline"],
    );
    said(
        &user,
        text(&make("empty", &[("README.md", "")])),
        1,
        &["no folder unet", "no folder vae"],
    );

    let inpainting = teacher_in(&user, "inpainting");
    let unet = inpainting.join("unet");
    let mut config = UNetConfig::read(&unet).unwrap().to_json().clone();
    config.insert("in_channels".to_owned(), json!(9));
    let weights = Weights::load(&unet, WEIGHTS_STEM, DType::F32, &Device::Cpu).unwrap();
    let mut tensors = weights.into_tensors();
    let conv = tensors["conv_in.weight"].clone();
    let conv = Tensor::cat(&[&conv, &conv, &conv.narrow(1, 0, 1).unwrap()], 1).unwrap();
    tensors.insert("conv_in.weight".to_owned(), conv);
    save_model(&unet, WEIGHTS_STEM, &config, &tensors).unwrap();
    said(&user, text(&inpainting), 2, &["9", "inpainting"]);
    let flow = teacher_in(&user, "flow");
    set(
        &flow.join("scheduler/scheduler_config.json"),
        &[("_class_name", json!("FlowMatchEulerDiscreteScheduler"))],
    );
    said(
        &user,
        text(&flow),
        1,
        &["FlowMatchEulerDiscreteScheduler", "DDIMScheduler"],
    );
}

#[test]
fn files_given_as_a_teacher_are_named() {
    let user = User::new("http://127.0.0.1:9");
    let save = |name: &str, tensor: &str| {
        let zeros = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let tensors = BTreeMap::from([(tensor.to_owned(), zeros)]);
        save_model(&user.path(name), name, &serde_json::Map::new(), &tensors).unwrap();
        user.path(name).join(format!("{name}.safetensors"))
    };
    let original = save("original", "model.diffusion_model.out.0.bias");
    said(
        &user,
        text(&original),
        2,
        &["checkpoint in one file", "from_single_file"],
    );
    let lora = save("style", "unet.down_blocks.0.lora_A.weight");
    said(&user, text(&lora), 2, &["is a LoRA", "coffey export"]);
    let part = teacher()
        .join("unet")
        .join(format!("{WEIGHTS_STEM}.safetensors"));
    said(&user, text(&part), 2, &["one part of a model"]);
    let ckpt = user.path("sd-v1-4.ckpt");
    fs::write(&ckpt, "PK").unwrap();
    said(
        &user,
        text(&ckpt),
        2,
        &["checkpoint in one file", "from_single_file"],
    );
    let command = user.command(&[
        "sample",
        "--model",
        text(&ckpt),
        "--prompt",
        "x",
        "--out",
        text(&user.path("x.png")),
    ]);
    says(&refused(command, 2, &[]), &["from_single_file"]);
}
