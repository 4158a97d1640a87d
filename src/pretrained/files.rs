//! Selects the files of a model to fetch: for each component its configuration and one form of its weights.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use coffey_pipeline::json;

/// Stem of the weight files of diffusers' models.
const DIFFUSERS_STEM: &str = "diffusion_pytorch_model";
/// Stem of the weight files of transformers' models.
const TRANSFORMERS_STEM: &str = "model";

/// The components of a model that a command needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Components {
    components: Vec<Component>,
    /// Optional files in the model's folder.
    extras: &'static [&'static str],
}

/// One component, usually a subfolder.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Component {
    /// Possible folder names, in order of preference; the empty name is the model's folder itself.
    names: Vec<String>,
    required: bool,
}

impl Component {
    fn required(name: &str) -> Self {
        Self {
            names: vec![name.to_owned()],
            required: true,
        }
    }

    fn optional(name: &str) -> Self {
        Self {
            required: false,
            ..Self::required(name)
        }
    }
}

impl Components {
    fn pipeline(names: &[&str], own_vae: bool) -> Self {
        let vae = own_vae.then_some(&"vae");
        let names = names.iter().chain(vae);
        Self {
            components: names.map(|name| Component::required(name)).collect(),
            extras: &["model_index.json"],
        }
    }

    /// Components that training reads from a teacher; `own_vae`: with the teacher's own VAE.
    pub fn training(own_vae: bool) -> Self {
        Self::pipeline(&["scheduler", "tokenizer", "text_encoder", "unet"], own_vae)
    }

    /// Components that encoding reads: no UNet and no scheduler.
    pub fn encoding(own_vae: bool) -> Self {
        Self::pipeline(&["tokenizer", "text_encoder"], own_vae)
    }

    /// Components that sampling reads besides a UNet.
    pub fn without_unet() -> Self {
        Self::pipeline(&["scheduler", "tokenizer", "text_encoder"], true)
    }

    /// Components that `coffey sample` reads: the UNet named `unet`, by default `unet_target` else `unet`; with `others` also
    /// the other components that the model has.
    pub fn sampling(unet: Option<&str>, others: bool) -> Self {
        let names = unet.map_or_else(|| vec!["unet_target", "unet"], |name| vec![name]);
        let mut components = vec![Component {
            names: names.into_iter().map(str::to_owned).collect(),
            required: true,
        }];
        if others {
            let others = ["scheduler", "tokenizer", "text_encoder", "vae"];
            components.extend(others.map(Component::optional));
        }
        Self {
            components,
            extras: &["model_index.json", "run.json", "config.toml"],
        }
    }

    /// A VAE that is the model itself or its subfolder `vae`.
    pub fn vae() -> Self {
        Self {
            components: vec![Component {
                names: vec![String::new(), "vae".to_owned()],
                required: true,
            }],
            extras: &[],
        }
    }
}

/// The files to fetch.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct FetchPlan {
    /// Paths in the model's folder.
    pub(super) files: Vec<String>,
    /// The weight indexes in `files`, which list further files (shards).
    pub(super) indexes: Vec<String>,
}

/// Chooses the files to fetch out of `available`, the paths in a model's folder.
///
/// # Errors
/// A message with what the model lacks.
pub(super) fn plan(
    components: &Components,
    available: &BTreeSet<String>,
) -> Result<FetchPlan, String> {
    let mut plan = FetchPlan::default();
    let extras = components.extras.iter().map(|name| (*name).to_owned());
    plan.files
        .extend(extras.filter(|name| available.contains(name)));
    for component in &components.components {
        let first = component.names.first().map_or("", String::as_str);
        let first = ConfigFiles::of(first);
        let there = |name: &&String| ConfigFiles::of(name).form(name, available).is_some();
        let name = component.names.iter().find(there);
        match name {
            Some(name) => plan_component(&mut plan, name, available)?,
            None if !component.required => {}
            None => {
                let names = component.names.iter();
                let files =
                    names.flat_map(|name| first.forms.iter().map(|form| join(name, form[0])));
                let files: Vec<_> = files.collect();
                return Err(format!("it has no {}", files.join(" and no ")));
            }
        }
    }
    Ok(plan)
}

/// The configuration files of a component.
struct ConfigFiles {
    /// Sets of files, in order of preference: the first that is there is needed whole.
    forms: &'static [&'static [&'static str]],
    optional: &'static [&'static str],
}

impl ConfigFiles {
    fn of(component: &str) -> Self {
        match component {
            "scheduler" => Self {
                forms: &[&["scheduler_config.json"]],
                optional: &[],
            },
            // The order of preference of `ClipTokenizer::load`.
            "tokenizer" => Self {
                forms: &[&["tokenizer.json"], &["vocab.json", "merges.txt"]],
                optional: &[
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "added_tokens.json",
                ],
            },
            _ => Self {
                forms: &[&["config.json"]],
                optional: &[],
            },
        }
    }

    /// The first form that has its first file in the folder `component`.
    fn form(&self, component: &str, available: &BTreeSet<String>) -> Option<&[&'static str]> {
        let there = |form: &&&[&str]| available.contains(&join(component, form[0]));
        self.forms.iter().find(there).copied()
    }
}

fn plan_component(
    plan: &mut FetchPlan,
    component: &str,
    available: &BTreeSet<String>,
) -> Result<(), String> {
    let files = ConfigFiles::of(component);
    for name in files.form(component, available).unwrap_or_default() {
        let file = join(component, name);
        if !available.contains(&file) {
            return Err(format!("it has no {file}"));
        }
        plan.files.push(file);
    }
    let optional = files.optional.iter().map(|name| join(component, name));
    plan.files
        .extend(optional.filter(|name| available.contains(name)));
    if matches!(component, "scheduler" | "tokenizer") {
        return Ok(());
    }
    let stem = match component {
        "text_encoder" => TRANSFORMERS_STEM,
        _ => DIFFUSERS_STEM,
    };
    // The order of preference of `Weights::load`: a model from S3 or the Hub gives the numbers of one in a folder.
    let forms = [
        "safetensors",
        "fp16.safetensors",
        "safetensors.index.json",
        "safetensors.index.fp16.json",
    ];
    let file = forms
        .iter()
        .map(|form| join(component, &format!("{stem}.{form}")))
        .find(|file| available.contains(file))
        .ok_or_else(|| {
            let pickled = available.contains(&join(component, &format!("{stem}.bin")))
                || available.contains(&join(component, "pytorch_model.bin"));
            format!(
                "it has no weights {}{}",
                join(component, &format!("{stem}.safetensors")),
                if pickled {
                    ", only .bin files, which are not read: save it again with safe_serialization=True"
                } else {
                    " (nor its fp16 variant or an index of shards)"
                }
            )
        })?;
    if file.ends_with(".json") {
        plan.indexes.push(file.clone());
    }
    plan.files.push(file);
    Ok(())
}

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() {
        name.to_owned()
    } else {
        format!("{folder}/{name}")
    }
}

/// The shards that a weight index lists, as paths in the model's folder. `index` is its path there, `path` its local file.
///
/// # Errors
/// A message with what is wrong with the index.
pub(super) fn shards(index: &str, path: &Path) -> Result<BTreeSet<String>, String> {
    #[derive(serde::Deserialize)]
    struct WeightIndex {
        weight_map: BTreeMap<String, String>,
    }
    let bytes = std::fs::read(path).map_err(|error| format!("{index}: {error}"))?;
    let parsed: WeightIndex =
        json::from_slice(&bytes).map_err(|error| format!("{index}: {error}"))?;
    let folder = index.rsplit_once('/').map_or("", |(folder, _)| folder);
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    names
        .into_iter()
        .map(|name| {
            // The name becomes a path, which must stay in the index's folder.
            if name.ends_with(".safetensors") && !name.contains(['/', '\\']) {
                Ok(join(folder, &name))
            } else {
                Err(format!(
                    "{index}: lists {name:?}, which is not a shard in the same folder"
                ))
            }
        })
        .collect()
}

/// Paths in `folder` of the files in it and its subfolders; broken links are left out.
pub(super) fn listing(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    collect(folder, "", &mut found);
    found
}

fn collect(folder: &Path, prefix: &str, found: &mut BTreeSet<String>) {
    let Ok(entries) = folder.read_dir() else {
        return;
    };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = join(prefix, &name.to_string_lossy());
        // A broken link is neither.
        if path.is_dir() {
            collect(&path, &name, found);
        } else if path.is_file() {
            found.insert(name);
        }
    }
}

/// Whether a folder has all files of `components`, including the shards that its indexes list.
pub(super) fn is_complete(components: &Components, folder: &Path) -> bool {
    let available = listing(folder);
    plan(components, &available).is_ok_and(|plan| {
        plan.indexes.iter().all(|index| {
            shards(index, &folder.join(index)).is_ok_and(|shards| shards.is_subset(&available))
        })
    })
}

#[cfg(test)]
mod tests {
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
            "it has no tokenizer/tokenizer.json and no tokenizer/vocab.json"
        );
    }

    #[test]
    fn sampling_plan_prefers_the_target() {
        let mut available = hub();
        let unet = |available: &_, name| {
            sorted(plan(&Components::sampling(name, false), available).unwrap())
        };
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
        assert_eq!(error, "it has no other/config.json");
        available.retain(|name| !name.starts_with("vae/"));
        assert!(plan(&Components::sampling(None, true), &available).is_ok());
    }

    #[test]
    fn plan_takes_one_form_of_weights() {
        let whole = "unet/diffusion_pytorch_model.safetensors";
        let half = "unet/diffusion_pytorch_model.fp16.safetensors";
        let mut available = hub();
        available.remove(whole);
        let files = sorted(plan(&Components::training(true), &available).unwrap());
        assert!(files.contains(&half.to_owned()), "{files:?}");
        let index = format!("{whole}.index.json");
        available.insert(index.clone());
        let found = plan(&Components::training(true), &available).unwrap();
        assert!(found.indexes.is_empty() && !found.files.contains(&index));
        available.remove(half);
        let found = plan(&Components::training(true), &available).unwrap();
        assert_eq!(found.indexes, std::slice::from_ref(&index));
        assert!(found.files.contains(&index));
        available.remove(&index);
        let error = plan(&Components::training(true), &available).unwrap_err();
        assert!(
            error.contains(whole) && error.contains("only .bin"),
            "{error}"
        );
        assert!(plan(&Components::encoding(true), &available).is_ok());
    }

    #[test]
    fn shards_outside_the_index_folder_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index.json");
        let write = |json: serde_json::Value| std::fs::write(&path, json.to_string()).unwrap();
        let index = "unet/diffusion_pytorch_model.safetensors.index.json";
        write(
            serde_json::json!({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-1.safetensors"}}),
        );
        assert_eq!(
            shards(index, &path).unwrap(),
            ["unet/x-1.safetensors", "unet/x-2.safetensors"]
                .map(str::to_owned)
                .into()
        );
        for name in ["../x.safetensors", "/etc/passwd", "x.bin"] {
            write(serde_json::json!({"weight_map": {"a": name}}));
            let error = shards(index, &path).unwrap_err();
            assert!(error.contains("not a shard"), "{error}");
        }
    }

    #[test]
    fn folder_without_a_shard_is_incomplete() {
        let folder = tempfile::tempdir().unwrap();
        let vae = folder.path().join("vae");
        std::fs::create_dir(&vae).unwrap();
        let write = |name: &str, text: &str| std::fs::write(vae.join(name), text).unwrap();
        write("config.json", "{}");
        assert!(!is_complete(&Components::vae(), folder.path()));
        write(
            "diffusion_pytorch_model.safetensors.index.json",
            r#"{"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}"#,
        );
        write("x-1.safetensors", "");
        assert!(!is_complete(&Components::vae(), folder.path()));
        write("x-2.safetensors", "");
        assert!(is_complete(&Components::vae(), folder.path()));
    }
}
