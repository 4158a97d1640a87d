//! A model's named tensors: read from its folder, and written back to one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};
use coffey_pipeline::{json, regular_file};
use safetensors::tensor::{Metadata, TensorInfo, View};

use super::weight_files::{choose_weights, file_names, read_index};
use super::weight_names::{explain, unwrapped};
use super::{ModelError, mapped};

/// The longest header of a safetensors file that the format allows. Bytes.
const LONGEST_HEADER: u64 = 100_000_000;

/// A model's tensors by name, in name order.
#[derive(Debug)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
    /// The file, its index or the folder; named in errors.
    origin: PathBuf,
    /// The shard of each tensor; empty for a single file.
    shards: BTreeMap<String, PathBuf>,
    /// Names of the tensors that a network was built of.
    taken: Mutex<BTreeSet<String>>,
}

impl Weights {
    /// Tensors that are already in memory; `origin` is named in errors.
    pub fn new(tensors: BTreeMap<String, Tensor>, origin: impl Into<PathBuf>) -> Self {
        Self {
            tensors,
            origin: origin.into(),
            shards: BTreeMap::new(),
            taken: Mutex::default(),
        }
    }

    /// Reads the weights that [`choose_weights`](super::choose_weights) chooses as `dtype` on `device`.
    ///
    /// Names are without the prefixes of `torch.compile` and other wrappers of PyTorch. Tensors of integers keep their type. Files are memory-mapped: the peak is the tensors, and one of them as stored.
    ///
    /// # Errors
    /// When no such file exists, one is damaged, or a tensor is there twice.
    pub fn load(
        folder: &Path,
        stem: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let (origin, mut shards) = weight_files(folder, stem)?;
        let sharded = !shards.is_empty();
        let files: BTreeSet<PathBuf> = if sharded {
            shards.values().cloned().collect()
        } else {
            [origin.clone()].into()
        };
        let mut tensors = BTreeMap::new();
        let mut found_in: BTreeMap<String, PathBuf> = BTreeMap::new();
        for path in files {
            mapped::for_each_tensor(&path, |stored, tensor| {
                let name = unwrapped(stored).into_owned();
                if let Some(first) = found_in.insert(name.clone(), path.clone()) {
                    return Err(ModelError::TensorTwice {
                        path: path.clone(),
                        name,
                        first,
                    });
                }
                let tensor = if tensor.dtype().is_float() {
                    tensor.to_dtype(dtype)?
                } else {
                    tensor
                };
                tensors.insert(name, tensor.to_device(device)?);
                Ok(())
            })?;
        }
        if sharded {
            shards.append(&mut found_in);
        }
        Ok(Self {
            tensors,
            origin,
            shards,
            taken: Mutex::default(),
        })
    }

    /// The file that holds a tensor, or the index or file that lacks it.
    pub(super) fn origin_of(&self, name: &str) -> PathBuf {
        self.shards.get(name).unwrap_or(&self.origin).clone()
    }

    /// The tensor of a name, which counts as used from now on.
    pub(super) fn take(&self, name: &str) -> Option<Tensor> {
        let tensor = self.tensors.get(name)?;
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.insert(name.to_owned());
        Some(tensor.clone())
    }

    /// What the names of the tensors tell of a file that lacks the tensor `missing` or has others; the end of a message.
    pub(super) fn explain(&self, missing: Option<&str>) -> String {
        explain(self.tensors.keys().map(String::as_str), missing)
    }

    /// The tensors, in name order.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// The tensors themselves, in name order.
    pub fn into_tensors(self) -> BTreeMap<String, Tensor> {
        self.tensors
    }

    /// Fails if a tensor was never used: the configuration then describes another model. Names that end in one of `ignored`
    /// may be unused.
    ///
    /// # Errors
    /// [`ModelError::UnexpectedTensors`].
    pub fn expect_all_taken(&self, ignored: &[&str]) -> Result<(), ModelError> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let names: Vec<String> = self
            .tensors
            .keys()
            .filter(|name| !taken.contains(*name) && !ignored.iter().any(|i| name.ends_with(i)))
            .take(5)
            .cloned()
            .collect();
        match names.first() {
            None => Ok(()),
            Some(first) => Err(ModelError::UnexpectedTensors {
                origin: self.origin_of(first),
                hint: self.explain(None),
                names,
            }),
        }
    }
}

/// The weights file of a folder, or its index.
///
/// # Errors
/// As [`Weights::load`].
pub fn weights_file(folder: &Path, stem: &str) -> Result<PathBuf, ModelError> {
    weight_files(folder, stem).map(|(path, _)| path)
}

/// The weights file of a folder and no shards, or its index and the shard of each tensor.
pub(super) fn weight_files(
    folder: &Path,
    stem: &str,
) -> Result<(PathBuf, BTreeMap<String, PathBuf>), ModelError> {
    let names = file_names(folder);
    let chosen = choose_weights(stem, &names).map_err(|found| ModelError::NoWeights {
        path: folder.join(format!("{stem}.safetensors")),
        found,
    })?;
    let path = folder.join(&chosen.name);
    if !chosen.is_index() {
        return Ok((path, BTreeMap::new()));
    }
    let shards = read_index(&path)?;
    let used: BTreeSet<&String> = shards.values().collect();
    let missing: Vec<&str> = used
        .into_iter()
        .filter(|shard| !names.contains(*shard))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        return Err(ModelError::Config {
            message: format!(
                "names shards that are not in the folder: {}; copy or download them again",
                missing.join(", ")
            ),
            path,
        });
    }
    let shards = shards
        .into_iter()
        .map(|(name, file)| (name, folder.join(file)));
    Ok((path, shards.collect()))
}

/// Number of parameters in the weights of a folder, from the headers of its files: those of floating-point tensors whose names are
/// `wanted`.
///
/// # Errors
/// As [`Weights::load`].
pub fn count_parameters(
    folder: &Path,
    stem: &str,
    wanted: impl Fn(&str) -> bool + Sync,
) -> Result<u64, ModelError> {
    let mut sum = 0;
    for file in files_with_tensors(folder, stem)? {
        let counts = mapped::map_tensors(&file, |name, tensor| {
            let float = DType::try_from(tensor.dtype()).is_ok_and(|dtype| dtype.is_float());
            let counted = float && wanted(&unwrapped(name));
            let numbers: usize = tensor.shape().iter().product();
            Ok(if counted { numbers as u64 } else { 0 })
        })?;
        sum += counts.into_values().sum::<u64>();
    }
    Ok(sum)
}

/// Shapes of the tensors in the weights of a folder, by name, from the headers of its files. Names are as those of [`Weights::load`].
///
/// # Errors
/// As [`Weights::load`].
pub fn tensor_shapes(
    folder: &Path,
    stem: &str,
) -> Result<BTreeMap<String, Vec<usize>>, ModelError> {
    let mut shapes = BTreeMap::new();
    for file in files_with_tensors(folder, stem)? {
        for (name, shape) in mapped::map_tensors(&file, |_, tensor| Ok(tensor.shape().to_vec()))? {
            shapes.insert(unwrapped(&name).into_owned(), shape);
        }
    }
    Ok(shapes)
}

/// The files of a folder that hold the tensors of its weights.
fn files_with_tensors(folder: &Path, stem: &str) -> Result<BTreeSet<PathBuf>, ModelError> {
    let (origin, shards) = weight_files(folder, stem)?;
    Ok(match shards.is_empty() {
        true => [origin].into(),
        false => shards.into_values().collect(),
    })
}

/// Content of a safetensors file.
#[derive(Clone, Debug)]
pub struct FileContents {
    /// Tensors by their stored names.
    pub tensors: BTreeMap<String, Tensor>,
    /// Metadata of the header.
    pub metadata: HashMap<String, String>,
}

impl FileContents {
    /// Reads a file; tensors are on the CPU and as stored.
    ///
    /// # Errors
    /// When the file can't be read or is damaged.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        let tensors = read_tensors(path, |_| true)?;
        let metadata = mapped::metadata(path)?;
        Ok(Self { tensors, metadata })
    }

    /// Writes the file. Equal contents give equal bytes.
    ///
    /// # Errors
    /// As [`write_safetensors`].
    pub fn write(&self, writer: &mut impl std::io::Write) -> std::io::Result<()> {
        let tensors = self.tensors.iter().map(|(name, t)| (name.as_str(), t));
        write_safetensors(writer, tensors, Some(self.metadata.clone()))
    }
}

/// The tensors of a safetensors file whose names are `wanted`, on the CPU and as stored.
///
/// # Errors
/// When the file can't be read or is damaged.
pub fn read_tensors(
    path: &Path,
    wanted: impl Fn(&str) -> bool,
) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let mut tensors = BTreeMap::new();
    mapped::for_each_wanted_tensor(path, wanted, |name, tensor| {
        tensors.insert(name.to_owned(), tensor);
        Ok(())
    })?;
    Ok(tensors)
}

/// Names of the tensors of a safetensors file, in name order; none if it is no such file.
pub fn tensor_names(path: &Path) -> Vec<String> {
    let read = || {
        let mut file = regular_file::open(path).ok()?;
        let mut length = [0; 8];
        file.read_exact(&mut length).ok()?;
        let length = u64::from_le_bytes(length).min(LONGEST_HEADER);
        let mut header = Vec::new();
        file.take(length).read_to_end(&mut header).ok()?;
        let header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&header).ok()?;
        Some(header.into_keys().collect())
    };
    read().unwrap_or_default()
}

/// Reads and parses a JSON file.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    let bytes = bounded::read_file(path, MAX_FILE_BYTES).map_err(|source| ModelError::Io {
        path: path.to_owned(),
        source,
    })?;
    json::from_slice(&bytes).map_err(|e| ModelError::Config {
        path: path.to_owned(),
        message: e.to_string(),
    })
}

/// Writes tensors in the layout of a safetensors file, and copies at most one of them at a time.
///
/// # Errors
/// When the writer fails, or the names make no header.
pub fn write_safetensors<'a>(
    writer: &mut impl std::io::Write,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    metadata: Option<HashMap<String, String>>,
) -> std::io::Result<()> {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    // The order of `safetensors::serialize`: by alignment, then by name.
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
    let mut header = serde_json::to_value(&header)?;
    // From a hash map: sorted, so that equal files have equal bytes.
    if let Some(metadata) = header
        .get_mut("__metadata__")
        .and_then(|m| m.as_object_mut())
    {
        metadata.sort_keys();
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    writer.write_all(&(header.len() as u64).to_le_bytes())?;
    writer.write_all(&header)?;
    for (_, tensor) in &tensors {
        writer.write_all(&View::data(tensor))?;
    }
    writer.flush()
}

/// The metadata of a model's safetensors file, which diffusers requires.
#[must_use]
pub fn model_metadata() -> HashMap<String, String> {
    [("format".to_owned(), "pt".to_owned())].into()
}

/// The text of a model's `config.json`.
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
