//! SDXL: two text encoders, pooled embeddings and size ids, through every command.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::support::xl::{POOLED, xl_teacher};
use crate::support::{
    NO_PICTURES, PRECOMPUTE, QUICKSTART, QUICKSTART_LORA, args, command, messages, peak_memory,
    python, refuse, run, says, succeed, succeed_json, text,
};
use candle_core::{DType, Device, Tensor};
use coffey::models::unet::WEIGHTS_STEM;
use coffey::models::{Weights, save_model};
use image::{Rgb, RgbImage};
use serde_json::Value;
use tempfile::TempDir;

/// Width and height of the images.
const IMAGE: (u32, u32) = (96, 80);

/// A folder of four captioned images that are not square.
fn images(folder: &Path) -> PathBuf {
    let images = folder.join("images");
    std::fs::create_dir_all(&images).unwrap();
    for n in 0..4u32 {
        let pixel = |x, y| Rgb([(x * 2) as u8, (y * 3) as u8, (60 * n) as u8]);
        let image = RgbImage::from_fn(IMAGE.0, IMAGE.1, pixel);
        image.save(images.join(format!("{n}.png"))).unwrap();
        let captions = ["red apple!", "a cat face", "!!", "sunflower"];
        std::fs::write(images.join(format!("{n}.txt")), captions[n as usize]).unwrap();
    }
    images
}

/// Settings of the SDXL teacher in `folder`, with its images.
fn settings(folder: &Path) -> Vec<String> {
    vec![
        format!("model.teacher={}", xl_teacher(folder).display()),
        format!("data.shards={}/", images(folder).display()),
        "image.resolution=32".to_owned(),
    ]
}

fn refs(settings: &[String]) -> Vec<&str> {
    settings.iter().map(String::as_str).collect()
}

fn train_args(run: &Path, settings: &[&str]) -> Vec<String> {
    let output = format!("train.output={}", run.display());
    let small = [output.as_str(), "train.batch_size=4", "image.crop=random"];
    let all = [&small[..], &NO_PICTURES, settings].concat();
    args("train", QUICKSTART, all)
}

type Step = HashMap<String, Tensor>;

/// Trains one audited step; returns its tensors.
fn audit(folder: &Path, name: &str, settings: &[&str]) -> Step {
    let (run, audit) = (folder.join(name), folder.join(format!("{name}-audit")));
    let dir = format!("audit.dir={}", audit.display());
    let more = [dir.as_str(), "audit.steps=1", "train.max_steps=1"];
    succeed(&train_args(&run, &[&more, settings].concat()));
    let file = audit.join("step-000001.00.safetensors");
    candle_core::safetensors::load(file, &Device::Cpu).unwrap()
}

fn rows(step: &Step, name: &str) -> Vec<Vec<f32>> {
    let tensor = step[name].to_dtype(DType::F32).unwrap();
    let batch = tensor.dims()[0];
    tensor.reshape((batch, ())).unwrap().to_vec2().unwrap()
}

#[test]
fn step_has_the_sizes_of_its_images_and_zeros_without_caption() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    let own = audit(folder.path(), "own", &refs(&settings));
    assert_eq!(own["prompt_embeds"].dims(), [4, 77, 128]);
    assert_eq!(own["pooled_prompt_embeds"].dims(), [4, POOLED]);
    let mut lefts = Vec::new();
    for ids in rows(&own, "time_ids") {
        let [height, width, top, left, target_height, target_width] = ids[..] else {
            panic!("{ids:?}")
        };
        assert_eq!((height, width), (80.0, 96.0));
        assert_eq!((target_height, target_width), (32.0, 32.0));
        // Resized to 38 x 32.
        assert_eq!(top, 0.0);
        assert!((0.0..=6.0).contains(&left), "{left}");
        lefts.push(left);
    }
    assert!(lefts.iter().any(|&left| left != lefts[0]), "{lefts:?}");
    for name in ["uncond_prompt_embeds", "uncond_pooled_prompt_embeds"] {
        assert!(rows(&own, name).iter().flatten().all(|&x| x == 0.0));
    }

    let more = ["data.micro_conditioning=fixed", "distill.uncond=empty"];
    let other = audit(
        folder.path(),
        "fixed",
        &[&refs(&settings)[..], &more].concat(),
    );
    assert!(
        rows(&other, "time_ids")
            .iter()
            .all(|ids| ids == &[32.0, 32.0, 0.0, 0.0, 32.0, 32.0])
    );
    for name in ["latents", "noise", "prompt_embeds", "pooled_prompt_embeds"] {
        assert_eq!(rows(&own, name), rows(&other, name), "{name}");
    }
    for name in ["uncond_prompt_embeds", "uncond_pooled_prompt_embeds"] {
        assert!(rows(&other, name).iter().flatten().any(|&x| x != 0.0));
    }
    assert_ne!(rows(&own, "model_pred"), rows(&other, "model_pred"));
    // An empty caption of the training data is encoded, whatever the unconditional pass has.
    let more = ["distill.proportion_empty_prompts=1.0"];
    let empty = audit(
        folder.path(),
        "empty",
        &[&refs(&settings)[..], &more].concat(),
    );
    let encoded = &rows(&other, "uncond_pooled_prompt_embeds")[0];
    assert!(
        rows(&empty, "pooled_prompt_embeds")
            .iter()
            .all(|row| row == encoded)
    );
    // The pipeline's own word on an absent caption.
    let index = folder.path().join("xl/model_index.json");
    let changed = std::fs::read_to_string(&index).unwrap();
    let changed = changed.replace(
        "\"force_zeros_for_empty_prompt\":true",
        "\"force_zeros_for_empty_prompt\":false",
    );
    std::fs::write(&index, changed).unwrap();
    let unforced = audit(folder.path(), "unforced", &refs(&settings));
    assert_eq!(
        rows(&unforced, "uncond_pooled_prompt_embeds"),
        rows(&other, "uncond_pooled_prompt_embeds")
    );
}

/// Whether `b` is `a` rounded to f16.
fn rounded(a: &[Vec<f32>], b: &[Vec<f32>]) -> bool {
    let all = || a.iter().flatten().zip(b.iter().flatten());
    let largest = a.iter().flatten().fold(1.0_f32, |l, x| l.max(x.abs()));
    a.len() == b.len() && a != b && all().all(|(a, b)| (a - b).abs() < largest / 1024.0)
}

#[test]
fn latents_hold_pooled_embeddings_and_train_as_images() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    let output = folder.path().join("latents");
    let place = format!("latents.output={}", output.display());
    let crop = "image.crop=center";
    let precompute = |more: &[&str]| {
        let all = [&refs(&settings)[..], &[&place, crop], more].concat();
        args("precompute", PRECOMPUTE, all)
    };
    succeed(&precompute(&["latents.text=both"]));
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(output.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(
        manifest["prompt_embeds_shape"],
        serde_json::json!([77, 128])
    );
    assert_eq!(manifest["pooled_shape"], serde_json::json!([POOLED]));
    for key in ["text_encoder_2", "tokenizer", "tokenizer_2"] {
        let hash = manifest["fingerprint"][key].as_str().unwrap();
        assert!(hash.starts_with("sha256:"), "{key}: {hash}");
    }
    let inspected = succeed_json(&["inspect", "--json", &format!("{}/", text(&output))]);
    let arrays = &inspected["shards"][0]["latents"]["arrays"];
    assert_eq!(
        arrays[format!("pooled.npy <f2 [{POOLED}]")],
        4,
        "{inspected:#}"
    );

    let shards = format!("data.shards={}/", output.display());
    let from_latents = [
        &settings[0],
        &shards,
        "data.kind=latents",
        crop,
        "image.resolution=32",
    ];
    let images = audit(
        folder.path(),
        "from-images",
        &[&refs(&settings)[..], &[crop]].concat(),
    );
    let embeds = audit(folder.path(), "embeds", &from_latents);
    let caption = [&from_latents[..], &["data.text_from=caption"]].concat();
    let caption = audit(folder.path(), "caption", &caption);
    for name in ["noise", "w", "time_ids", "uncond_pooled_prompt_embeds"] {
        // Shards of latents are in another order than the folder's images only by name: both have one shard.
        assert_eq!(rows(&images, name), rows(&embeds, name), "{name}");
    }
    assert_eq!(rows(&images, "time_ids")[0][..2], [80.0, 96.0]);
    for name in ["prompt_embeds", "pooled_prompt_embeds"] {
        assert!(
            rounded(&rows(&images, name), &rows(&embeds, name)),
            "{name}"
        );
        assert_eq!(rows(&images, name), rows(&caption, name), "{name}");
    }

    // Another second text encoder makes other embeddings, and another tokenizer as well.
    let config = folder.path().join("xl/tokenizer_2/tokenizer_config.json");
    let whole = std::fs::read_to_string(&config).unwrap();
    std::fs::write(
        &config,
        whole.replace("\"pad_token\":\"!\"", "\"pad_token\":\"<|endoftext|>\""),
    )
    .unwrap();
    let again = train_args(&folder.path().join("again"), &from_latents);
    refuse(2, &again, &["second tokenizer", "tokenizer_2"]);
    refuse(2, &precompute(&[]), &["fingerprint.tokenizer_2"]);
    std::fs::write(&config, whole).unwrap();

    let manifest_file = output.join("manifest.json");
    let mut without = manifest.clone();
    without.as_object_mut().unwrap().remove("pooled_shape");
    std::fs::write(&manifest_file, without.to_string()).unwrap();
    refuse(2, &again, &["pooled_shape is absent, and [20]"]);
}

#[test]
fn run_resumes_bit_for_bit_and_draws() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    let train = |name: &str, steps: &str, more: &[&str]| {
        let run = folder.path().join(name);
        let steps = format!("train.max_steps={steps}");
        let all = [
            &refs(&settings)[..],
            &[&steps, "data.shuffle_buffer=3"],
            more,
        ]
        .concat();
        (run.clone(), train_args(&run, &all))
    };
    let pictures = [
        "validation.every=4",
        "validation.prompts=[\"red apple\"]",
        "report.endpoint_captions=1",
        "report.endpoint_every=4",
    ];
    let (whole, args) = train("whole", "4", &pictures);
    succeed(&args);
    let (parts, args) = train("parts", "2", &[]);
    succeed(&args);
    succeed(&train("parts", "4", &[]).1);
    for part in ["unet", "unet_target"] {
        let weights = |run: &Path| {
            std::fs::read(run.join(part).join("diffusion_pytorch_model.safetensors")).unwrap()
        };
        assert!(weights(&whole) == weights(&parts), "{part}");
    }
    assert!(whole.join("samples/step-4-target.png").is_file());
    let metrics = std::fs::read_to_string(whole.join("metrics.jsonl")).unwrap();
    says(&metrics, &["\"endpoint_error\":"]);

    // The second text encoder belongs to what a run is.
    let config = folder.path().join("xl/text_encoder_2/config.json");
    let old = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, old.replace("\"gelu\"", "\"quick_gelu\"")).unwrap();
    let changed = ["hidden_act of the second text encoder", "text_encoder_2"];
    refuse(2, &train("parts", "6", &[]).1, &changed);
    std::fs::write(&config, old).unwrap();

    let out = folder.path().join("image.png");
    for more in [
        &["--scheduler", "tcd", "--steps", "1"][..],
        &["--steps", "1", "--height", "32", "--width", "48"],
    ] {
        let sample = ["sample", "--model", text(&whole), "--prompt", "red apple"];
        let all = [&sample[..], &["--out", text(&out)], more].concat();
        says(&messages(command(&all)), &["embedded"]);
    }
    assert_eq!(
        image::open(&out).unwrap().into_rgb8().dimensions(),
        (48, 32)
    );
}

#[test]
fn check_plans_an_sdxl_run() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    let output = format!("train.output={}", folder.path().join("run").display());
    let all = [&refs(&settings)[..], &[&output]].concat();
    let mut check = args("check", QUICKSTART, all);
    check.push("--json".to_owned());
    let report = succeed_json(&check);
    let message = |step: &str| {
        let steps = report["steps"].as_array().unwrap();
        let found = steps.iter().find(|found| found["step"] == step).unwrap();
        found["message"].as_str().unwrap().to_owned()
    };
    says(
        &message("encoders"),
        &["text encoders", "width 128, pooled 20"],
    );
    says(&message("teacher"), &["text width 128"]);
    says(&message("dry run"), &["passed through the teacher"]);
}

#[test]
fn overflow_of_the_vae_names_the_one_that_is_made_for_f16() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    let vae = folder.path().join("xl/vae");
    let weights = Weights::load(&vae, WEIGHTS_STEM, DType::F32, &Device::Cpu).unwrap();
    let mut tensors = weights.into_tensors();
    let conv = tensors.get_mut("encoder.conv_in.weight").unwrap();
    *conv = (&*conv * 3e5).unwrap();
    let config = std::fs::read(vae.join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    save_model(&vae, WEIGHTS_STEM, config.as_object().unwrap(), &tensors).unwrap();

    let run = format!("train.output={}", folder.path().join("run").display());
    let latents = format!("latents.output={}", folder.path().join("latents").display());
    let narrow = [
        &refs(&settings)[..],
        &["encode.vae_dtype=f16", &run, &latents],
    ]
    .concat();
    let remedy = ["encode.vae_dtype", "bf16", "madebyollin/sdxl-vae-fp16-fix"];
    refuse(2, &args("check", QUICKSTART, &narrow), &remedy);
    let train = [&narrow[..], &NO_PICTURES, &["train.batch_size=1"]].concat();
    let words = [&remedy[..], &["the VAE's (latents)"]].concat();
    refuse(1, &args("train", QUICKSTART, &train), &words);
    refuse(1, &args("precompute", PRECOMPUTE, &narrow), &remedy);
}

#[test]
fn defaults_follow_the_model() {
    let folder = TempDir::new().unwrap();
    let xl = xl_teacher(folder.path());
    let config = folder.path().join("run.toml");
    let missing = folder.path().join("none.tar");
    let write = |teacher: &Path| {
        let output = folder.path().join("run");
        let text = format!(
            "[data]\nshards = {missing:?}\n[model]\nteacher = {teacher:?}\n[train]\noutput = {output:?}\n"
        );
        std::fs::write(&config, text).unwrap();
    };
    let said = |more: &[&str]| {
        let train = ["train", "-c", text(&config)];
        run(command(&[&train, more].concat()), 1).1
    };
    write(&xl);
    says(
        &said(&[]),
        &[
            "the teacher is SDXL: image.resolution = 1024, encode.batch_size = 8, distill.w_min = 3, by default",
        ],
    );
    let said_set = said(&["-s", "image.resolution=512", "-s", "distill.w_min=5"]);
    says(
        &said_set,
        &["the teacher is SDXL: encode.batch_size = 8, by default"],
    );
    write(&crate::support::teacher());
    assert!(!said(&[]).contains("SDXL"));
}

#[test]
fn parts_of_sdxl_that_do_not_fit_are_named() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    let xl = folder.path().join("xl");
    let train = train_args(&folder.path().join("run"), &refs(&settings));
    let second = xl.join("text_encoder_2");
    let away = folder.path().join("away");
    std::fs::rename(&second, &away).unwrap();
    refuse(1, &train, &["no folder text_encoder_2"]);
    // Without the index that names it, the UNet tells.
    let index = xl.join("model_index.json");
    let whole = std::fs::read(&index).unwrap();
    std::fs::write(&index, "{}").unwrap();
    refuse(
        2,
        &train,
        &["needs a second text encoder", "text_encoder_2/"],
    );
    std::fs::write(&index, whole).unwrap();
    std::fs::rename(&away, &second).unwrap();

    let tokenizer = xl.join("tokenizer_2");
    std::fs::rename(&tokenizer, &away).unwrap();
    refuse(1, &train, &["no folder tokenizer_2"]);
    std::fs::rename(&away, &tokenizer).unwrap();

    let first = xl.join("text_encoder");
    std::fs::rename(&first, &away).unwrap();
    refuse(
        2,
        &train,
        &["the refiner of SDXL", "StableDiffusionXLPipeline"],
    );
    std::fs::rename(&away, &first).unwrap();

    let config = xl.join("unet/config.json");
    let whole = std::fs::read_to_string(&config).unwrap();
    let value: Value = serde_json::from_str(&whole).unwrap();
    let with = |key: &str, new: Value| {
        let mut value = value.clone();
        value[key] = new;
        std::fs::write(&config, value.to_string()).unwrap();
    };
    with("projection_class_embeddings_input_dim", 48.into());
    refuse(1, &train, &["projection_class_embeddings_input_dim", "48"]);
    with("addition_embed_type", "text_image".into());
    refuse(1, &train, &["addition_embed_type", "text_time"]);
    with("addition_time_embed_dim", Value::Null);
    refuse(1, &train, &["addition_time_embed_dim", "needs"]);
    std::fs::write(&config, &whole).unwrap();

    // The teacher of one kind with the surroundings of the other.
    let out = folder.path().join("image.png");
    let plain = crate::support::teacher();
    let sample = |model: &Path, teacher: &Path| {
        let all = ["sample", "--model", text(model), "--teacher", text(teacher)];
        let rest = ["--prompt", "x", "--out", text(&out)];
        refuse(1, &[&all[..], &rest].concat(), &["do not belong together"]);
    };
    sample(&xl, &plain);
    sample(&plain, &xl);
}

mod needs_python {
    use super::*;
    use coffey::conditioning::TextEncoder;
    use coffey::models::{ClipTokenizer, TextParts};
    use npyz::WriterBuilder;

    /// Captions in which the tokenizers differ, and of all lengths.
    const CAPTIONS: [&str; 10] = [
        "",
        "red apple",
        "!",
        "!!",
        "a!b",
        "wow ! what a cat !!! face",
        "  spaces   and\ttabs ! ",
        "<|endoftext|> in the middle <|startoftext|>!",
        "Caf\u{e9} \u{1f34e}",
        "grinning face with smiling eyes",
    ];

    fn compare_text(pipeline: &Path, folder: &Path) {
        let cpu = &Device::Cpu;
        let encoder = TextEncoder::load(pipeline, DType::F32, cpu).unwrap();
        let long = ["face ".repeat(80), "! ".repeat(80)];
        let captions: Vec<&str> = CAPTIONS
            .into_iter()
            .chain(long.iter().map(String::as_str))
            .collect();
        let encoded = encoder.encode(&captions).unwrap();
        assert_eq!(encoded.truncated, 2);
        let conditioning = encoded.conditioning;
        let parts = TextParts::of(pipeline);
        let ids = |folder: &Path| {
            let tokenizer = ClipTokenizer::load(folder).unwrap();
            let rows = captions.iter().map(|c| tokenizer.encode(c).unwrap().ids);
            let flat: Vec<i64> = rows.flatten().map(i64::from).collect();
            Tensor::from_vec(flat, (captions.len(), 77), cpu).unwrap()
        };
        let tensors = HashMap::from([
            ("hidden", conditioning.hidden),
            ("pooled", conditioning.pooled.unwrap()),
            ("tokens", ids(&parts.first.tokenizer)),
            ("tokens_2", ids(&parts.second.unwrap().tokenizer)),
        ]);
        let [file, list] = ["text.safetensors", "captions.json"].map(|name| folder.join(name));
        candle_core::safetensors::save(&tensors, &file).unwrap();
        std::fs::write(&list, serde_json::json!(captions).to_string()).unwrap();
        let compared = [pipeline, &file, &list].map(text);
        python("check_text.py", &compared);
    }

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with PyTorch and diffusers"]
    fn text_embeddings_equal_diffusers() {
        let folder = TempDir::new().unwrap();
        let made = folder.path().join("made");
        python("make_pipeline.py", &[text(&made), "xl"]);
        for pipeline in [made, xl_teacher(folder.path())] {
            compare_text(&pipeline, folder.path());
            // With the id of the end in the configuration, as newer ones have it.
            let config = pipeline.join("text_encoder_2/config.json");
            let mut value: Value =
                serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
            value["eos_token_id"] = 1769.into();
            std::fs::write(&config, value.to_string()).unwrap();
            compare_text(&pipeline, folder.path());
        }
    }

    #[test]
    #[ignore = "needs COFFEY_PYTHON: a Python with PyTorch and diffusers"]
    fn sdxl_drawings_equal_diffusers() {
        let folder = TempDir::new().unwrap();
        let xl = xl_teacher(folder.path());
        let guided = folder.path().join("guided");
        python("make_pipeline.py", &[text(&guided), "xl-guided"]);
        let noise = |name: &str, height: u64, width: u64| {
            let path = folder.path().join(name);
            let file = std::fs::File::create(&path).unwrap();
            let shape = [1, 4, height, width];
            let options = npyz::WriteOptions::new().default_dtype().shape(&shape);
            let mut writer = options.writer(file).begin_nd().unwrap();
            let values = (0..4 * height * width).map(|i| ((i * 37 % 101) as f32 - 50.0) / 29.0);
            writer.extend(values).unwrap();
            writer.finish().unwrap();
            path
        };
        let (square, wide) = (noise("square.npy", 8, 8), noise("wide.npy", 8, 12));
        let out = folder.path().join("image.png");
        // Between the steps of the lcm scheduler both draw noise, each its own.
        for (model, noise, scheduler, steps, guidance, negative) in [
            (&xl, &square, "ddim", "4", "5", None),
            (&xl, &wide, "ddim", "3", "5", Some("cat face!")),
            (&xl, &square, "ddim", "2", "1", None),
            (&xl, &square, "lcm", "1", "8", None),
            (&guided, &wide, "lcm", "1", "8", None),
            (&guided, &square, "tcd", "4", "4", None),
            (&guided, &square, "ddim", "4", "2.5", None),
        ] {
            let mut more = vec!["sample", "--model", text(model), "--out", text(&out)];
            more.extend(["--scheduler", scheduler, "--steps", steps]);
            more.extend(["--eta", "0"].iter().filter(|_| scheduler == "tcd"));
            more.extend(["--guidance", guidance, "--init-latents", text(noise)]);
            more.extend(["--prompt", "red apple !"]);
            more.extend(negative.iter().flat_map(|n| ["--negative-prompt", n]));
            succeed(&more);
            let unet = model.join("unet");
            let mut compared = [model, &unet, noise, &out].map(|path| text(path)).to_vec();
            compared.extend([scheduler, steps, guidance, "red apple !"]);
            compared.extend(negative);
            python("compare_drawing.py", &compared);
        }
    }
}

mod slow {
    use super::*;

    /// One step of an LCM-LoRA at 512 pixels over random weights of the real shapes, in 16 bits: 7 GB of disk, 14 GB of memory.
    #[test]
    #[ignore = "takes half an hour, and needs COFFEY_PYTHON"]
    fn lora_step_at_full_size_fits_its_plan() {
        let folder = TempDir::new().unwrap();
        let teacher = folder.path().join("teacher");
        python(
            "make_pipeline.py",
            &[text(&teacher), "sdxl", "--dtype", "f16"],
        );
        let own = [
            format!("model.teacher={}", text(&teacher)),
            format!("train.output={}", text(&folder.path().join("run"))),
            "encode.batch_size=1".to_owned(),
            "encode.dtype=f16".to_owned(),
            "encode.vae_dtype=f16".to_owned(),
            "lora.rank=64".to_owned(),
            "image.resolution=512".to_owned(),
            "train.batch_size=1".to_owned(),
            "train.gradient_checkpointing=true".to_owned(),
            "train.teacher_dtype=f16".to_owned(),
            "train.max_steps=1".to_owned(),
            "checkpoint.background=false".to_owned(),
        ];
        let settings = || {
            NO_PICTURES
                .into_iter()
                .chain(own.iter().map(String::as_str))
        };
        let mut check = args("check", QUICKSTART_LORA, settings());
        check.push("--json".into());
        let plan = succeed_json(&check);
        let parts = plan["memory"]["parts"].as_array().unwrap();
        let planned: u64 = parts.iter().map(|p| p["bytes"].as_u64().unwrap()).sum();
        let train = args("train", QUICKSTART_LORA, settings());
        let train: Vec<&str> = train.iter().map(String::as_str).collect();
        let peak = peak_memory(&train);
        let ratio = planned as f64 / peak as f64;
        assert!(
            (0.85..1.15).contains(&ratio),
            "planned {planned}, held {peak}"
        );
    }
}
