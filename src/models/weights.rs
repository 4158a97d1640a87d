//! Named tensors: read from a model folder, handed out by name with their shapes checked, written back.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::ModelError;

/// A model's tensors by name, in name order.
#[derive(Debug)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
    origin: PathBuf,
    taken: RefCell<BTreeSet<String>>,
}

impl Weights {
    /// Tensors that are already in memory; `origin` is named in errors.
    pub fn new(tensors: BTreeMap<String, Tensor>, origin: impl Into<PathBuf>) -> Self {
        Self {
            tensors,
            origin: origin.into(),
            taken: RefCell::default(),
        }
    }

    /// Reads `{stem}.safetensors`, its `.fp16` variant or the shards of its index from a folder, as `dtype` on `device`.
    ///
    /// # Errors
    /// When there are no such files or they are damaged.
    pub fn load(
        folder: &Path,
        stem: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let mut tensors = BTreeMap::new();
        for path in weight_files(folder, stem)? {
            let loaded = candle_core::safetensors::load(&path, &Device::Cpu).map_err(|e| {
                ModelError::Damaged {
                    path: path.clone(),
                    message: first_line(&e.to_string()),
                }
            })?;
            for (name, tensor) in loaded {
                let tensor = match tensor.dtype().is_float() {
                    true => tensor.to_dtype(dtype)?,
                    false => tensor,
                };
                tensors.insert(name, tensor.to_device(device)?);
            }
        }
        Ok(Self::new(tensors, folder))
    }

    /// The root scope.
    pub fn root(&self) -> Scope<'_> {
        Scope {
            weights: self,
            prefix: String::new(),
        }
    }

    /// The tensors, in name order.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// Gives up the tensors.
    pub fn into_tensors(self) -> BTreeMap<String, Tensor> {
        self.tensors
    }

    /// Fails when a tensor was never asked for: the configuration then describes another model. Names that end in one of
    /// `ignored` are passed over.
    ///
    /// # Errors
    /// [`ModelError::UnexpectedTensors`].
    pub fn expect_all_taken(&self, ignored: &[&str]) -> Result<(), ModelError> {
        let taken = self.taken.borrow();
        let names: Vec<String> = self
            .tensors
            .keys()
            .filter(|name| !taken.contains(*name) && !ignored.iter().any(|i| name.ends_with(i)))
            .take(5)
            .cloned()
            .collect();
        match names.is_empty() {
            true => Ok(()),
            false => Err(ModelError::UnexpectedTensors {
                origin: self.origin.clone(),
                names,
            }),
        }
    }
}

fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().to_owned()
}

fn weight_files(folder: &Path, stem: &str) -> Result<Vec<PathBuf>, ModelError> {
    for name in [
        format!("{stem}.safetensors"),
        format!("{stem}.fp16.safetensors"),
    ] {
        let path = folder.join(name);
        if path.is_file() {
            return Ok(vec![path]);
        }
    }
    let index = folder.join(format!("{stem}.safetensors.index.json"));
    if index.is_file() {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let parsed: Index = read_json(&index)?;
        let files: BTreeSet<String> = parsed.weight_map.into_values().collect();
        return Ok(files.into_iter().map(|f| folder.join(f)).collect());
    }
    Err(ModelError::NoWeights {
        folder: folder.to_owned(),
        expected: format!(
            "{stem}.safetensors, {stem}.fp16.safetensors or {stem}.safetensors.index.json"
        ),
    })
}

/// Reads and parses a JSON file.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    let text = std::fs::read_to_string(path).map_err(|source| ModelError::Io {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_str(&text).map_err(|e| ModelError::Config {
        path: path.to_owned(),
        message: e.to_string(),
    })
}

/// Writes `config.json` and `{stem}.safetensors` into `folder`, which is created.
///
/// # Errors
/// When the folder can't be written.
pub fn save_model(
    folder: &Path,
    stem: &str,
    config: &serde_json::Map<String, serde_json::Value>,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<(), ModelError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ModelError::Io { path, source }
    };
    std::fs::create_dir_all(folder).map_err(io(folder))?;
    let path = folder.join("config.json");
    let json = format!("{:#}\n", serde_json::Value::Object(config.clone()));
    std::fs::write(&path, json).map_err(io(&path))?;
    let path = folder.join(format!("{stem}.safetensors"));
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into()); // diffusers asks for it
    safetensors::serialize_to_file(
        tensors.iter().map(|(name, t)| (name.as_str(), t)),
        metadata,
        &path,
    )
    .map_err(|e| ModelError::Io {
        path: path.clone(),
        source: std::io::Error::other(e),
    })
}

/// A place in the tree of a model's tensor names.
#[derive(Clone, Debug)]
pub struct Scope<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl Scope<'_> {
    /// The scope one name down.
    pub fn sub(&self, name: impl std::fmt::Display) -> Self {
        Self {
            weights: self.weights,
            prefix: self.full(&name.to_string()),
        }
    }

    fn full(&self, name: &str) -> String {
        match self.prefix.is_empty() {
            true => name.to_owned(),
            false => format!("{}.{name}", self.prefix),
        }
    }

    /// Whether a tensor of this name, or any below it, is there.
    pub fn has(&self, name: &str) -> bool {
        let name = self.full(name);
        let mut from = self.weights.tensors.range(name.clone()..);
        from.next().is_some_and(|(key, _)| {
            key == &name
                || key
                    .strip_prefix(&name)
                    .is_some_and(|rest| rest.starts_with('.'))
        })
    }

    /// The tensor `name` in this scope, which must have `shape`.
    ///
    /// # Errors
    /// When it is missing or has another shape.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let name = self.full(name);
        let Some(tensor) = self.weights.tensors.get(&name) else {
            return Err(ModelError::MissingTensor {
                origin: self.weights.origin.clone(),
                name,
                needed: shape.to_vec(),
            });
        };
        if tensor.dims() != shape {
            return Err(ModelError::WrongShape {
                origin: self.weights.origin.clone(),
                name,
                found: tensor.dims().to_vec(),
                needed: shape.to_vec(),
            });
        }
        self.weights.taken.borrow_mut().insert(name);
        Ok(tensor.clone())
    }
}
