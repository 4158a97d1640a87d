//! The forms in which the weights of a model are stored, and the one that is read: for folders, S3 and the Hub alike.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::ModelError;
use super::weight_names::unwrapped;
use super::weights::read_json;

/// The stem of the weight files of transformers' models.
pub const TEXT_ENCODER_STEM: &str = "model";

/// The file that is read for a model's weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightsFile {
    /// Its name in the model's folder.
    pub name: String,
    /// Whether it is the `fp16` variant, which is read only if there is nothing else.
    pub is_variant: bool,
}

impl WeightsFile {
    /// Whether the file is an index, which names the files with the tensors (shards).
    pub fn is_index(&self) -> bool {
        self.name.ends_with(".json")
    }
}

/// Chooses the file to read out of the names of a folder's files, as `from_pretrained` without a variant does: diffusers prefers
/// an index to a whole file, transformers a whole file to an index. Where diffusers would find nothing, the `fp16` variant is chosen.
///
/// # Errors
/// A message with the weights that are there instead, and how to convert them.
pub fn choose_weights(stem: &str, names: &BTreeSet<String>) -> Result<WeightsFile, String> {
    let choose = |forms: &[&str], is_variant| {
        let names_of_forms = forms.iter().map(|form| format!("{stem}.{form}"));
        names_of_forms
            .into_iter()
            .find(|name| names.contains(name))
            .map(|name| WeightsFile { name, is_variant })
    };
    let mut plain = ["safetensors.index.json", "safetensors"];
    // Older versions of diffusers wrote the second name of the index.
    let mut variant = [
        "safetensors.index.fp16.json",
        "safetensors.fp16.index.json",
        "fp16.safetensors",
    ];
    if stem == TEXT_ENCODER_STEM {
        plain.reverse();
        variant.reverse();
    }
    if let Some(file) = choose(&plain, false) {
        return Ok(file);
    }
    let variant = choose(&variant, true);
    // Without a variant `from_pretrained` reads this file, so the variant's numbers are not the model's.
    let pickle = format!("{}.bin", pickle_stem(stem));
    match variant {
        Some(file) if !names.contains(&pickle) => Ok(file),
        variant => Err(describe_unread(stem, names, variant.as_ref())),
    }
}

/// The stem of the files that PyTorch pickled.
fn pickle_stem(stem: &str) -> &str {
    if stem == TEXT_ENCODER_STEM {
        "pytorch_model"
    } else {
        stem
    }
}

/// Says which weights are there that are not read, and how they become a form that is.
fn describe_unread(stem: &str, names: &BTreeSet<String>, variant: Option<&WeightsFile>) -> String {
    let ends = |endings: &[&str]| {
        let found = names
            .iter()
            .filter(|name| endings.iter().any(|end| name.ends_with(end)));
        found.map(String::as_str).collect::<Vec<_>>()
    };
    let stems = [stem, pickle_stem(stem)];
    let pickled = names.iter().filter(|name| {
        (name.ends_with(".bin") || name.ends_with(".bin.index.json"))
            && stems.iter().any(|stem| name.starts_with(stem))
    });
    let pickled: Vec<_> = pickled.map(String::as_str).collect();
    if !pickled.is_empty() {
        let other = variant.map_or_else(String::new, |file| {
            format!(
                "; {} is another variant, which is not read beside it: to take that one, load it with variant=\"fp16\"",
                file.name
            )
        });
        return format!(
            "only {}, and .bin files (pickles) are not read; load the model in Python with from_pretrained and save it with \
             save_pretrained(FOLDER, safe_serialization=True){other}",
            pickled.join(", ")
        );
    }
    let variants: BTreeSet<&str> = names
        .iter()
        .filter_map(|name| variant_of(stem, name))
        .collect();
    if let Some(variant) = variants.first() {
        return format!(
            "only the variant {}, which is not read; load the model in Python with from_pretrained(…, variant=\"{variant}\") and save \
             it without a variant: save_pretrained(FOLDER)",
            Vec::from_iter(variants.iter().map(|name| format!("\"{name}\""))).join(", ")
        );
    }
    for (endings, what) in [
        (
            &[".msgpack", ".h5"][..],
            "weights of Flax or TensorFlow, which are not read; load the model in Python with from_pretrained(…, from_flax=True) and \
             save it with save_pretrained(FOLDER)",
        ),
        (
            &[".onnx", ".xml"],
            "a graph of ONNX or OpenVINO, which can't be trained; give the model that it was exported from",
        ),
        (
            &[".gguf"],
            "quantised weights, which are not read; give the model that they were made from",
        ),
        (
            &["lora_weights.safetensors", "adapter_model.safetensors"],
            "a LoRA; give the model that it belongs to, or the UNet that `coffey export MODEL --lora FILE --merge` writes",
        ),
    ] {
        if let [first, ..] = ends(endings)[..] {
            return format!("only {first}: {what}");
        }
    }
    let others = ends(&[".safetensors", ".ckpt", ".pt", ".pth", ".bin"]);
    let found = match others[..] {
        [] => "there is no file of weights".to_owned(),
        _ => format!("{} is not a name that diffusers gives", others.join(", ")),
    };
    format!(
        "{found}; expected is that file, or {stem}.safetensors.index.json with the shards that it names"
    )
}

/// The variant that a safetensors file or index of `stem` belongs to: the part between stem, shard number and ending.
fn variant_of<'a>(stem: &str, name: &'a str) -> Option<&'a str> {
    let rest = name.strip_prefix(stem)?;
    let variant = if let Some(index) = rest.strip_prefix(".safetensors.index.") {
        index.strip_suffix(".json")?
    } else {
        let rest = rest.strip_suffix(".safetensors")?;
        // Shards: `.fp16-00001-of-00002`, before `-00001-of-00002.fp16`.
        let rest =
            rest.split_once("-of-")
                .map_or(rest, |(before, after)| match after.split_once('.') {
                    Some(_) => after,
                    None => before.rsplit_once('-').map_or(before, |(before, _)| before),
                });
        rest.split_once('.')?.1
    };
    (!variant.is_empty()).then_some(variant)
}

/// The shard of each tensor, as a weight index says; names of tensors are [`unwrapped`].
///
/// # Errors
/// When the index can't be read, names no tensor, or names a file that is not in its own folder or no safetensors file.
pub(super) fn read_index(path: &Path) -> Result<BTreeMap<String, String>, ModelError> {
    #[derive(serde::Deserialize)]
    struct WeightIndex {
        weight_map: BTreeMap<String, String>,
    }
    let WeightIndex { weight_map } = read_json(path)?;
    let invalid = |message: String| ModelError::Config {
        path: path.to_owned(),
        message,
    };
    if weight_map.is_empty() {
        return Err(invalid("\"weight_map\" names no tensor".to_owned()));
    }
    let shard = |(name, file): (String, String)| {
        // A bare file name: an index must not lead out of its folder.
        let is_bare = !file.contains(['/', '\\']);
        if is_bare && file.ends_with(".safetensors") {
            Ok((unwrapped(&name).into_owned(), file))
        } else {
            Err(invalid(format!(
                "\"weight_map\" names \"{file}\", which is not a .safetensors file in the same folder"
            )))
        }
    };
    weight_map.into_iter().map(shard).collect()
}

/// Names of the shards that a weight index lists.
///
/// # Errors
/// When the index can't be read, names no tensor, or names a file that is not in its own folder or no safetensors file.
pub fn index_shards(path: &Path) -> Result<BTreeSet<String>, ModelError> {
    Ok(read_index(path)?.into_values().collect())
}

/// Names of the files in a folder.
pub fn file_names(folder: &Path) -> BTreeSet<String> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let files = entries.filter(|entry| entry.path().is_file());
    files
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNET: &str = crate::models::unet::WEIGHTS_STEM;
    const TEXT: &str = TEXT_ENCODER_STEM;

    fn choose(stem: &str, forms: &[&str]) -> Result<String, String> {
        let names = forms.iter().map(|form| {
            let pickle = form
                .strip_prefix("bin")
                .map(|end| format!("{}.bin{end}", pickle_stem(stem)));
            pickle.unwrap_or_else(|| format!("{stem}{form}"))
        });
        let file = choose_weights(stem, &names.collect())?;
        Ok(file.name[stem.len()..].to_owned())
    }

    /// The choices were compared with diffusers 0.42 and transformers 5.
    #[test]
    fn weights_are_chosen_as_the_libraries_do() {
        let (whole, index) = (".safetensors", ".safetensors.index.json");
        let (half, half_index) = (".fp16.safetensors", ".safetensors.index.fp16.json");
        let old_index = ".safetensors.fp16.index.json";
        for (stem, first, second) in [(UNET, index, whole), (TEXT, whole, index)] {
            let all = [
                whole,
                index,
                half,
                half_index,
                "bin",
                ".non_ema.safetensors",
            ];
            assert_eq!(choose(stem, &all).unwrap(), first, "{stem}");
            assert_eq!(
                choose(stem, &[second, half, half_index, "bin"]).unwrap(),
                second
            );
            assert_eq!(choose(stem, &[half]).unwrap(), half);
            assert_eq!(choose(stem, &[half_index]).unwrap(), half_index);
            assert_eq!(
                choose(stem, &[old_index, ".non_ema.safetensors"]).unwrap(),
                old_index
            );
        }
    }

    #[test]
    fn weights_that_are_not_read_are_named_with_the_remedy() {
        for (stem, forms, words) in [
            (
                UNET,
                &["bin"][..],
                &["diffusion_pytorch_model.bin", "safe_serialization=True"][..],
            ),
            (
                TEXT,
                &["bin"],
                &["pytorch_model.bin", "safe_serialization=True"],
            ),
            (
                TEXT,
                &["bin.index.json"],
                &["pytorch_model.bin.index.json", "safe_serialization"],
            ),
            (
                UNET,
                &["bin", ".fp16.safetensors"],
                &["model.bin", "fp16.safetensors", "variant=\"fp16\""],
            ),
            (
                UNET,
                &[".fp16.bin"],
                &["model.fp16.bin", "safe_serialization"],
            ),
            (
                UNET,
                &[".non_ema.safetensors"],
                &["variant=\"non_ema\"", "without a variant"],
            ),
            (
                UNET,
                &[".ema-00001-of-00002.safetensors"],
                &["variant=\"ema\""],
            ),
            (
                UNET,
                &["-00001-of-00002.ema.safetensors"],
                &["variant=\"ema\""],
            ),
            (
                UNET,
                &[".safetensors.index.bf16.json"],
                &["variant=\"bf16\""],
            ),
            (UNET, &[".msgpack"], &["Flax", "from_flax=True"]),
            (UNET, &[".onnx"], &["ONNX"]),
            (
                UNET,
                &["-00001-of-00002.safetensors"],
                &["-00001-of-00002.safetensors", "index.json"],
            ),
            (
                UNET,
                &[],
                &[
                    "no file of weights",
                    "diffusion_pytorch_model.safetensors.index.json",
                ],
            ),
        ] {
            let message = choose(stem, forms).unwrap_err();
            for word in words {
                assert!(message.contains(word), "{forms:?}: {word:?}? {message}");
            }
        }
        let names = ["pytorch_lora_weights.safetensors".to_owned()].into();
        let message = choose_weights(UNET, &names).unwrap_err();
        assert!(message.contains("LoRA"), "{message}");
    }

    #[test]
    fn index_outside_its_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index.json");
        let read = |json: serde_json::Value| {
            std::fs::write(&path, json.to_string()).unwrap();
            index_shards(&path).map_err(|error| error.to_string())
        };
        let two = serde_json::json!({"weight_map": {"a": "x-1.safetensors", "_orig_mod.b": "x-2.safetensors", "c": "x-1.safetensors"}});
        assert_eq!(
            read(two).unwrap().into_iter().collect::<Vec<_>>(),
            ["x-1.safetensors", "x-2.safetensors"]
        );
        for name in [
            "../x.safetensors",
            "/etc/passwd",
            "a/x.safetensors",
            "x.bin",
        ] {
            let error = read(serde_json::json!({"weight_map": {"a": name}})).unwrap_err();
            assert!(
                error.contains(name) && error.contains("same folder"),
                "{error}"
            );
        }
        let error = read(serde_json::json!({"weight_map": {}})).unwrap_err();
        assert!(error.contains("names no tensor"), "{error}");
    }
}
