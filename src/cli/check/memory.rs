//! Estimate of the memory a run needs, by purpose and device.

use std::collections::BTreeMap;
use std::path::Path;

use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};
use coffey_pipeline::{Content, counted, json};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::config::{Config, DeviceSpec, FloatType, MixedPrecision, OptimizerKind};
use crate::encode::Encoders;
use crate::models::UNetConfig;
use crate::ops::Attention;
use crate::process::available_memory;

/// Bytes of an `f32`.
const F32: u64 = 4;

/// Bytes of a number.
fn bytes_of(float: FloatType) -> u64 {
    match float {
        FloatType::F32 => F32,
        FloatType::F16 | FloatType::Bf16 => F32 / 2,
    }
}
/// Feature maps that a residual block keeps for the backward pass: its norms, activations, convolutions and concatenated
/// input.
const KEPT_BY_RESNET: u64 = 9;
/// Feature maps that a transformer block keeps, including its four times wider gated feed-forward.
const KEPT_BY_TRANSFORMER: u64 = 28;
/// Matrices that plain attention keeps: the scores and their softmax.
const KEPT_SCORES: u64 = 2;
/// Feature maps that a block keeps under activation checkpointing: its input and its result.
const KEPT_TO_RECOMPUTE: u64 = 2;
/// Tokens of a caption.
const TEXT_TOKENS: u64 = 77;
/// Feature maps of full size that a VAE holds at once while it encodes.
const HELD_BY_VAE: u64 = 4;

/// Code, threads and their scratch memory, and memory that the allocator keeps. Measured: a run of the quickstart held 45 to
/// 100 MB besides the other parts. Bytes.
const PROGRAM: u64 = 60_000_000;

/// The settings that need less memory, for a card that is too small.
const LESS: &str = "a smaller train.batch_size and encode.batch_size, train.gradient_checkpointing = true, train.mixed_precision, \
    train.teacher_dtype, optimizer.kind = \"adamw8bit\", encode.vae_dtype, or latents in place of images";

/// Measured sizes of models and data.
pub(super) struct Sizes<'a> {
    /// Mean size of a sample in its shard. Bytes.
    pub(super) sample_bytes: u64,
    /// Content of the shards.
    pub(super) content: Content,
    /// Parameters of the text encoder.
    pub(super) text_encoder: u64,
    /// Parameters of the VAE, including its decoder.
    pub(super) vae: u64,
    /// Parameters of the VAE's decoder.
    pub(super) vae_decoder: u64,
    pub(super) vae_folder: &'a Path,
    pub(super) vae_downscale: usize,
    /// Parameters and configuration of the teacher; `None` for `precompute`.
    pub(super) teacher: Option<(u64, &'a UNetConfig)>,
}

/// The parts of the estimate. Field names are keys of `check --json`.
#[derive(Serialize)]
pub(super) struct MemoryPlan {
    parts: Vec<MemoryPart>,
    /// Free main memory now. Bytes.
    available: Option<u64>,
    /// Memory of each CUDA device. Bytes.
    #[serde(skip)]
    cards: BTreeMap<String, u64>,
}

/// Whether the memory is enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Enough,
    /// Main memory that is free now is less than the estimate; more may become free.
    MoreThanFree,
    /// The estimate is more than a card has.
    MoreThanCard,
}

#[derive(Serialize)]
struct MemoryPart {
    device: DeviceSpec,
    what: &'static str,
    bytes: u64,
    how: String,
}

impl MemoryPlan {
    /// `cards`: the memory of each CUDA device that the configuration names.
    pub(super) fn new(config: &Config, sizes: &Sizes<'_>, cards: BTreeMap<String, u64>) -> Self {
        let mut plan = Self {
            parts: Vec::new(),
            available: available_memory(),
            cards,
        };
        let how = "code, threads and their scratch memory".to_owned();
        plan.add(DeviceSpec::Cpu, "program", PROGRAM, how);
        plan.add_stream(config, sizes);
        plan.add_encoders(config, sizes);
        if let Some((parameters, unet)) = sizes.teacher {
            plan.add_training(
                config,
                parameters,
                unet,
                config.image.resolution as usize / sizes.vae_downscale,
            );
        }
        plan
    }

    fn add(&mut self, device: DeviceSpec, what: &'static str, bytes: u64, how: String) {
        self.parts.push(MemoryPart {
            device,
            what,
            bytes,
            how,
        });
    }

    fn add_stream(&mut self, config: &Config, sizes: &Sizes<'_>) {
        let (data, side) = (&config.data, u64::from(config.image.resolution));
        // A sequential stream, as for latents, does not shuffle.
        if sizes.teacher.is_some() {
            let (samples, each) = (data.shuffle_buffer as u64, sizes.sample_bytes);
            let how = format!(
                "{} of {}, the mean of the first ones, at most {} MB",
                counted(samples, "sample"),
                size(each),
                data.shuffle_buffer_mb
            );
            let bytes = (samples * each).min(data.shuffle_buffer_mb.saturating_mul(1_000_000));
            self.add(DeviceSpec::Cpu, "shuffle buffer", bytes, how);
        }
        let batch = match sizes.teacher {
            Some(_) => config.train.batch_size,
            None => config.encode.batch_size,
        };
        let decoding = 2 * data.decode_threads + 8;
        let images = ((data.prefetch_batches + 1) * batch + decoding) as u64;
        let (what, how, each) = match sizes.content {
            Content::Images => (
                "decoded images",
                format!("{} of {side}x{side}", counted(images, "image")),
                3 * side * side,
            ),
            Content::Latents(shapes) => {
                let [channels, height, width] = shapes.moments;
                let embeds = shapes
                    .prompt_embeds
                    .map_or(0, |[tokens, width]| tokens * width);
                let numbers = channels * height * width + embeds;
                let how = format!("{} as f16", counted(images, "sample"));
                ("latents", how, 2 * numbers as u64)
            }
        };
        self.add(DeviceSpec::Cpu, what, images * each, how);
    }

    fn add_encoders(&mut self, config: &Config, sizes: &Sizes<'_>) {
        let side = u64::from(config.image.resolution);
        let width = first_channels(sizes.vae_folder);
        let batch = match sizes.teacher {
            Some(_) => config.train.batch_size.min(config.encode.batch_size),
            None => config.encode.batch_size,
        };
        let of = |parameters: u64| format!("{:.1} M parameters", parameters as f64 / 1e6);
        let (text_each, vae_each) = (
            bytes_of(config.encode.dtype),
            bytes_of(config.encode.vae_dtype),
        );
        let encoders = sizes.text_encoder + sizes.vae - sizes.vae_decoder;
        let bytes = sizes.text_encoder * text_each + (sizes.vae - sizes.vae_decoder) * vae_each;
        let (images, stored) = match sizes.content {
            Content::Images => (true, false),
            Content::Latents(shapes) => (false, shapes.prompt_embeds.is_some()),
        };
        for (i, &device) in config.encode.devices.iter().enumerate() {
            // Training decodes pictures with the encoders of the first thread.
            if sizes.teacher.is_some() && i == 0 {
                let parameters = sizes.text_encoder + sizes.vae;
                let how = format!("{}, for pictures too", of(parameters));
                let bytes = bytes + sizes.vae_decoder * vae_each;
                self.add(device, "encoders", bytes, how);
            } else if !stored {
                self.add(device, "encoders", bytes, of(encoders));
            }
            if images {
                let images =
                    Encoders::images_at_once(device == DeviceSpec::Cpu, batch, side as usize);
                let maps = HELD_BY_VAE * width * side * side * vae_each;
                let how = format!("estimate for {} at once", counted(images as u64, "image"));
                self.add(device, "encoding", images as u64 * maps, how);
            }
        }
    }

    fn add_training(&mut self, config: &Config, teacher: u64, unet: &UNetConfig, latent: usize) {
        let device = config.train.device;
        let embedding = match unet.time_cond_proj_dim {
            Some(_) => 0,
            None => config.model.time_cond_proj_dim * unet.base_channels(),
        };
        let student = teacher + embedding as u64;
        let of = |parameters: u64| format!("{:.1} M parameters", parameters as f64 / 1e6);
        let held = bytes_of(config.train.teacher_dtype);
        self.add(device, "teacher", teacher * held, of(teacher));
        self.add(device, "student", student * F32, of(student));
        self.add(device, "target", student * F32, of(student));
        let mixed = config.train.mixed_precision != MixedPrecision::No;
        if mixed {
            let how = "the student in the type to compute in".to_owned();
            self.add(device, "16-bit copies", student * (F32 / 2), how);
        }
        // A GPU's optimiser takes them as they are; sums over micro-batches are f32.
        let gradient = match (mixed, config.train.gradient_accumulation, device) {
            (true, 1, DeviceSpec::Cuda(_)) => F32 / 2,
            _ => F32,
        };
        self.add(device, "gradients", student * gradient, of(student));
        // Two moments a parameter; those in 8 bits have an f32 scale for each 256.
        let (moments, how) = match config.optimizer.kind {
            OptimizerKind::AdamW => (student * 2 * F32, "two moments a parameter"),
            OptimizerKind::AdamW8bit => (
                student * 2 + student / 256 * 2 * F32,
                "two moments a parameter, in 8 bits",
            ),
        };
        self.add(device, "optimizer", moments, how.to_owned());
        if config.checkpoint.background {
            let bytes = student * 2 * F32 + moments;
            let how =
                "a copy while a checkpoint is written; without the room, training waits".to_owned();
            self.add(DeviceSpec::Cpu, "checkpoint", bytes, how);
        }
        let batch = config.train.batch_size as u64;
        let kept = KeptActivations {
            scores: config.train.attention == Attention::Plain,
            inside_blocks: !config.train.gradient_checkpointing,
        };
        let each = match config.train.mixed_precision {
            MixedPrecision::No => F32,
            MixedPrecision::Fp16 | MixedPrecision::Bf16 => F32 / 2,
        };
        let activations = batch * activations(unet.to_json(), latent as u64, kept) * each;
        let how = format!("estimate for {batch} latents of {latent}x{latent}, from shapes alone");
        self.add(device, "activations", activations, how);
    }

    /// Bytes by device.
    fn totals(&self) -> BTreeMap<String, u64> {
        let mut totals = BTreeMap::new();
        for part in &self.parts {
            *totals.entry(part.device.to_string()).or_default() += part.bytes;
        }
        totals
    }

    /// Whether the memory is enough, and the message that says so.
    pub(super) fn verdict(&self) -> (Verdict, String) {
        let totals = self.totals();
        for (card, has) in &self.cards {
            let needed = totals.get(card).copied().unwrap_or_default();
            if needed > *has {
                let message = format!(
                    "about {} on {card}: more than its {}; less is needed with {LESS}",
                    size(needed),
                    size(*has)
                );
                return (Verdict::MoreThanCard, message);
            }
        }
        let each: Vec<String> = totals
            .iter()
            .map(|(device, bytes)| format!("{} on {device}", size(*bytes)))
            .collect();
        let needed = totals.get("cpu").copied().unwrap_or_default();
        let message = format!("about {}", each.join(", "));
        match self.available {
            Some(available) if needed > available => (
                Verdict::MoreThanFree,
                format!(
                    "{message}: more than the {} of main memory that is free",
                    size(available)
                ),
            ),
            Some(available) => (
                Verdict::Enough,
                format!("{message}; {} of main memory is free", size(available)),
            ),
            None => (Verdict::Enough, message),
        }
    }

    /// One line for each part.
    pub(super) fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let line = |part: &MemoryPart| {
            format!(
                "{:<8} {:<21} {:>9}  {}",
                part.device.to_string(),
                part.what,
                size(part.bytes),
                part.how
            )
        };
        self.parts.iter().map(line)
    }
}

fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        _ if bytes >= 1e9 => format!("{:.2} GB", bytes / 1e9),
        _ if bytes >= 1e6 => format!("{:.1} MB", bytes / 1e6),
        _ => format!("{:.1} kB", bytes / 1e3),
    }
}

/// Which activations are kept for the backward pass.
#[derive(Clone, Copy)]
struct KeptActivations {
    /// The whole matrices of attention scores.
    scores: bool,
    /// The results inside all blocks; `false`: of one block at a time (activation checkpointing).
    inside_blocks: bool,
}

/// Estimate of the numbers that one latent's forward pass keeps for the backward pass, from shapes alone.
fn activations(unet: &Map<String, Value>, side: u64, kept: KeptActivations) -> u64 {
    let number = |key: &str| unet.get(key).and_then(Value::as_u64);
    let list = |key: &str| unet.get(key).and_then(Value::as_array);
    let channels: Vec<u64> = match list("block_out_channels") {
        Some(channels) => channels.iter().filter_map(Value::as_u64).collect(),
        None => vec![320, 640, 1280, 1280],
    };
    let layers = number("layers_per_block").unwrap_or(2);
    let crosses = |key: &str, level: usize, default: bool| {
        let name = list(key)
            .and_then(|types| types.get(level))
            .and_then(Value::as_str);
        name.map_or(default, |name| name.starts_with("CrossAttn"))
    };
    let heads = |level: usize| {
        let value = ["num_attention_heads", "attention_head_dim"]
            .into_iter()
            .find_map(|key| unet.get(key).filter(|v| !v.is_null()));
        let of_level =
            value.and_then(|v| v.as_u64().or_else(|| v.get(level).and_then(Value::as_u64)));
        of_level.unwrap_or(8)
    };
    let last = channels.len().saturating_sub(1);
    let level_numbers = |(level, &channels): (usize, &u64)| {
        let deepest = u64::from(level == last);
        let pixels = (side >> level).pow(2);
        let resnets = 2 * layers + 1 + 2 * deepest;
        let down = u64::from(crosses("down_block_types", level, level != last));
        let up = u64::from(crosses("up_block_types", last - level, level != last));
        let transformers = down * layers + up * (layers + 1) + deepest;
        let scores = if kept.scores {
            KEPT_SCORES * heads(level) * (pixels + TEXT_TOKENS)
        } else {
            0
        };
        let resnet = pixels * channels * KEPT_BY_RESNET;
        let transformer = pixels * (channels * KEPT_BY_TRANSFORMER + scores);
        let ends = pixels * channels * KEPT_TO_RECOMPUTE * (resnets + transformers);
        let largest = if transformers > 0 {
            transformer
        } else {
            resnet
        };
        if kept.inside_blocks {
            (resnet * resnets + transformer * transformers, 0)
        } else {
            (ends, largest)
        }
    };
    let levels: Vec<(u64, u64)> = channels.iter().enumerate().map(level_numbers).collect();
    let kept: u64 = levels.iter().map(|(kept, _)| kept).sum();
    kept + levels
        .iter()
        .map(|&(_, largest)| largest)
        .max()
        .unwrap_or(0)
}

/// Channels of a VAE's first level, from its `config.json`, which was parsed before.
fn first_channels(vae: &Path) -> u64 {
    const STABLE_DIFFUSION: u64 = 128;
    let config = bounded::read_file(&vae.join("config.json"), MAX_FILE_BYTES).unwrap_or_default();
    let config: Value = json::from_slice(&config).unwrap_or_default();
    config["block_out_channels"][0]
        .as_u64()
        .unwrap_or(STABLE_DIFFUSION)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn activations_of_stable_diffusion_are_gigabytes() {
        let config = json!({
            "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": 8,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        });
        let all = KeptActivations {
            scores: true,
            inside_blocks: true,
        };
        let numbers = activations(config.as_object().unwrap(), 64, all);
        // At 512 pixels the scores of the first level alone, 5 blocks of 8 heads over 4096 pixels, are 5.4 GB.
        assert!((6e9..11e9).contains(&(4.0 * numbers as f64)), "{numbers}");
        let defaults = |side, kept| activations(&Map::new(), side, kept);
        assert_eq!(numbers, defaults(64, all));
        assert!(defaults(32, all) * 4 < numbers);
        let efficient = KeptActivations {
            scores: false,
            ..all
        };
        let recomputed = KeptActivations {
            inside_blocks: false,
            ..efficient
        };
        assert!(defaults(64, efficient) * 2 < numbers);
        assert!(defaults(64, recomputed) * 5 < defaults(64, efficient));
    }

    #[test]
    fn memory_parts_add_up_by_device() {
        let part = |device, bytes| MemoryPart {
            device,
            what: "x",
            bytes,
            how: String::new(),
        };
        let mut plan = MemoryPlan {
            parts: vec![
                part(DeviceSpec::Cpu, 1500),
                part(DeviceSpec::Cuda(0), 7),
                part(DeviceSpec::Cpu, 500),
            ],
            available: Some(2000),
            cards: [("cuda:0".to_owned(), 7)].into(),
        };
        assert_eq!(
            plan.totals(),
            [("cpu".to_owned(), 2000), ("cuda:0".to_owned(), 7)].into()
        );
        assert_eq!(plan.verdict().0, Verdict::Enough);
        plan.available = Some(1999);
        let (verdict, message) = plan.verdict();
        assert_eq!(verdict, Verdict::MoreThanFree);
        assert!(message.contains("more than the 2.0 kB"), "{message}");
        plan.cards.insert("cuda:0".to_owned(), 6);
        let (verdict, message) = plan.verdict();
        assert_eq!(verdict, Verdict::MoreThanCard);
        assert!(
            message
                .starts_with("about 0.0 kB on cuda:0: more than its 0.0 kB; less is needed with "),
            "{message}"
        );
    }
}
