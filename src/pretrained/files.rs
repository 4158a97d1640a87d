//! Selects the files of a model to fetch: for each component its configuration and one form of its weights.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::models::unet::WEIGHTS_STEM;
use crate::models::{TEXT_ENCODER_2, TEXT_ENCODER_STEM, choose_weights, index_shards};

/// SDXL's tokenizer for the second text encoder.
const TOKENIZER_2: &str = "tokenizer_2";
/// File that names a model's components.
pub(super) const INDEX: &str = "model_index.json";

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
    need: Need,
}

/// When a component is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Always,
    /// If its folder is there.
    IfThere,
    /// If this folder of the model is there.
    With(&'static str),
}

impl Component {
    fn required(name: &str) -> Self {
        Self {
            names: vec![name.to_owned()],
            need: Need::Always,
        }
    }

    fn optional(name: &str) -> Self {
        Self {
            need: Need::IfThere,
            ..Self::required(name)
        }
    }

    /// SDXL's second text encoder and its tokenizer, which other models lack.
    fn second_text() -> [Self; 2] {
        let with = |name| Self {
            need: Need::With(TEXT_ENCODER_2),
            ..Self::required(name)
        };
        [with(TEXT_ENCODER_2), with(TOKENIZER_2)]
    }
}

impl Components {
    fn pipeline(names: &[&str], own_vae: bool) -> Self {
        let vae = own_vae.then_some(&"vae");
        let names = names.iter().chain(vae);
        Self {
            components: names.map(|name| Component::required(name)).collect(),
            extras: &[INDEX],
        }
    }

    /// The same with SDXL's second text encoder and its tokenizer, for a model that has them.
    fn with_second_text(mut self) -> Self {
        self.components.extend(Component::second_text());
        self
    }

    /// The same for a model with this `model_index.json`: a second text encoder that it names is needed, whether its folder is there
    /// or not. Entries that are no pair of a library and a class are settings.
    pub(super) fn of_index(mut self, index: Option<&Value>) -> Self {
        let named = index.and_then(|index| index.get(TEXT_ENCODER_2)?.as_array());
        if named.is_some_and(|pair| pair.iter().all(Value::is_string)) {
            for component in &mut self.components {
                if component.need == Need::With(TEXT_ENCODER_2) {
                    component.need = Need::Always;
                }
            }
        }
        self
    }

    /// Components that training reads from a teacher; `own_vae`: with the teacher's own VAE.
    pub fn training(own_vae: bool) -> Self {
        Self::pipeline(&["scheduler", "tokenizer", "text_encoder", "unet"], own_vae)
            .with_second_text()
    }

    /// Components that encoding reads: no UNet and no scheduler.
    pub fn encoding(own_vae: bool) -> Self {
        Self::pipeline(&["tokenizer", "text_encoder"], own_vae).with_second_text()
    }

    /// The tokenizer alone.
    pub fn tokenizer() -> Self {
        Self::pipeline(&["tokenizer"], false)
    }

    /// Components that sampling reads besides a UNet.
    pub fn without_unet() -> Self {
        Self::pipeline(&["scheduler", "tokenizer", "text_encoder"], true).with_second_text()
    }

    /// Components that `coffey sample` reads: the UNet named `unet`, by default `unet_target` else `unet`; with `others` also
    /// the other components that the model has.
    pub fn sampling(unet: Option<&str>, others: bool) -> Self {
        let names = unet.map_or_else(|| vec!["unet_target", "unet"], |name| vec![name]);
        let mut components = vec![Component {
            names: names.into_iter().map(str::to_owned).collect(),
            need: Need::Always,
        }];
        if others {
            let others = ["scheduler", "tokenizer", "text_encoder", "vae"];
            components.extend(others.map(Component::optional));
            components.extend(Component::second_text());
        }
        Self {
            components,
            extras: &[INDEX, "run.json", "config.toml"],
        }
    }

    /// Whether they are parts of a pipeline, and not a VAE.
    pub(super) fn is_pipeline(&self) -> bool {
        let of_vae = |component: &Component| component.names.iter().any(|name| name == "vae");
        !self.components.iter().all(of_vae)
    }

    /// Whether the folder of a run has them, as that of a pipeline.
    pub(super) fn are_in_runs(&self) -> bool {
        self.extras.contains(&"run.json")
    }

    /// A VAE that is the model itself or its subfolder `vae`.
    pub fn vae() -> Self {
        Self {
            components: vec![Component {
                names: vec![String::new(), "vae".to_owned()],
                need: Need::Always,
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
    /// Weights in `files` of a variant, chosen because the model has no others.
    pub(super) variants: Vec<String>,
}

/// Chooses the files to fetch out of `available`, the paths in a model's folder.
///
/// # Errors
/// A message with everything that the model lacks.
pub(super) fn plan(
    components: &Components,
    available: &BTreeSet<String>,
) -> Result<FetchPlan, String> {
    let mut plan = FetchPlan::default();
    let mut lacks = Vec::new();
    let extras = components.extras.iter().map(|name| (*name).to_owned());
    plan.files
        .extend(extras.filter(|name| available.contains(name)));
    let has_folder = |name: &str| {
        let prefix = join(name, "");
        name.is_empty() || available.iter().any(|path| path.starts_with(&prefix))
    };
    for component in &components.components {
        let first = component.names.first().map_or("", String::as_str);
        let first = ConfigFiles::of(first);
        let there = |name: &&String| ConfigFiles::of(name).form(name, available).is_some();
        let name = component.names.iter().find(there);
        match name {
            Some(name) => lacks.extend(plan_component(&mut plan, name, available).err()),
            None if component.need == Need::IfThere => {}
            None if matches!(component.need, Need::With(folder) if !has_folder(folder)) => {}
            None if component.names.iter().any(|name| has_folder(name)) => {
                let names = component.names.iter();
                let files =
                    names.flat_map(|name| first.forms.iter().map(|form| join(name, form[0])));
                lacks.push(files.collect::<Vec<_>>().join(" and no "));
            }
            None => lacks.push(format!("folder {}", component.names.join(" or "))),
        }
    }
    if lacks.is_empty() {
        Ok(plan)
    } else {
        Err(format!("it has no {}", lacks.join("; no ")))
    }
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
            "tokenizer" | TOKENIZER_2 => Self {
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
            return Err(file);
        }
        plan.files.push(file);
    }
    let optional = files.optional.iter().map(|name| join(component, name));
    plan.files
        .extend(optional.filter(|name| available.contains(name)));
    if matches!(component, "scheduler" | "tokenizer" | TOKENIZER_2) {
        return Ok(());
    }
    let stem = match component {
        "text_encoder" | TEXT_ENCODER_2 => TEXT_ENCODER_STEM,
        _ => WEIGHTS_STEM,
    };
    let prefix = join(component, "");
    let names = available
        .iter()
        .filter_map(|path| path.strip_prefix(&prefix))
        .filter(|name| !name.contains('/'));
    let chosen = choose_weights(stem, &names.map(str::to_owned).collect()).map_err(|found| {
        let first = join(component, &format!("{stem}.safetensors"));
        format!("weights {first}: {found}")
    })?;
    let file = join(component, &chosen.name);
    if chosen.is_index() {
        plan.indexes.push(file.clone());
    }
    if chosen.is_variant {
        plan.variants.push(file.clone());
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
    let folder = index.rsplit_once('/').map_or("", |(folder, _)| folder);
    let names = index_shards(path).map_err(|error| error.to_string())?;
    Ok(names.into_iter().map(|name| join(folder, &name)).collect())
}

/// The message for shards that an index names and `available` lacks, if there are any.
pub(super) fn missing_shards(
    index: &str,
    shards: &BTreeSet<String>,
    available: &BTreeSet<String>,
) -> Result<(), String> {
    let missing: Vec<_> = shards.difference(available).map(String::as_str).collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(format!(
            "{index} names shards that are not there: {}",
            missing.join(", ")
        ))
    }
}

/// Paths in `folder` of the files in it and in its subfolders; broken links are left out. A folder in a subfolder, which no model has,
/// is one path that ends in `/`.
pub(super) fn listing(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    collect(folder, "", 1, &mut found);
    found
}

fn collect(folder: &Path, prefix: &str, depth: usize, found: &mut BTreeSet<String>) {
    let Ok(entries) = folder.read_dir() else {
        return;
    };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = join(prefix, &name.to_string_lossy());
        // A broken link is neither.
        if path.is_dir() {
            match depth.checked_sub(1) {
                Some(depth) => collect(&path, &name, depth, found),
                None => drop(found.insert(join(&name, ""))),
            }
        } else if path.is_file() {
            found.insert(name);
        }
    }
}

/// How complete a folder is that another program may have filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Completeness {
    /// Files are missing.
    Incomplete,
    /// All files are there, but of some weights only a variant: the model may have other files, which are preferred.
    Variant,
    /// All files are there.
    Complete,
}

/// Whether a folder has all files of `components`, including the shards that its indexes list.
pub(super) fn completeness(components: &Components, folder: &Path) -> Completeness {
    let available = listing(folder);
    let index = super::read_json(&folder.join(INDEX));
    let components = components.clone().of_index(index.as_ref());
    let Ok(plan) = plan(&components, &available) else {
        return Completeness::Incomplete;
    };
    let has_shards = plan.indexes.iter().all(|index| {
        shards(index, &folder.join(index)).is_ok_and(|shards| shards.is_subset(&available))
    });
    match (has_shards, plan.variants.is_empty()) {
        (false, _) => Completeness::Incomplete,
        (true, false) => Completeness::Variant,
        (true, true) => Completeness::Complete,
    }
}
