//! Training from latent shards: the same numbers as from the images, resuming, and every refusal.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::support::{
    NO_PICTURES, PRECOMPUTE, QUICKSTART, args, copy, refuse, says, succeed, succeed_json, teacher,
    text,
};
use candle_core::{DType, Device, Tensor};
use coffey::models::{Weights, save_model};
use serde_json::Value;
use tempfile::TempDir;

const SHARDS: &str = "data.shards=s3://emoji/{00000..00001}.tar";

/// Settings as the arguments of a function.
fn refs(settings: &[String]) -> Vec<&str> {
    settings.iter().map(String::as_str).collect()
}

/// Writes latents of two of the quickstart's shards with `latents.text = kept`.
fn precompute(folder: &TempDir, kept: &str) -> PathBuf {
    let output = folder.path().join("latents");
    let settings = [
        SHARDS,
        &format!("latents.output={}", output.display()),
        &format!("latents.text={kept}"),
    ];
    succeed(&args("precompute", PRECOMPUTE, settings));
    output
}

/// Settings that train from latents instead of images.
fn from(latents: &Path) -> Vec<String> {
    vec![
        "data.kind=latents".to_owned(),
        format!("data.shards={}/", latents.display()),
    ]
}

/// The arguments of a small `train` without pictures.
fn train_args(run: &Path, settings: &[&str]) -> Vec<String> {
    let output = format!("train.output={}", run.display());
    let small = [output.as_str(), "train.batch_size=4"];
    args(
        "train",
        QUICKSTART,
        [&small[..], &NO_PICTURES, settings].concat(),
    )
}

type Step = HashMap<String, Tensor>;

/// Runs two audited steps of two micro-batches; returns the audit of each micro-batch.
fn audit(folder: &Path, name: &str, settings: &[&str]) -> Vec<Step> {
    let (run, audit) = (folder.join(name), folder.join(format!("{name}-audit")));
    let dir = format!("audit.dir={}", audit.display());
    let mut all = vec![
        dir.as_str(),
        "audit.steps=2",
        "train.max_steps=2",
        "train.gradient_accumulation=2",
        "image.scaled_decode=false",
        "distill.proportion_empty_prompts=0.4",
    ];
    all.extend(settings);
    succeed(&train_args(&run, &all));
    let steps = ["000001.00", "000001.01", "000002.00", "000002.01"];
    let read = |step| {
        let file = audit.join(format!("step-{step}.safetensors"));
        candle_core::safetensors::load(file, &Device::Cpu).unwrap()
    };
    steps.map(read).into()
}

fn flat(step: &Step, name: &str) -> Vec<f32> {
    let tensor = step[name].to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Whether `b` is `a` rounded to f16, with at least one value that changed.
fn rounded(a: &[f32], b: &[f32]) -> bool {
    let largest = a.iter().fold(1.0_f32, |largest, x| largest.max(x.abs()));
    a.len() == b.len()
        && a != b
        && a.iter()
            .zip(b)
            .all(|(a, b)| (a - b).abs() < largest / 1024.0)
}

#[test]
fn latent_training_equals_image_training() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("latents");
    let settings = [
        SHARDS,
        "latents.text=both",
        "image.scaled_decode=false",
        &format!("latents.output={}", output.display()),
    ];
    succeed(&args("precompute", PRECOMPUTE, settings));
    let latents = from(&output);
    let latents = refs(&latents);
    let images = audit(folder.path(), "images", &[SHARDS]);
    let embeds = audit(folder.path(), "embeds", &latents);
    let caption = [&latents[..], &["data.text_from=caption"]].concat();
    let caption = audit(folder.path(), "caption", &caption);
    let mut dropped = 0;
    for ((images, embeds), caption) in images.iter().zip(&embeds).zip(&caption) {
        for name in ["noise", "index", "w", "uncond_prompt_embeds"] {
            assert_eq!(flat(images, name), flat(embeds, name), "{name}");
            assert_eq!(flat(images, name), flat(caption, name), "{name}");
        }
        let [one, two, three] = [images, embeds, caption].map(|step| flat(step, "latents"));
        assert!(rounded(&one, &two) && two == three);
        let [one, two, three] = [images, embeds, caption].map(|step| flat(step, "prompt_embeds"));
        assert!(rounded(&one, &two));
        assert_eq!(one, three);
        let uncond = flat(images, "uncond_prompt_embeds");
        let each = uncond.len() / 4;
        let pairs = two.chunks(each).zip(uncond.chunks(each));
        dropped += pairs.filter(|(prompt, uncond)| prompt == uncond).count();
    }
    assert!((1..16).contains(&dropped), "{dropped} of 16");
    // Settings that the configuration leaves out come from the manifest.
    let written = std::fs::read_to_string(folder.path().join("embeds/config.toml")).unwrap();
    says(&written, &["text_from = \"embeds\"", "resolution = 64"]);
    // The written file is a configuration.
    let run = folder.path().join("embeds/config.toml");
    succeed(&["train", "-c", text(&run), "-s", "audit.steps=1"]);
}

#[test]
fn latent_run_resumes_bit_for_bit() {
    let folder = TempDir::new().unwrap();
    let latents = from(&precompute(&folder, "embeds"));
    let train = |name: &str, steps: &str, more: &[&str]| {
        let run = folder.path().join(name);
        let mut all = refs(&latents);
        let steps = format!("train.max_steps={steps}");
        all.extend([steps.as_str(), "data.shuffle_buffer=20"]);
        all.extend(more);
        (run.clone(), train_args(&run, &all))
    };
    let (whole, args) = train("whole", "4", &[]);
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
    // Other embeddings make another student.
    let more = ["data.text_from=caption"];
    refuse(
        2,
        &train("parts", "6", &more).1,
        &["data.text_from was \"embeds\" and is \"caption\""],
    );
    let more = ["data.kind=images", SHARDS];
    let (_, args) = train("parts", "6", &more);
    refuse(2, &args, &["data.kind was \"latents\" and is \"images\""]);
}

#[test]
fn partial_manifests_form_one_source() {
    let folder = TempDir::new().unwrap();
    let bucket = folder.path().join("latents");
    let output = format!("latents.output={}", bucket.display());
    for rank in ["0", "1"] {
        let mut args = args("precompute", PRECOMPUTE, [SHARDS, &output]);
        args.extend(["--rank", rank, "--world", "2"].map(str::to_owned));
        succeed(&args);
    }
    // Splits the manifest into the parts from which the last process joined it.
    let whole = bucket.join("manifest.json");
    for rank in 0..2 {
        let part = bucket.join(format!("manifest-{rank}-of-2.json"));
        std::fs::copy(&whole, &part).unwrap();
        edit(&part, |manifest| {
            let mut index = 0;
            manifest["shards"].as_object_mut().unwrap().retain(|_, _| {
                index += 1;
                index % 2 != rank
            });
        });
    }
    std::fs::remove_file(whole).unwrap();
    let root = format!("s3.embedded_root={}", folder.path().display());
    let data = [
        "data.kind=latents",
        "data.shards=s3://latents/",
        root.as_str(),
    ];
    let run = folder.path().join("run");
    let settings = [&data[..], &["train.max_steps=1"]].concat();
    succeed(&train_args(&run, &settings));

    let settings = [&data[..], &["train.output=run", "train.batch_size=4"]].concat();
    says(
        &succeed(&args("check", QUICKSTART, settings)),
        &[
            "latents [8, 16, 16] of 64x64 pixels",
            "one sample read",
            "as f16",
        ],
    );
    let mut bench = args("bench", QUICKSTART, data);
    bench.extend(["--samples", "300", "--limit", "--json"].map(str::to_owned));
    let measured = succeed_json(&bench);
    assert_eq!(measured["samples"], 304);
    assert_eq!(measured["skipped"], serde_json::json!({}));

    // One part lists only half of the shards.
    std::fs::remove_file(bucket.join("manifest-1-of-2.json")).unwrap();
    let message = [
        "s3://latents/",
        "no manifest there lists 0000",
        "data.shards",
    ];
    refuse(2, &train_args(&run, &data), &message);
}

/// A copy of the teacher with one tensor of `part` changed.
fn changed(folder: &TempDir, part: &str, stem: &str) -> PathBuf {
    let pipeline = folder.path().join(format!("other-{part}"));
    copy(&teacher(), &pipeline);
    let part = pipeline.join(part);
    let weights = Weights::load(&part, stem, DType::F32, &Device::Cpu).unwrap();
    let mut tensors = weights.into_tensors();
    let first = tensors.values_mut().find(|t| t.dtype().is_float()).unwrap();
    *first = (&*first + 0.25).unwrap();
    let config = std::fs::read_to_string(part.join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    save_model(&part, stem, config.as_object().unwrap(), &tensors).unwrap();
    pipeline
}

/// Changes a JSON file.
fn edit(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(file, value.to_string()).unwrap();
}

#[test]
fn mismatched_latents_are_refused_before_training() {
    let folder = TempDir::new().unwrap();
    let latents = precompute(&folder, "embeds");
    let manifest = latents.join("manifest.json");
    let original = std::fs::read(&manifest).unwrap();
    let recipe: Value = serde_json::from_slice(&original).unwrap();
    let base = from(&latents);
    let run = folder.path().join("run");
    let refused = |settings: &[&str], words: &[&str]| {
        let mut all = refs(&base);
        all.extend(settings);
        for command in ["train", "check"] {
            let mut args = train_args(&run, &all);
            args[0] = command.to_owned();
            refuse(2, &args, words);
        }
        assert!(!run.exists());
    };
    let place = manifest.display().to_string();

    // Weights and scaling of other models.
    let of = |part: &str| recipe["fingerprint"][part].as_str().unwrap().to_owned();
    let (vae, text_encoder) = (of("vae"), of("text_encoder"));
    let other = changed(&folder, "vae", "diffusion_pytorch_model");
    let other = format!("model.teacher={}", other.display());
    let words = ["with the VAE", &vae, " is sha256:", "model.vae", &place];
    refused(&[&other], &words);
    let other = changed(&folder, "text_encoder", "model");
    let setting = format!("model.teacher={}", other.display());
    let words = [
        "with the text encoder",
        &text_encoder,
        "model.teacher",
        &place,
    ];
    refused(&[&setting], &words);
    let scaled = folder.path().join("scaled");
    copy(&teacher().join("vae"), &scaled);
    edit(&scaled.join("config.json"), |config| {
        config["scaling_factor"] = 0.5.into();
    });
    let setting = format!("model.vae={}", scaled.display());
    refused(&[&setting], &["latent.scaling_factor is 0.", "and 0.5 in"]);

    // Settings of images that contradict the manifest.
    for (setting, words) in [
        (
            "image.resolution=32",
            "image.resolution = 32: must be 64 or left out",
        ),
        (
            "image.crop=random",
            "image.crop = \"random\": must be \"center\" or",
        ),
        ("image.flip=true", "image.flip = true: must be false or"),
        (
            "image.interpolation=lanczos",
            "must be \"bilinear\" or left out",
        ),
        (
            "data.image_keys=[\"png\"]",
            "has no effect with data.kind = \"latents\"",
        ),
        (
            "data.caption_keys=[\"txt\"]",
            "has no effect with data.kind = \"latents\"",
        ),
        ("data.kind=images", "key data.text_from"),
        ("data.shards=-", "standard input"),
    ] {
        let mut settings = vec![setting];
        if setting == "data.kind=images" {
            settings.push("data.text_from=embeds");
        }
        refused(&settings, &[words]);
    }
    let mut settings = refs(&base);
    settings.push("latents.output=x");
    refuse(
        2,
        &args("precompute", PRECOMPUTE, settings),
        &["latents are made of images"],
    );

    // Manifests of other shapes and versions.
    edit(&manifest, |manifest| {
        manifest["prompt_embeds_shape"] = serde_json::json!([77, 32]);
    });
    refused(&[], &["prompt_embeds_shape is [77, 32], and [77, ", "unet"]);
    edit(&manifest, |manifest| {
        manifest["latent"]["shape"] = serde_json::json!([16, 16, 16]);
    });
    refused(&[], &["latent.shape is [16, 16, 16], and [8, 16, 16] in"]);
    edit(&manifest, |manifest| {
        manifest["prompt_embeds_shape"] = Value::Null;
        manifest["text"] = "caption".into();
    });
    refused(
        &[],
        &[
            "hold no text embeddings",
            "data.text_from = \"caption\"",
            &place,
        ],
    );
    edit(&manifest, |manifest| manifest["format_version"] = 99.into());
    refused(&[], &["format_version 99, needed 1", &place]);
    std::fs::remove_file(&manifest).unwrap();
    refused(&[], &["no manifest.json is there", "coffey precompute"]);
    std::fs::write(&manifest, &original).unwrap();

    // A second folder with another fingerprint.
    let second = folder.path().join("second");
    copy(&latents, &second);
    edit(&second.join("manifest.json"), |manifest| {
        manifest["fingerprint"]["vae"] = "sha256:0".into();
    });
    let both = format!(
        "data.shards=[\"{0}/\", \"{1}/\"]",
        latents.display(),
        second.display()
    );
    refused(
        &[&both],
        &["has fingerprint.vae = ", "sha256:0", "can't be mixed"],
    );
    // An image shard among them.
    std::fs::write(latents.join("more.tar"), [0; 1024]).unwrap();
    refused(&[], &["no manifest there lists more.tar"]);
}
