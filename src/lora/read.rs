//! Reading a LoRA's file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};

use super::key::{AdapterTensor, Key};
use super::modules::Modules;
use super::peft_config::{CONFIG_FILE, PeftConfig};
use super::{Adapter, DIFFUSERS_FILE, Lora, LoraError};
use crate::models::FileContents;
use crate::ops::all_finite;

/// A LoRA as its file has it.
#[derive(Clone, Debug)]
pub struct LoraFile {
    /// The adapters of the UNet.
    pub lora: Lora,
    /// Number of tensors that belong to adapters of text encoders, which are not used.
    pub of_text_encoders: usize,
}

impl LoraFile {
    /// The warning about what is not used; `None` if everything is.
    pub fn warning(&self, path: &Path) -> Option<String> {
        (self.of_text_encoders > 0).then(|| {
            format!(
                "{}: {} tensors of adapters of text encoders are left out; only adapters of the UNet are used",
                path.display(),
                self.of_text_encoders
            )
        })
    }
}

/// Tensors of an adapter with their names in the file.
type Parts<'a> = BTreeMap<AdapterTensor, (&'a str, &'a Tensor)>;

/// Reads the LoRA in a file, or in the `pytorch_lora_weights.safetensors` of a folder, for the UNet with these `modules`. Adapters are
/// f32 on the CPU.
///
/// Layouts: diffusers (`unet.MODULE.lora_A.weight`, with alphas in the metadata, else alpha = rank), kohya-ss (`lora_unet_…` and
/// `.alpha`), PEFT's `adapter_model.safetensors` (with the `adapter_config.json` beside it), and the names of older versions of
/// diffusers. As `load_lora_weights` of diffusers.
///
/// # Errors
/// When the file is no LoRA of such a UNet: an unknown module, half a pair, a wrong shape, numbers that are not finite. File and tensor
/// are named.
pub fn read(path: &Path, modules: &Modules) -> Result<LoraFile, LoraError> {
    let path = match path.is_dir() {
        true => path.join(DIFFUSERS_FILE),
        false => path.to_owned(),
    };
    let FileContents { tensors, metadata } = FileContents::read(&path)?;
    let reader = Reader {
        path: &path,
        modules,
    };
    let (adapters, of_text_encoders) = reader.group(&tensors)?;
    let with_alphas = adapters
        .values()
        .any(|parts| parts.contains_key(&AdapterTensor::Alpha));
    let config = match PeftConfig::of_metadata(&metadata, &path)? {
        Some(_) if with_alphas => {
            let what = "has both alpha tensors and alphas in its metadata (\"lora_adapter_metadata\"), and one is right; diffusers \
                        refuses such a file as well"
                .to_owned();
            return Err(LoraError::Config { path, what });
        }
        Some(config) => Some((config, path.clone())),
        None if with_alphas || !tensors.keys().any(|key| key.starts_with("base_model.")) => None,
        None => PeftConfig::beside(&path)?.map(|config| (config, path.with_file_name(CONFIG_FILE))),
    };
    let adapters = adapters
        .into_iter()
        .map(|(module, parts)| {
            let adapter = reader.adapter(&module, &parts, config.as_ref())?;
            Ok((module, adapter))
        })
        .collect::<Result<_, LoraError>>()?;
    Ok(LoraFile {
        lora: Lora { adapters },
        of_text_encoders,
    })
}

struct Reader<'a> {
    path: &'a Path,
    modules: &'a Modules,
}

impl Reader<'_> {
    /// The tensors by their module, and the number of those of text encoders.
    fn group<'a>(
        &self,
        tensors: &'a BTreeMap<String, Tensor>,
    ) -> Result<(BTreeMap<String, Parts<'a>>, usize), LoraError> {
        let by_kohya_name = self.modules.by_kohya_name();
        let mut adapters: BTreeMap<String, Parts<'a>> = BTreeMap::new();
        let (mut unknown, mut of_text_encoders) = (Vec::new(), 0);
        for (name, tensor) in tensors {
            let (module, part) = match Key::parse(name) {
                Key::TextEncoder => {
                    of_text_encoders += 1;
                    continue;
                }
                Key::Other(what) => return Err(self.wrong(name, what)),
                Key::Module(module, part) => {
                    let known = self.modules.shape(&module).is_some();
                    (known.then_some(module), part)
                }
                Key::Kohya(module, part) => {
                    let module = by_kohya_name.get(&module);
                    (module.map(|&module| module.to_owned()), part)
                }
            };
            let Some(module) = module else {
                unknown.push(name);
                continue;
            };
            let parts = adapters.entry(module).or_default();
            if let Some((first, _)) = parts.insert(part, (name, tensor)) {
                let what = format!("is of the same adapter as \"{first}\"; a file has one of them");
                return Err(self.wrong(name, &what));
            }
        }
        if let Some(first) = unknown.first() {
            return Err(LoraError::UnknownModule {
                path: self.path.to_owned(),
                tensor: (*first).clone(),
                others: unknown.len() - 1,
                all: tensors.len(),
            });
        }
        if adapters.is_empty() {
            let found = match of_text_encoders {
                0 => String::new(),
                n => format!(", only {n} tensors of adapters of text encoders"),
            };
            return Err(LoraError::NoAdapters {
                path: self.path.to_owned(),
                found,
            });
        }
        Ok((adapters, of_text_encoders))
    }

    /// The adapter of a module out of its tensors.
    fn adapter(
        &self,
        module: &str,
        parts: &Parts<'_>,
        config: Option<&(PeftConfig, PathBuf)>,
    ) -> Result<Adapter, LoraError> {
        let get = |part: AdapterTensor| {
            let has = || parts.values().next().map_or("", |(name, _)| name);
            parts.get(&part).copied().ok_or_else(|| {
                let what = format!("is there without {}; save the LoRA again", part.describe());
                self.wrong(has(), &what)
            })
        };
        let (down_name, down) = get(AdapterTensor::Down)?;
        let (up_name, up) = get(AdapterTensor::Up)?;
        let base = self.modules.shape(module).unwrap_or_default();
        let (outputs, inputs) = base.split_first().unwrap_or((&0, &[]));
        let rank = down.dims().first().copied().unwrap_or_default();
        let check = |name: &str, tensor: &Tensor, needed: &[usize], shown: String| {
            if tensor.dims() == needed {
                return Ok(());
            }
            let found = tensor.dims();
            let what = format!("has shape {found:?}; the module's weight {base:?} needs {shown}");
            Err(self.wrong(name, &what))
        };
        if rank == 0 {
            let what = format!(
                "has shape {:?}; its first number, the rank, must be 1 or more",
                down.dims()
            );
            return Err(self.wrong(down_name, &what));
        }
        let needed = [&[rank], inputs].concat();
        let numbers = inputs.iter().map(usize::to_string).collect::<Vec<_>>();
        let shown = format!("[rank, {}]", numbers.join(", "));
        check(down_name, down, &needed, shown)?;
        let needed = match base.len() {
            4 => vec![*outputs, rank, 1, 1],
            _ => vec![*outputs, rank],
        };
        let shown = format!("{needed:?} beside \"{down_name}\" of rank {rank}");
        check(up_name, up, &needed, shown)?;
        let alpha = match (parts.get(&AdapterTensor::Alpha), config) {
            (Some((name, alpha)), _) => self.alpha(name, alpha)?,
            (None, Some((config, path))) => {
                config
                    .alpha(module, rank)
                    .map_err(|what| LoraError::Config {
                        path: path.clone(),
                        what,
                    })?
            }
            (None, None) => rank as f64,
        };
        Ok(Adapter {
            down: self.values(down_name, down)?,
            up: self.values(up_name, up)?,
            alpha,
        })
    }

    /// A matrix of an adapter as f32.
    fn values(&self, name: &str, tensor: &Tensor) -> Result<Tensor, LoraError> {
        let tensor = tensor.to_dtype(DType::F32)?;
        match all_finite(&tensor)? {
            true => Ok(tensor),
            false => Err(self.wrong(name, "has numbers that are not finite; the file is damaged")),
        }
    }

    /// The number in an alpha tensor.
    fn alpha(&self, name: &str, tensor: &Tensor) -> Result<f64, LoraError> {
        let numbers = tensor
            .flatten_all()?
            .to_dtype(DType::F64)?
            .to_vec1::<f64>()?;
        match numbers[..] {
            [alpha] if alpha.is_finite() => Ok(alpha),
            _ => Err(self.wrong(name, "must be one finite number")),
        }
    }

    fn wrong(&self, tensor: &str, what: &str) -> LoraError {
        LoraError::Tensor {
            path: self.path.to_owned(),
            tensor: tensor.to_owned(),
            what: what.to_owned(),
        }
    }
}
