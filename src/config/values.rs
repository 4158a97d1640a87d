//! The values that are more than a number or a string: devices, where to resume, and the words a key can be.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where tensors live: `"cpu"` or `"cuda:N"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceSpec {
    /// The processor and main memory.
    Cpu,
    /// The CUDA device of this ordinal.
    Cuda(usize),
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "cpu" {
            return Ok(Self::Cpu);
        }
        text.strip_prefix("cuda:")
            .and_then(|ordinal| ordinal.parse().ok())
            .map(Self::Cuda)
            .ok_or_else(|| r#"not a device; write "cpu" or "cuda:0""#.to_owned())
    }
}

impl TryFrom<String> for DeviceSpec {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl From<DeviceSpec> for String {
    fn from(device: DeviceSpec) -> Self {
        device.to_string()
    }
}

/// An address and a port to listen on, as `127.0.0.1:9464`. Port 0 is any free one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Listen(pub SocketAddr);

impl TryFrom<String> for Listen {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| {
            r#"not an address with a port; write "127.0.0.1:9464", or "0.0.0.0:9464" to be reached from other machines"#
                .to_owned()
        })
    }
}

impl From<Listen> for String {
    fn from(listen: Listen) -> Self {
        listen.0.to_string()
    }
}

/// Which checkpoint a run starts from: `"latest"`, `"never"`, a path or an `s3://` prefix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Resume {
    /// The newest whole checkpoint of the run's output, if there is one.
    Latest,
    /// None: start from the teacher.
    Never,
    /// This checkpoint folder and no other.
    From(PathBuf),
}

impl From<String> for Resume {
    fn from(text: String) -> Self {
        match text.as_str() {
            "latest" => Self::Latest,
            "never" => Self::Never,
            _ => Self::From(PathBuf::from(text)),
        }
    }
}

impl From<Resume> for String {
    fn from(resume: Resume) -> Self {
        match resume {
            Resume::Latest => "latest".to_owned(),
            Resume::Never => "never".to_owned(),
            Resume::From(path) => path.to_string_lossy().into_owned(),
        }
    }
}

/// Whether a path is a prefix in S3 and no folder.
#[must_use]
pub fn in_s3(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().starts_with(b"s3://")
}

/// What the shards hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataKind {
    /// Captioned images.
    Images,
    /// Latents, as `precompute` writes them.
    Latents,
}

/// How an image is resampled when it is resized; antialiased, as Pillow does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Interpolation {
    /// Triangle filter.
    Bilinear,
    /// Catmull-Rom cubic.
    Bicubic,
    /// Windowed sinc of three lobes.
    Lanczos,
    /// Average of the pixels under the new one.
    Box,
    /// Hamming window: sharper than bilinear at its cost.
    Hamming,
    /// The nearest pixel, not antialiased. torchvision's `nearest_exact` is the same thing for Pillow images.
    #[serde(alias = "nearest_exact")]
    Nearest,
}

/// Which square of the resized image is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Crop {
    /// Anywhere, drawn for each sample.
    Random,
    /// The middle.
    Center,
}

/// A floating-point type of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// 32 bits.
    F32,
    /// 16 bits, 5 of them exponent.
    F16,
    /// 16 bits, 8 of them exponent.
    Bf16,
}

/// The distance between the student's prediction and its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// Pseudo-Huber, `sqrt(d^2 + c^2) - c`.
    Huber,
    /// Mean squared error.
    L2,
}

/// The optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW with its state in f32.
    AdamW,
    /// AdamW with its state in 8 bits, a quarter of the memory.
    AdamW8bit,
}

/// How the learning rate changes over the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// The same from the first step to the last.
    Constant,
    /// Rises in a straight line for `optimizer.warmup_steps`, then stays.
    ConstantWithWarmup,
    /// Warms up, then falls in a straight line to 0.
    Linear,
    /// Warms up, then falls to 0 along half a cosine.
    Cosine,
    /// As `Cosine`; the number of restarts is diffusers' default of one cycle.
    CosineWithRestarts,
    /// Warms up, then falls in a straight line (power 1, diffusers' default) to 1e-7.
    Polynomial,
}

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attention {
    /// A block of queries at a time; the backward pass computes the scores anew.
    MemoryEfficient,
    /// The whole matrix of scores at once, kept for the backward pass.
    Plain,
}

/// In which type the student's forward and backward pass run; master weights are f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MixedPrecision {
    /// f32 throughout.
    No,
    /// Half precision, with a loss scale that keeps small gradients from vanishing.
    Fp16,
    /// bfloat16, which has the range of f32.
    Bf16,
}

/// Where the text embeddings come from when latents are trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TextFrom {
    /// From the shards.
    Embeds,
    /// From the captions in the shards, through the text encoder.
    Caption,
}

/// What a latent shard keeps of a caption.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TextKind {
    /// Its embedding (beside the caption, for people).
    Embeds,
    /// The caption alone, to be encoded again when it is trained on.
    Caption,
    /// Both, to be usable either way.
    Both,
}
