//! What a folder, prefix or repository is, by its files, if it is no model in diffusers layout.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

/// The files in a model's place.
pub(super) struct Place<'a> {
    /// The model's name, as it was given.
    pub(super) name: &'a str,
    /// Paths of the files.
    pub(super) files: &'a BTreeSet<String>,
    /// Reads one of the files as JSON, if it can be read now.
    pub(super) json: &'a dyn Fn(&str) -> Option<Value>,
}

impl Place<'_> {
    fn has(&self, file: &str) -> bool {
        self.files.contains(file)
    }

    /// Whether a file lies in the folder.
    pub(super) fn has_folder(&self, folder: &str) -> bool {
        self.files.iter().any(|file| {
            file.strip_prefix(folder)
                .is_some_and(|rest| rest.starts_with('/'))
        })
    }

    /// The first file of which `is` holds.
    fn find(&self, is: impl Fn(&str) -> bool) -> Option<&str> {
        self.files.iter().map(String::as_str).find(|file| is(file))
    }

    /// The string of a key in one of the files.
    fn text(&self, file: &str, key: &str) -> Option<String> {
        let value = self.has(file).then(|| (self.json)(file)).flatten()?;
        let text = match value.get(key)? {
            Value::Array(items) => items.first()?.as_str()?,
            value => value.as_str()?,
        };
        Some(text.to_owned())
    }

    /// Whether a file in the root has a name that ends in one of `endings`.
    fn find_in_root(&self, endings: &[&str]) -> Option<&str> {
        self.find(|file| !file.contains('/') && endings.iter().any(|end| file.ends_with(end)))
    }
}

/// A pipeline of another family, which may have all the folders that are needed: what it is.
pub(super) fn other_family(place: &Place<'_>) -> Option<String> {
    let class = place.text("model_index.json", "_class_name");
    let class = class.unwrap_or_default();
    let has = |folder: &str| place.has_folder(folder);
    let what = if has("unet") && has("text_encoder_2") && !has("text_encoder") {
        "the refiner of SDXL, whose text encoder and size ids are others than the base model's"
    } else if has("transformer") && !has("unet") {
        "a model with a transformer in place of the UNet, as SD3 and Flux"
    } else {
        return None;
    };
    let class = if class.is_empty() {
        class
    } else {
        format!(" ({class})")
    };
    Some(format!(
        "is {what}{class}; coffey distils models with the parts of a StableDiffusionPipeline or a StableDiffusionXLPipeline, one or \
         two CLIP text encoders and a UNet, as stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0"
    ))
}

/// What the place is that lacks files of a model, and what to give instead; `None` if its files tell nothing, or it is a pipeline, of
/// which it is enough to say what it lacks.
pub(super) fn describe(place: &Place<'_>) -> Option<String> {
    if let Some(what) = other_format(place) {
        return Some(what);
    }
    let parts = ["unet", "vae", "text_encoder"];
    if place.has("model_index.json") || parts.iter().all(|part| place.has_folder(part)) {
        return None;
    }
    of_coffey(place)
        .or_else(|| cache(place))
        .or_else(|| lora(place))
        .or_else(|| component(place))
        .or_else(|| training_state(place))
        .or_else(|| single_file(place))
}

/// Folders that coffey writes, and shards.
fn of_coffey(place: &Place<'_>) -> Option<String> {
    if place.has("run.json") {
        let teacher = place.text("run.json", "teacher");
        let teacher = teacher.map_or_else(
            || "the model that it was distilled from".to_owned(),
            |teacher| format!("its teacher, {teacher}"),
        );
        return Some(format!(
            "is the folder of a run of coffey, which holds only UNets; give {teacher}. To go on with the run, set train.output to it; \
             `coffey sample --model` draws with it"
        ));
    }
    if place.has("state.json") && place.has_folder("unet_target") {
        return Some(
            "is a checkpoint of a run of coffey, which holds only UNets; give the teacher of the run. To go on with the run, set \
             train.output to the folder above it; `coffey sample --model` draws with it"
                .to_owned(),
        );
    }
    if place.has("manifest.json") && place.find_in_root(&[".tar"]).is_some() {
        return Some(
            "holds latent shards; they belong in data.shards, with data.kind = \"latents\""
                .to_owned(),
        );
    }
    place
        .find_in_root(&[".tar"])
        .map(|_| "holds shards and no model; they belong in data.shards".to_owned())
}

/// The cache of `huggingface_hub`.
fn cache(place: &Place<'_>) -> Option<String> {
    let last = place.name.trim_end_matches('/').rsplit('/').next()?;
    if let Some(id) = last.strip_prefix("models--") {
        let id = id.replacen("--", "/", 1);
        return Some(format!(
            "is the cache folder of the Hub's model {id}; write \"{id}\", which is taken from the cache, or the folder of one commit \
             in it, {last}/snapshots/COMMIT"
        ));
    }
    let model =
        place.find(|file| file.starts_with("models--") || file.starts_with("hub/models--"))?;
    let folder = model.split('/').find(|part| part.starts_with("models--"))?;
    let id = folder.trim_start_matches("models--").replacen("--", "/", 1);
    Some(format!(
        "is a cache of models of the Hub; write the id of one of them, as \"{id}\""
    ))
}

/// Adapters without their model.
fn lora(place: &Place<'_>) -> Option<String> {
    let named = |file: &str| {
        let name = file.to_lowercase();
        (name.contains("lora") || name.starts_with("adapter_model."))
            && [".safetensors", ".bin", ".pt"]
                .iter()
                .any(|end| name.ends_with(end))
    };
    let file =
        place.find(|file| !file.contains('/') && (named(file) || file == "adapter_config.json"))?;
    Some(format!(
        "holds a LoRA ({file}) and no model; give the model that it belongs to, or a copy of that with the UNet that `coffey export \
         MODEL --lora FILE --merge` writes"
    ))
}

/// One model without the other parts of a pipeline.
fn component(place: &Place<'_>) -> Option<String> {
    if !place.has("config.json") {
        return None;
    }
    let class = place.text("config.json", "_class_name");
    let class = class.or_else(|| place.text("config.json", "architectures"))?;
    let what = if class.contains("ControlNet") {
        "a ControlNet: give the model that it was made for"
    } else if class.starts_with("UNet") {
        "a UNet alone: give the folder above it, with scheduler, tokenizer, text_encoder and vae"
    } else if class.starts_with("Autoencoder") {
        "an autoencoder alone: it can be model.vae; the teacher is the folder of a whole pipeline"
    } else {
        "one model alone: give the folder of a whole pipeline, with scheduler, tokenizer, text_encoder, unet and vae"
    };
    Some(format!("is of the class {class}, {what}"))
}

/// What a training script saved to go on from.
fn training_state(place: &Place<'_>) -> Option<String> {
    let file = place.find(|file| {
        [
            "optimizer.bin",
            "optimizer.pt",
            "random_states_0.pkl",
            "scheduler.bin",
            "training_state.json",
        ]
        .contains(&file)
            || file.starts_with("checkpoint-")
    })?;
    let root = file.split('/').next().unwrap_or(file);
    Some(format!(
        "holds the state of a training run ({root}) and no whole pipeline; save the pipeline with its UNet in Python: \
         StableDiffusionPipeline.from_pretrained(BASE, unet=UNet2DConditionModel.from_pretrained(FOLDER)).save_pretrained(NEW)"
    ))
}

/// A model in one file, in the layout of Stable Diffusion's own code.
fn single_file(place: &Place<'_>) -> Option<String> {
    let file = place.find_in_root(&[".safetensors", ".ckpt"])?;
    if place.has("config.json") {
        return None;
    }
    Some(format!(
        "holds a checkpoint in one file ({file}), and coffey reads folders in diffusers layout; convert it in Python: \
         StableDiffusionPipeline.from_single_file(\"{file}\").save_pretrained(FOLDER)"
    ))
}

/// Models for other programs than PyTorch.
fn other_format(place: &Place<'_>) -> Option<String> {
    let of_torch = |file: &str| {
        [".safetensors", ".bin"]
            .iter()
            .any(|end| file.ends_with(end))
    };
    if place.find(of_torch).is_some() {
        return None;
    }
    for (ending, what) in [
        (".onnx", "ONNX"),
        (".gguf", "GGUF"),
        (".mlpackage", "Core ML"),
        (".engine", "TensorRT"),
        (".msgpack", "Flax"),
    ] {
        if let Some(file) = place.find(|file| file.ends_with(ending)) {
            return Some(format!(
                "holds a model for {what} ({file}); give the model for PyTorch that it was made from"
            ));
        }
    }
    None
}

/// What a file is that was given as a model, by its name and the names of its tensors.
pub(super) fn describe_file(path: &Path, tensors: &[String]) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let lower = name.to_lowercase();
    let has = |mark: &str| tensors.iter().any(|tensor| tensor.contains(mark));
    let is_lora = ["lora", "adapter_model"]
        .iter()
        .any(|word| lower.contains(word))
        || has("lora_")
        || has(".lora.");
    if is_lora {
        return "is a LoRA; give the folder of the model that it belongs to, or a copy of that with the UNet that `coffey export \
                MODEL --lora FILE --merge` writes"
            .to_owned();
    }
    let is_weights = [".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf"]
        .iter()
        .any(|end| lower.ends_with(end));
    if has("controlnet_cond_embedding") || has("control_model.") {
        return "is a ControlNet; give the folder of the model that it was made for".to_owned();
    }
    if has("down_blocks.") || has("text_model.") {
        return "is the weights of one part of a model; give the folder of the whole pipeline, in which unet/, vae/ and the others are"
            .to_owned();
    }
    if is_weights {
        let class = if has("conditioner.embedders.") {
            "StableDiffusionXLPipeline"
        } else {
            "StableDiffusionPipeline"
        };
        return format!(
            "is a checkpoint in one file; a model is a folder in diffusers layout, into which it is converted in Python: \
             {class}.from_single_file(FILE).save_pretrained(FOLDER)"
        );
    }
    if lower.ends_with("model_index.json") {
        return "is a file of a model; give its folder".to_owned();
    }
    "is a file; a model is a folder in diffusers layout, s3://bucket/prefix or a Hub id as user/model".to_owned()
}
