//! Which files of a model are needed: of each part its configuration and one form of its weights, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Stem of the weight files of diffusers' models.
const DIFFUSERS_STEM: &str = "diffusion_pytorch_model";
/// Stem of the weight files of transformers' models.
const TRANSFORMERS_STEM: &str = "model";

/// What of a model is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    parts: Vec<Part>,
    /// Files that are taken if they are there.
    extras: &'static [&'static str],
}

/// One subfolder.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    /// Names it may have, the first that is there is taken; the empty one is the model's folder itself.
    names: Vec<String>,
    required: bool,
}

impl Part {
    fn required(name: &str) -> Self {
        Self {
            names: vec![name.to_owned()],
            required: true,
        }
    }

    fn if_there(name: &str) -> Self {
        Self {
            required: false,
            ..Self::required(name)
        }
    }
}

impl Wanted {
    fn pipeline(parts: &[&str], own_vae: bool) -> Self {
        let vae = own_vae.then_some(&"vae");
        Self {
            parts: parts.iter().chain(vae).map(|n| Part::required(n)).collect(),
            extras: &["model_index.json"],
        }
    }

    /// What training takes of a teacher; `own_vae`: its VAE, too.
    pub fn training(own_vae: bool) -> Self {
        Self::pipeline(&["scheduler", "tokenizer", "text_encoder", "unet"], own_vae)
    }

    /// What encoding takes: no UNet and no scheduler.
    pub fn encoding(own_vae: bool) -> Self {
        Self::pipeline(&["tokenizer", "text_encoder"], own_vae)
    }

    /// What drawing takes besides a UNet.
    pub fn surroundings() -> Self {
        Self::pipeline(&["scheduler", "tokenizer", "text_encoder"], true)
    }

    /// What drawing takes of the model that draws: the UNet of that name, or a run's target or else the UNet; with
    /// `surroundings` also the other parts, as far as it has them.
    pub fn drawing(unet: Option<&str>, surroundings: bool) -> Self {
        let names = unet.map_or_else(|| vec!["unet_target", "unet"], |name| vec![name]);
        let mut parts = vec![Part {
            names: names.into_iter().map(str::to_owned).collect(),
            required: true,
        }];
        if surroundings {
            let others = ["scheduler", "tokenizer", "text_encoder", "vae"];
            parts.extend(others.map(Part::if_there));
        }
        Self {
            parts,
            extras: &["model_index.json", "run.json", "config.toml"],
        }
    }

    /// A VAE that is the model itself or its subfolder `vae`.
    pub fn vae() -> Self {
        Self {
            parts: vec![Part {
                names: vec![String::new(), "vae".to_owned()],
                required: true,
            }],
            extras: &[],
        }
    }
}

/// The files to fetch.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Names below the model's folder.
    pub(super) files: Vec<String>,
    /// Those among them that name further files: the shards of weights.
    pub(super) indexes: Vec<String>,
}

/// Chooses from the files that a model has.
///
/// # Errors
/// What the model lacks, in words.
pub(super) fn plan(wanted: &Wanted, there: &BTreeSet<String>) -> Result<Plan, String> {
    let mut plan = Plan::default();
    let extras = wanted.extras.iter().map(|name| (*name).to_owned());
    plan.files
        .extend(extras.filter(|name| there.contains(name)));
    for part in &wanted.parts {
        let (first, _) = essentials(part.names.first().map_or("", String::as_str));
        let name = part.names.iter().find(|name| {
            let (essential, _) = essentials(name);
            there.contains(&below(name, essential[0]))
        });
        match name {
            Some(name) => plan_part(&mut plan, name, there)?,
            None if !part.required => {}
            None => {
                let files: Vec<_> = part
                    .names
                    .iter()
                    .map(|name| below(name, first[0]))
                    .collect();
                return Err(format!("it has no {}", files.join(" and no ")));
            }
        }
    }
    Ok(plan)
}

/// The files a part can't do without, and those that are taken if they are there.
fn essentials(part: &str) -> (&'static [&'static str], &'static [&'static str]) {
    match part {
        "scheduler" => (&["scheduler_config.json"], &[]),
        "tokenizer" => (
            &["vocab.json", "merges.txt"],
            &["tokenizer_config.json", "special_tokens_map.json"],
        ),
        _ => (&["config.json"], &[]),
    }
}

fn plan_part(plan: &mut Plan, part: &str, there: &BTreeSet<String>) -> Result<(), String> {
    let (needed, optional) = essentials(part);
    for name in needed {
        let file = below(part, name);
        if !there.contains(&file) {
            return Err(format!("it has no {file}"));
        }
        plan.files.push(file);
    }
    let optional = optional.iter().map(|name| below(part, name));
    plan.files
        .extend(optional.filter(|name| there.contains(name)));
    if matches!(part, "scheduler" | "tokenizer") {
        return Ok(());
    }
    let stem = match part {
        "text_encoder" => TRANSFORMERS_STEM,
        _ => DIFFUSERS_STEM,
    };
    // As `Weights::load` prefers them, so that a model gives the same numbers from a folder and from elsewhere.
    let forms = [
        "safetensors",
        "fp16.safetensors",
        "safetensors.index.json",
        "safetensors.index.fp16.json",
    ];
    let file = forms
        .iter()
        .map(|form| below(part, &format!("{stem}.{form}")))
        .find(|file| there.contains(file))
        .ok_or_else(|| {
            let pickled = there.contains(&below(part, &format!("{stem}.bin")))
                || there.contains(&below(part, "pytorch_model.bin"));
            format!(
                "it has no weights {}{}",
                below(part, &format!("{stem}.safetensors")),
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

fn below(part: &str, name: &str) -> String {
    match part.is_empty() {
        true => name.to_owned(),
        false => format!("{part}/{name}"),
    }
}

/// The shards that an index of weights names, as names below the model's folder.
///
/// # Errors
/// What is wrong with the index, in words.
pub(super) fn shards(index: &str, path: &Path) -> Result<BTreeSet<String>, String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(path).map_err(|error| format!("{index}: {error}"))?;
    let parsed: Index = serde_json::from_str(&text).map_err(|error| format!("{index}: {error}"))?;
    let part = index.rsplit_once('/').map_or("", |(part, _)| part);
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    names
        .into_iter()
        .map(|name| {
            // It becomes a path: it must not lead anywhere else.
            match name.ends_with(".safetensors") && !name.contains(['/', '\\']) {
                true => Ok(below(part, &name)),
                false => Err(format!(
                    "{index}: names {name:?}, which is no shard beside it"
                )),
            }
        })
        .collect()
}

/// The files of a folder and its subfolders that are whole, by their names below it.
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
        let name = below(prefix, &name.to_string_lossy());
        // A link whose file is gone is neither.
        if path.is_dir() {
            collect(&path, &name, found);
        } else if path.is_file() {
            found.insert(name);
        }
    }
}

/// Whether a folder holds all that is wanted, the shards of its indexes included.
pub(super) fn is_whole(wanted: &Wanted, folder: &Path) -> bool {
    let there = listing(folder);
    plan(wanted, &there).is_ok_and(|plan| {
        plan.indexes.iter().all(|index| {
            shards(index, &folder.join(index)).is_ok_and(|shards| shards.is_subset(&there))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stable Diffusion 1.5 on the Hub, about.
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

    fn sorted(plan: Plan) -> Vec<String> {
        let mut files = plan.files;
        files.sort();
        files
    }

    #[test]
    fn only_what_is_needed_is_planned() {
        let training = sorted(plan(&Wanted::training(true), &hub()).unwrap());
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
        let encoding = sorted(plan(&Wanted::encoding(false), &hub()).unwrap());
        assert!(encoding.iter().all(|file| {
            ["model_index", "tokenizer/", "text_encoder/"]
                .iter()
                .any(|start| file.starts_with(start))
        }));
        assert_eq!(encoding.len(), 7);
        let vae = plan(&Wanted::vae(), &hub()).unwrap();
        assert_eq!(
            vae.files,
            ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
        );
        let alone = ["config.json", "diffusion_pytorch_model.safetensors"];
        let there = alone.map(str::to_owned).into();
        assert_eq!(plan(&Wanted::vae(), &there).unwrap().files, alone);
    }

    #[test]
    fn a_run_draws_with_its_target() {
        let mut there = hub();
        let unet = |there: &_, name| sorted(plan(&Wanted::drawing(name, false), there).unwrap());
        assert!(unet(&there, None).contains(&"unet/config.json".to_owned()));
        for name in ["config.json", "diffusion_pytorch_model.safetensors"] {
            there.insert(format!("unet_target/{name}"));
        }
        assert_eq!(
            unet(&there, None),
            [
                "model_index.json",
                "unet_target/config.json",
                "unet_target/diffusion_pytorch_model.safetensors"
            ]
        );
        assert!(unet(&there, Some("unet")).contains(&"unet/config.json".to_owned()));
        let error = plan(&Wanted::drawing(Some("other"), true), &there).unwrap_err();
        assert_eq!(error, "it has no other/config.json");
        there.retain(|name| !name.starts_with("vae/"));
        assert!(plan(&Wanted::drawing(None, true), &there).is_ok());
    }

    #[test]
    fn one_form_of_weights_is_taken() {
        let whole = "unet/diffusion_pytorch_model.safetensors";
        let half = "unet/diffusion_pytorch_model.fp16.safetensors";
        let mut there = hub();
        there.remove(whole);
        let files = sorted(plan(&Wanted::training(true), &there).unwrap());
        assert!(files.contains(&half.to_owned()), "{files:?}");
        let index = format!("{whole}.index.json");
        there.insert(index.clone());
        let found = plan(&Wanted::training(true), &there).unwrap();
        assert!(found.indexes.is_empty() && !found.files.contains(&index));
        there.remove(half);
        let found = plan(&Wanted::training(true), &there).unwrap();
        assert_eq!(found.indexes, std::slice::from_ref(&index));
        assert!(found.files.contains(&index));
        there.remove(&index);
        let error = plan(&Wanted::training(true), &there).unwrap_err();
        assert!(
            error.contains(whole) && error.contains("only .bin"),
            "{error}"
        );
        assert!(plan(&Wanted::encoding(true), &there).is_ok());
    }

    #[test]
    fn shards_stay_beside_their_index() {
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
            assert!(error.contains("no shard"), "{error}");
        }
    }

    #[test]
    fn a_folder_without_a_shard_is_not_whole() {
        let folder = tempfile::tempdir().unwrap();
        let vae = folder.path().join("vae");
        std::fs::create_dir(&vae).unwrap();
        let write = |name: &str, text: &str| std::fs::write(vae.join(name), text).unwrap();
        write("config.json", "{}");
        assert!(!is_whole(&Wanted::vae(), folder.path()));
        write(
            "diffusion_pytorch_model.safetensors.index.json",
            r#"{"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}"#,
        );
        write("x-1.safetensors", "");
        assert!(!is_whole(&Wanted::vae(), folder.path()));
        write("x-2.safetensors", "");
        assert!(is_whole(&Wanted::vae(), folder.path()));
    }
}
