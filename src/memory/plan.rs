//! Estimate of the memory a run needs, by purpose and device.

use std::collections::BTreeMap;

use coffey_pipeline::{Content, counted};
use serde::Serialize;

use super::activations::{Held, TEXT_TOKENS, activations};
use super::limits::MemoryLimits;
use super::size;
use super::sizes::{Command, EncoderSizes, Sizes, TeacherSizes};
use crate::config::{Config, DeviceSpec, FloatType, MixedPrecision, OptimizerKind};
use crate::encode::Encoders;
use crate::ops::Attention;

/// Bytes of an `f32`.
pub(super) const F32: u64 = 4;

/// Bytes of a number.
fn bytes_of(float: FloatType) -> u64 {
    match float {
        FloatType::F32 => F32,
        FloatType::F16 | FloatType::Bf16 => F32 / 2,
    }
}

/// Feature maps of full size that a VAE holds at once while it encodes or decodes.
pub(super) const HELD_BY_VAE: u64 = 4;

/// Code, threads and their scratch memory, and memory that the allocator keeps. Measured: a run of the quickstart held 45 to
/// 100 MB besides the other parts. Bytes.
pub(super) const PROGRAM: u64 = 60_000_000;

/// The settings that need less memory, where no single one is enough.
pub(super) const LESS: &str = "a smaller train.batch_size and encode.batch_size, train.gradient_checkpointing = true, train.mixed_precision, \
    train.teacher_dtype, optimizer.kind = \"adamw8bit\", encode.vae_dtype, or latents in place of images";

/// The parts of the estimate. Field names are keys of `check --json`.
#[derive(Debug, Serialize)]
pub struct MemoryPlan {
    parts: Vec<MemoryPart>,
    /// Free main memory now. Bytes.
    available: Option<u64>,
    #[serde(skip)]
    limits: MemoryLimits,
}

/// Whether the memory is enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The memory that is free is enough.
    Enough,
    /// Main memory that is free now is less than the estimate; more may become free.
    MoreThanFree,
    /// The estimate is more than the machine, its control group or a card has.
    MoreThanThere,
}

#[derive(Debug, Serialize)]
struct MemoryPart {
    device: DeviceSpec,
    what: &'static str,
    bytes: u64,
    how: String,
    /// Whether the run does without it where memory is short.
    #[serde(skip)]
    optional: bool,
}

impl MemoryPlan {
    /// The parts of a command under `config`.
    pub fn new(config: &Config, sizes: &Sizes, limits: MemoryLimits) -> Self {
        let mut plan = Self {
            parts: Vec::new(),
            available: limits.available,
            limits,
        };
        let how = "code, threads and their scratch memory".to_owned();
        plan.add(DeviceSpec::Cpu, "program", PROGRAM, how);
        plan.add_stream(config, sizes);
        if let Some(encoders) = &sizes.encoders {
            plan.add_encoders(config, sizes, encoders);
            if let Some(teacher) = &sizes.teacher {
                let latent = config.image.resolution as usize / encoders.downscale;
                plan.add_training(config, teacher, latent, sizes.ranks);
                plan.add_pictures(config, teacher, latent);
            }
        }
        plan
    }

    fn add(&mut self, device: DeviceSpec, what: &'static str, bytes: u64, how: String) {
        self.parts.push(MemoryPart {
            device,
            what,
            bytes,
            how,
            optional: false,
        });
    }

    fn add_stream(&mut self, config: &Config, sizes: &Sizes) {
        let (data, side) = (&config.data, u64::from(config.image.resolution));
        // A sequential stream, as for latents, does not shuffle.
        if let Some(each) = sizes.sample_bytes
            && sizes.command != Command::Precompute
        {
            let samples = data.shuffle_buffer as u64;
            let how = format!(
                "{} of {}, the mean of the first ones, at most {} MB",
                counted(samples, "sample"),
                size(each),
                data.shuffle_buffer_mb
            );
            let most = data.shuffle_buffer_mb.saturating_mul(1_000_000);
            let bytes = samples.saturating_mul(each).min(most);
            self.add(DeviceSpec::Cpu, "shuffle buffer", bytes, how);
        }
        let (batch, crops) = match (sizes.command, &config.latents) {
            (Command::Precompute, Some(latents)) => (config.encode.batch_size, latents.crops),
            (Command::Precompute, None) => (config.encode.batch_size, 1),
            (Command::Train | Command::Bench, _) => (config.train.batch_size, 1),
        };
        let decoding = 2 * data.decode_threads + 8;
        let images = (((data.prefetch_batches + 1) * batch + decoding) * crops) as u64;
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
                let pooled = shapes.pooled.map_or(0, |[width]| width);
                let numbers = channels * height * width + embeds + pooled;
                let how = format!("{} as f16", counted(images, "sample"));
                ("latents", how, 2 * numbers as u64)
            }
        };
        self.add(DeviceSpec::Cpu, what, images.saturating_mul(each), how);
    }

    fn add_encoders(&mut self, config: &Config, sizes: &Sizes, encoders: &EncoderSizes) {
        let side = u64::from(config.image.resolution);
        let training = sizes.command == Command::Train;
        let batch = match training {
            true => config.train.batch_size.min(config.encode.batch_size),
            false => config.encode.batch_size,
        };
        let of = |parameters: u64| format!("{:.1} M parameters", parameters as f64 / 1e6);
        let (text_each, vae_each) = (
            bytes_of(config.encode.dtype),
            bytes_of(config.encode.vae_dtype),
        );
        let vae_encoder = encoders.vae - encoders.vae_decoder;
        let bytes = encoders.text * text_each + vae_encoder * vae_each;
        let (images, stored) = match sizes.content {
            Content::Images => (true, false),
            Content::Latents(shapes) => (false, shapes.prompt_embeds.is_some()),
        };
        for (i, &device) in config.encode.devices.iter().enumerate() {
            // Training decodes pictures with the encoders of the first thread.
            if training && i == 0 {
                let how = format!("{}, for pictures too", of(encoders.text + encoders.vae));
                let bytes = bytes + encoders.vae_decoder * vae_each;
                self.add(device, "encoders", bytes, how);
            } else if !stored {
                self.add(device, "encoders", bytes, of(encoders.text + vae_encoder));
            }
            if images {
                let images =
                    Encoders::images_at_once(device == DeviceSpec::Cpu, batch, side as usize);
                let maps = HELD_BY_VAE * encoders.vae_channels * side * side * vae_each;
                let how = format!("estimate for {} at once", counted(images as u64, "image"));
                self.add(device, "encoding", maps.saturating_mul(images as u64), how);
            }
        }
    }

    fn add_training(
        &mut self,
        config: &Config,
        teacher: &TeacherSizes,
        latent: usize,
        ranks: usize,
    ) {
        self.add_widened(config, teacher);
        let (unet, student) = (&teacher.unet, trained_parameters(config, teacher));
        // A LoRA's target is the student itself.
        let target = teacher.adapters.map_or(student, |_| 0);
        let teacher = teacher.parameters;
        let device = config.train.device;
        let of = |parameters: u64| format!("{:.1} M parameters", parameters as f64 / 1e6);
        let held = bytes_of(config.train.teacher_dtype);
        self.add(device, "teacher", teacher * held, of(teacher));
        self.add(device, "student", student * F32, of(student));
        if target > 0 {
            self.add(device, "target", target * F32, of(target));
        }
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
        // The partial sums of a tree over this rank's lanes. The number of shards, which may lower the default, is not known here.
        let lanes = (config.lanes(usize::MAX) / ranks).max(1);
        let partial = 1 + u64::from(lanes.ilog2());
        let how = match partial {
            1 => of(student),
            _ => format!("{}, {partial} partial sums over the lanes", of(student)),
        };
        self.add(device, "gradients", student * gradient * partial, how);
        // Two moments a parameter; those in 8 bits have an f32 scale for each 256.
        let (moments, how) = match config.optimizer.kind {
            OptimizerKind::AdamW => (student * 2 * F32, "two moments a parameter"),
            OptimizerKind::AdamW8bit => (
                student * 2 + student / 256 * 2 * F32,
                "two moments a parameter, in 8 bits",
            ),
        };
        let ranks = ranks as u64;
        let own = moments.div_ceil(ranks);
        let how = match ranks {
            1 => how.to_owned(),
            _ => format!("{how}, divided between {ranks} ranks"),
        };
        self.add(device, "optimizer", own, how);
        if ranks > 1 {
            let how = "those of the other ranks, on rank 0 while it saves".to_owned();
            self.add(DeviceSpec::Cpu, "moments", moments - own, how);
        }
        if config.checkpoint.background {
            let bytes = (student + target) * F32 + moments;
            let how =
                "a copy while a checkpoint is written; without the room, training waits".to_owned();
            self.parts.push(MemoryPart {
                device: DeviceSpec::Cpu,
                what: "checkpoint",
                bytes,
                how,
                optional: true,
            });
        }
        let batch = config.train.batch_size as u64;
        let kept = Held {
            scores: config.train.attention == Attention::Plain,
            inside_blocks: !config.train.gradient_checkpointing,
        };
        let each = match config.train.mixed_precision {
            MixedPrecision::No => F32,
            MixedPrecision::Fp16 | MixedPrecision::Bf16 => F32 / 2,
        };
        let numbers = activations(unet.to_json(), [latent as u64; 2], kept);
        let how = format!("estimate for {batch} latents of {latent}x{latent}, from shapes alone");
        let bytes = numbers.saturating_mul(batch * each);
        self.add(device, "activations", bytes, how);
    }

    /// Weights in 16 bits that a LoRA's student computes with in f32 on the CPU; a backward pass needs them as well.
    fn add_widened(&mut self, config: &Config, teacher: &TeacherSizes) {
        let device = config.train.device;
        if teacher.adapters.is_none()
            || device != DeviceSpec::Cpu
            || config.train.teacher_dtype == FloatType::F32
        {
            return;
        }
        let (parameters, of) = match config.train.gradient_checkpointing {
            true => (teacher.largest_block, "of the largest block"),
            false => (teacher.parameters, "of all blocks"),
        };
        let how = format!("the weights {of} in f32, for the backward pass");
        self.add(device, "widened weights", parameters * F32, how);
    }

    /// Samples of `[validation]` and `[report]`, which are kept from one picture or measurement to the next.
    fn add_pictures(&mut self, config: &Config, teacher: &TeacherSizes, latent: usize) {
        let (device, unet) = (config.train.device, &teacher.unet);
        let pooled = unet.pooled_width().unwrap_or(0);
        let text = TEXT_TOKENS * unet.cross_attention_dim as u64 + pooled as u64;
        let latent = (unet.in_channels * latent * latent) as u64;
        // Noise, samples and those they are compared with.
        let each = (3 * latent + text) * F32;
        if let Some(validation) = &config.validation {
            let rows = validation.prompts.len() as u64;
            let images = rows.saturating_mul(validation.images_per_prompt as u64);
            let how = counted(images, "sample");
            self.add(device, "validation", images.saturating_mul(each), how);
            // The images, and the grid of them.
            let pixels = 3 * u64::from(config.image.resolution).pow(2);
            let how = format!("{} and their grid", counted(images, "image"));
            let bytes = images.saturating_mul(2 * pixels);
            self.add(DeviceSpec::Cpu, "grids", bytes, how);
        }
        let captions = config.report.endpoint_captions as u64;
        if captions > 0 {
            let how = counted(captions, "caption");
            self.add(device, "endpoint error", captions * each, how);
        }
    }

    /// Bytes by device, of the parts that are `wanted`.
    fn totals(&self, wanted: impl Fn(&MemoryPart) -> bool) -> BTreeMap<String, u64> {
        let mut totals = BTreeMap::<String, u64>::new();
        for part in self.parts.iter().filter(|part| wanted(part)) {
            let total = totals.entry(part.device.to_string()).or_default();
            *total = total.saturating_add(part.bytes);
        }
        totals
    }

    /// The first device that the plan does not fit into, as a message; optional parts are not counted.
    pub(super) fn excess(&self) -> Option<String> {
        let needed = self.totals(|part| !part.optional);
        let excess = |(device, bytes): (&String, &u64)| self.limits.excess(device, *bytes);
        needed.iter().find_map(excess)
    }

    /// Whether the memory is enough, and the message that says so.
    pub fn verdict(&self) -> (Verdict, String) {
        if let Some(excess) = self.excess() {
            let message = format!("{excess}; less is needed with {LESS}");
            return (Verdict::MoreThanThere, message);
        }
        let totals = self.totals(|_| true);
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
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
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

/// Number of trained parameters.
pub fn trained_parameters(config: &Config, teacher: &TeacherSizes) -> u64 {
    let unet = &teacher.unet;
    let embedding = match unet.time_cond_proj_dim {
        Some(_) => 0,
        None => config.model.time_cond_proj_dim() * unet.base_channels(),
    };
    let whole = teacher.parameters + embedding as u64;
    teacher.adapters.unwrap_or(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_parts_add_up_by_device() {
        let part = |device, bytes| MemoryPart {
            device,
            what: "x",
            bytes,
            how: String::new(),
            optional: bytes == 500,
        };
        let limits = |available, total, card| MemoryLimits {
            available: Some(available),
            total: Some((total, "this machine has")),
            cards: [("cuda:0".to_owned(), card)].into(),
        };
        let plan = |limits: MemoryLimits| MemoryPlan {
            parts: vec![
                part(DeviceSpec::Cpu, 1500),
                part(DeviceSpec::Cuda(0), 7),
                part(DeviceSpec::Cpu, 500),
            ],
            available: limits.available,
            limits,
        };
        let enough = plan(limits(2000, 1500, 7));
        assert_eq!(
            enough.totals(|_| true),
            [("cpu".to_owned(), 2000), ("cuda:0".to_owned(), 7)].into()
        );
        assert_eq!(enough.verdict().0, Verdict::Enough);
        for (limits, verdict, words) in [
            (
                limits(1999, 1500, 7),
                Verdict::MoreThanFree,
                "more than the 2.0 kB",
            ),
            (
                limits(2000, 1499, 7),
                Verdict::MoreThanThere,
                "about 1.5 kB of main memory needed, and this machine has 1.5 kB; less is needed with ",
            ),
            (
                limits(2000, 1500, 6),
                Verdict::MoreThanThere,
                "about 0.0 kB on cuda:0 needed, and it has 0.0 kB; less is needed with ",
            ),
        ] {
            let (found, message) = plan(limits).verdict();
            assert_eq!(found, verdict, "{message}");
            assert!(message.contains(words), "{message}");
        }
    }
}
