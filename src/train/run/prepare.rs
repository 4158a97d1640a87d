//! The start of a run: models, checkpoint, records, and what it draws with.

use std::path::Path;

use candle_core::{DType, Device};
use coffey_pipeline::flow::Recent;

use super::{Run, pictures, save};
use crate::config::{self, Config, MixedPrecision};
use crate::encode::Encoders;
use crate::models::UNet;
use crate::ops::Keep;
use crate::pretrained::Models;
use crate::stop::Stop;
use crate::train::audit::Auditor;
use crate::train::checkpoint::Saver;
use crate::train::data::{Data, first_captions};
use crate::train::log::MetricsLog;
use crate::train::optimizer::AdamW;
use crate::train::output::Output;
use crate::train::progress::Progress;
use crate::train::report::{Endpoint, Teacher, figure};
use crate::train::setup::{check_fit, describe_run, distillation, moved_teacher, resume_from};
use crate::train::skipped::SkippedLog;
use crate::train::tracking::Tracker;
use crate::train::validation::Prompts;
use crate::train::{Passes, Student, TrainError};

impl<'a> Run<'a> {
    /// Loads and checks everything, and goes on from a checkpoint where there is one.
    pub(super) fn prepare(
        config: &'a Config,
        (output, models): (&'a Path, &'a Models),
        data: &Data<'_>,
        (device, encode_devices): (&Device, &[Device]),
        stop: &Stop,
        progress: &Progress,
    ) -> Result<Self, TrainError> {
        let Config { train, .. } = config;
        let vae = models.vae.as_deref();
        let pipeline = models.pipeline.as_path();
        progress.say(format!("loading the teacher {}", pipeline.display()));
        let distillation = distillation(config, pipeline)?;
        let encode_device = encode_devices.first().unwrap_or(device);
        let encoders = Encoders::load(pipeline, vae, encode_device, config.encode.batch_size)?;
        let attention = train.attention;
        let folder = pipeline.join("unet");
        let held = match train.teacher_dtype {
            config::FloatType::F32 => DType::F32,
            config::FloatType::F16 => DType::F16,
            config::FloatType::Bf16 => DType::BF16,
        };
        let compute = match train.mixed_precision {
            MixedPrecision::No => None,
            MixedPrecision::Fp16 => Some(DType::F16),
            MixedPrecision::Bf16 => Some(DType::BF16),
        };
        let teacher = UNet::load(&folder, held, device, attention)?.computing_in(compute);
        check_fit(teacher.config(), &encoders, config, pipeline)?;
        let uncond = encoders.encode_text(&[""])?.to_device(device)?;

        let output = Output::open(config, output, data)?;
        let saver = Saver::new(output.checkpoints(config.checkpoint.keep), output.records());
        saver.checkpoints().clear_unfinished()?;
        let found = resume_from(config, saver.checkpoints(), &output, data, progress)?;
        let keep = match train.gradient_checkpointing {
            true => Keep::Nothing,
            false => Keep::All,
        };
        let how = Passes {
            attention,
            keep,
            compute,
        };
        let student = match &found {
            Some(found) => Student::load(&found.folder, device, how)?,
            None => {
                let width = config.model.time_cond_proj_dim;
                Student::from_teacher(&folder, width, train.seed, device, how)?
            }
        };
        let scaled = train.mixed_precision == MixedPrecision::Fp16;
        let mut optimizer = AdamW::new(&config.optimizer, student.variables(), scaled)?;
        let (mut step, mut samples, mut cursor) = (0, 0, None);
        if let Some(found) = found {
            save::restore_optimizer(&found, &mut optimizer, device)?;
            let state = found.state;
            (step, samples, cursor) = (state.step, state.samples, Some(state.cursor));
        }
        saver.records().fetch()?;
        let folder = output.folder();
        let log = MetricsLog::open(folder, step)?;
        data.monitor.resume(log.records().iter().map(Into::into));
        let skipped = SkippedLog::open(folder, step)?;
        let configuration = config
            .to_toml()
            .map_err(|e| TrainError::Mismatch(e.to_string()))?;
        let tracker = Tracker::open(
            config.track.tensorboard,
            folder,
            (step, log.records()),
            &configuration,
            progress,
        );
        if step > 0
            && let Some(warning) = moved_teacher(folder, config, models)
        {
            progress.say(warning);
        }
        describe_run(folder, config, models, &configuration)?;
        let auditor = match &config.audit {
            Some(audit) if step == 0 => Some(Auditor::start(
                audit,
                config,
                &distillation,
                &student,
                data,
            )?),
            _ => None,
        };

        let side = config.image.resolution as usize / encoders.vae().config().downscale();
        let latent = [teacher.config().in_channels, side, side];
        let endpoint = match config.report.endpoint_captions {
            0 => None,
            wanted => {
                progress.say(format!(
                    "drawing the teacher's endpoints of {wanted} captions"
                ));
                let captions = first_captions(data, wanted, stop)?;
                let seeded = (train.seed, "endpoint");
                let prompts = Prompts::new(&encoders, &captions, 1, latent, seeded, device)?;
                let teacher = Teacher {
                    unet: &teacher,
                    uncond: &uncond,
                };
                let endpoint = Endpoint::new(
                    prompts,
                    config.report.guidance,
                    teacher,
                    &distillation,
                    stop,
                )?;
                let [one, four] = endpoint.teacher.map(figure);
                progress.say(format!(
                    "endpoint error of the teacher: {one} in 1 step, {four} in 4 steps"
                ));
                Some(endpoint)
            }
        };
        let validation = match &config.validation {
            None => None,
            Some(v) => {
                pictures::show_grid(&data.monitor, folder, step - step % v.every);
                let seeded = (train.seed, "validation");
                let prompts = Prompts::new(
                    &encoders,
                    &v.prompts,
                    v.images_per_prompt,
                    latent,
                    seeded,
                    device,
                )?;
                Some((prompts, v))
            }
        };
        Ok(Self {
            config,
            models,
            output,
            distillation,
            encoders,
            uncond,
            teacher,
            student,
            optimizer,
            saver,
            configuration,
            log,
            skipped,
            tracker,
            monitor: data.monitor.clone(),
            recent: Recent::default(),
            endpoint,
            validation,
            auditor,
            step,
            samples,
            cursor,
            saved: (step > 0).then_some(step),
        })
    }
}
