//! The dry run: one sample through the encoders and the teacher, in the types that the configuration says.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use coffey_pipeline::{Batch, BatchData};

use super::{Failure, LoadedTeacher, ModelFolders};
use crate::config::{Config, FloatType, MixedPrecision};
use crate::diffusion::DdimSolver;
use crate::encode::{EncoderOptions, EncoderOutput, Encoders};
use crate::models::unet::WEIGHTS_STEM;
use crate::models::vae::sample_latents;
use crate::models::{Conditioning, Denoiser, TEXT_ENCODER_STEM, TextParts, UNet, first_not_finite};
use crate::ops::all_finite;
use crate::random::{generator, normal};

/// Models of a dry run.
pub(super) struct DryRun<'a> {
    pub(super) config: &'a Config,
    pub(super) folders: &'a ModelFolders,
    pub(super) encoders: &'a Encoders,
    pub(super) teacher: Option<&'a LoadedTeacher>,
    /// Device of the teacher.
    pub(super) device: &'a Device,
}

/// Noisy latents of one sample, as the first and the last step of the solver start from them.
struct TeacherInputs {
    noisy: [(Tensor, i64); 2],
    conditioning: Conditioning,
}

impl DryRun<'_> {
    /// Encodes what the sample lacks (latents, embeddings) and passes it through the teacher. Returns the step's message.
    pub(super) fn run(&self, batch: &Batch) -> Result<&'static str, Failure> {
        let encoded = encode(self.encoders, batch)?;
        self.check_encoded(&encoded, batch)?;
        let Some(teacher) = self.teacher else {
            return Ok("one sample encoded");
        };
        self.check_teacher(teacher, &self.teacher_inputs(teacher, &encoded)?)?;
        Ok(match batch.data {
            BatchData::Latents { .. } => "one sample read and passed through the teacher",
            BatchData::Pixels { .. } => "one sample encoded and passed through the teacher",
        })
    }

    fn check_encoded(&self, encoded: &EncoderOutput, batch: &Batch) -> Result<(), Failure> {
        let encode = &self.config.encode;
        let text = text_is_finite(encoded)?;
        if text && all_finite(&encoded.moments)? {
            return Ok(());
        }
        let vae = self.folders.vae.as_deref();
        let pipeline = &self.folders.pipeline;
        let (model, key, dtype, stem) = if text {
            (
                "the VAE",
                "encode.vae_dtype",
                encode.vae_dtype,
                WEIGHTS_STEM,
            )
        } else {
            (
                "the text encoder",
                "encode.dtype",
                encode.dtype,
                TEXT_ENCODER_STEM,
            )
        };
        let exact = || -> Result<bool, Failure> {
            let (device, options) = (self.encoders.device(), EncoderOptions::exact(1));
            let encoders = Encoders::load(&self.folders.pipeline, vae, device, options)?;
            let exact = self::encode(&encoders, batch)?;
            match text {
                true => Ok(all_finite(&exact.moments)?),
                false => text_is_finite(&exact),
            }
        };
        if dtype != FloatType::F32 && exact()? {
            let mut keys = format!("{key} to \"f32\" or \"bf16\"");
            if text {
                keys +=
                    ", or model.vae to a VAE made for f16 (of SDXL madebyollin/sdxl-vae-fp16-fix)";
            }
            return Err(Failure::Usage(overflow(model, &[keys]).into()));
        }
        let folders = match text {
            true => vec![Encoders::vae_folder(pipeline, vae)],
            false => Vec::from_iter(TextParts::of(pipeline).text_encoders().map(Path::to_owned)),
        };
        Err(damaged(model, &folders, stem))
    }

    fn teacher_inputs(
        &self,
        teacher: &LoadedTeacher,
        encoded: &EncoderOutput,
    ) -> Result<TeacherInputs, Failure> {
        let (config, schedule, device) = (self.config, &teacher.schedule, self.device);
        let moments = encoded.moments.narrow(0, 0, 1)?.to_device(device)?;
        let (_, channels, height, width) = moments.dims4()?;
        let shape = [1, channels / 2, height, width];
        let noise = normal(
            &mut generator(config.train.seed, "check", 0, 0),
            &shape,
            device,
        )?;
        let scale = self.encoders.vae().config().scaling_factor;
        let latents = sample_latents(&moments, &noise, scale)?;
        let steps = config.distill.num_ddim_timesteps;
        let solver = DdimSolver::new(schedule, steps);
        let at = |index: usize| -> Result<(Tensor, i64), Failure> {
            let (timestep, _) = solver.interval(index);
            Ok((schedule.add_noise(&latents, &noise, &[timestep])?, timestep))
        };
        Ok(TeacherInputs {
            noisy: [at(0)?, at(steps - 1)?],
            conditioning: encoded.conditioning.to_device(device)?,
        })
    }

    fn check_teacher(
        &self,
        teacher: &LoadedTeacher,
        inputs: &TeacherInputs,
    ) -> Result<(), Failure> {
        if passes(&teacher.unet, inputs)? {
            return Ok(());
        }
        let train = &self.config.train;
        let mut keys = Vec::new();
        if train.mixed_precision != MixedPrecision::No {
            let ranges = match train.mixed_precision {
                MixedPrecision::Fp16 => "\"bf16\" or \"no\"",
                _ => "\"no\"",
            };
            keys.push(format!("train.mixed_precision to {ranges}"));
        }
        if train.teacher_dtype != FloatType::F32 {
            keys.push("train.teacher_dtype to \"f32\"".to_owned());
        }
        let folder = self.folders.pipeline.join("unet");
        let exact = || -> Result<bool, Failure> {
            let unet = UNet::load(&folder, DType::F32, self.device, train.attention)?;
            passes(&unet, inputs)
        };
        if !keys.is_empty() && exact()? {
            return Err(Failure::Usage(overflow("the teacher", &keys).into()));
        }
        Err(damaged("the teacher", &[folder], WEIGHTS_STEM))
    }
}

fn encode(encoders: &Encoders, batch: &Batch) -> Result<EncoderOutput, Failure> {
    Ok(encoders.encode(batch.data.clone(), &batch.samples)?)
}

fn text_is_finite(encoded: &EncoderOutput) -> Result<bool, Failure> {
    let text = &encoded.conditioning;
    let pooled = text.pooled.as_ref().map_or(Ok(true), all_finite)?;
    Ok(pooled && all_finite(&text.hidden)?)
}

/// Whether a UNet's outputs are all finite.
fn passes(unet: &UNet, inputs: &TeacherInputs) -> Result<bool, Failure> {
    for (noisy, timestep) in &inputs.noisy {
        if !all_finite(&unet.forward(noisy, &[*timestep], &inputs.conditioning)?)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn overflow(model: &str, keys: &[String]) -> String {
    format!(
        "{model} makes numbers that are not finite in 16 bits, and are in f32: set {}",
        keys.join(" and ")
    )
}

/// The failure of a model whose weights are in `folders`, with the first tensor that is the cause.
fn damaged(model: &str, folders: &[PathBuf], stem: &str) -> Failure {
    let found = folders
        .iter()
        .find_map(|folder| first_not_finite(folder, stem).ok()?);
    let cause = match found {
        Some(tensor) => format!(
            ": tensor \"{}\" of {} has such numbers",
            tensor.name,
            tensor.file.display()
        ),
        // Weights that are finite and far too large, or that were readable a moment ago.
        None => String::new(),
    };
    Failure::Failed(
        format!("{model} makes numbers that are not finite; its weights are damaged{cause}").into(),
    )
}
