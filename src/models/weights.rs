//! Named tensors: read from a model folder, handed out by name with their shapes checked, written back.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Metadata, TensorInfo, View};

use super::{ModelError, mapped};

/// A model's tensors by name, in name order.
#[derive(Debug)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
    /// The file, its index or the folder.
    origin: PathBuf,
    /// Which shard a tensor is in, where there are shards.
    shards: BTreeMap<String, PathBuf>,
    taken: RefCell<BTreeSet<String>>,
}

impl Weights {
    /// Tensors that are already in memory; `origin` is named in errors.
    pub fn new(tensors: BTreeMap<String, Tensor>, origin: impl Into<PathBuf>) -> Self {
        Self {
            tensors,
            origin: origin.into(),
            shards: BTreeMap::new(),
            taken: RefCell::default(),
        }
    }

    /// Reads `{stem}.safetensors` or the shards of its index, else their `fp16` variant, as `dtype` on `device`.
    ///
    /// Files are memory-mapped: at no time is more held than the tensors and, for one of them, its stored form.
    ///
    /// # Errors
    /// When there are no such files or they are damaged.
    pub fn load(
        folder: &Path,
        stem: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let (origin, mut shards) = weight_files(folder, stem)?;
        let files: BTreeSet<PathBuf> = match shards.is_empty() {
            true => [origin.clone()].into(),
            false => shards.values().cloned().collect(),
        };
        let sharded = !shards.is_empty();
        let mut tensors = BTreeMap::new();
        for path in files {
            mapped::for_each_tensor(&path, |name, tensor| {
                let tensor = match tensor.dtype().is_float() {
                    true => tensor.to_dtype(dtype)?,
                    false => tensor,
                };
                if sharded {
                    shards.insert(name.to_owned(), path.clone());
                }
                tensors.insert(name.to_owned(), tensor.to_device(device)?);
                Ok(())
            })?;
        }
        Ok(Self {
            tensors,
            origin,
            shards,
            taken: RefCell::default(),
        })
    }

    /// The file that holds a tensor, or should.
    fn origin_of(&self, name: &str) -> PathBuf {
        self.shards.get(name).unwrap_or(&self.origin).clone()
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
                origin: self.origin_of(&names[0]),
                names,
            }),
        }
    }
}

/// The weights file of a folder, or its index and the shard of each tensor.
fn weight_files(
    folder: &Path,
    stem: &str,
) -> Result<(PathBuf, BTreeMap<String, PathBuf>), ModelError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    // diffusers and transformers put the variant before the last suffix, also of an index.
    let candidates = [
        format!("{stem}.safetensors"),
        format!("{stem}.safetensors.index.json"),
        format!("{stem}.fp16.safetensors"),
        format!("{stem}.safetensors.index.fp16.json"),
    ];
    let found = candidates.iter().map(|name| folder.join(name));
    let Some(path) = found.into_iter().find(|path| path.is_file()) else {
        return Err(ModelError::NoWeights {
            folder: folder.to_owned(),
            expected: candidates.join(", "),
        });
    };
    if path
        .extension()
        .is_some_and(|extension| extension != "json")
    {
        return Ok((path, BTreeMap::new()));
    }
    let Index { weight_map } = read_json(&path)?;
    let invalid = |message: String| ModelError::Config {
        path: path.clone(),
        message,
    };
    if weight_map.is_empty() {
        return Err(invalid("\"weight_map\" names no tensor".to_owned()));
    }
    let shards = weight_map.into_iter().map(|(name, file)| {
        // A name and nothing else: an index must not lead out of its folder.
        match Path::new(&file).file_name() {
            Some(only) if only == file.as_str() => Ok((name, folder.join(file))),
            _ => Err(invalid(format!(
                "\"{file}\" is not the name of a file in this folder"
            ))),
        }
    });
    let shards = shards.collect::<Result<_, _>>()?;
    Ok((path, shards))
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

/// Writes tensors in the layout of a safetensors file, one after the other: no more than one of them is copied at a time.
///
/// # Errors
/// What the writer says, or a header that can't be made of the names.
pub fn write_safetensors<'a>(
    writer: &mut impl std::io::Write,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    metadata: Option<HashMap<String, String>>,
) -> std::io::Result<()> {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    // The order of the reference's own writer: by alignment, then by name.
    tensors
        .sort_by(|(name, a), (other, b)| View::dtype(b).cmp(&View::dtype(a)).then(name.cmp(other)));
    let mut offset = 0;
    let infos = tensors.iter().map(|(name, tensor)| {
        let begin = offset;
        offset += View::data_len(tensor);
        let info = TensorInfo {
            dtype: View::dtype(tensor),
            shape: tensor.dims().to_vec(),
            data_offsets: (begin, offset),
        };
        ((*name).to_owned(), info)
    });
    let header = Metadata::new(metadata, infos.collect()).map_err(std::io::Error::other)?;
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    writer.write_all(&(header.len() as u64).to_le_bytes())?;
    writer.write_all(&header)?;
    for (_, tensor) in &tensors {
        writer.write_all(&View::data(tensor))?;
    }
    writer.flush()
}

/// What the files of a model carry besides tensors: diffusers asks for it.
#[must_use]
pub fn model_metadata() -> HashMap<String, String> {
    [("format".to_owned(), "pt".to_owned())].into()
}

/// A model's `config.json`.
#[must_use]
pub fn config_text(config: &serde_json::Map<String, serde_json::Value>) -> String {
    format!("{:#}\n", serde_json::Value::Object(config.clone()))
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
    std::fs::write(&path, config_text(config)).map_err(io(&path))?;
    let path = folder.join(format!("{stem}.safetensors"));
    safetensors::serialize_to_file(
        tensors.iter().map(|(name, t)| (name.as_str(), t)),
        Some(model_metadata()),
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
                origin: self.weights.origin_of(&name),
                name,
                needed: shape.to_vec(),
            });
        };
        if tensor.dims() != shape {
            return Err(ModelError::WrongShape {
                origin: self.weights.origin_of(&name),
                name,
                found: tensor.dims().to_vec(),
                needed: shape.to_vec(),
            });
        }
        self.weights.taken.borrow_mut().insert(name);
        Ok(tensor.clone())
    }
}
