//! How near the student has come to its teacher: the endpoint error, and the pictures of a run.

use std::path::{Path, PathBuf};

use candle_core::Tensor;

use super::log::StepRecord;
use super::validation::{Prompts, decode};
use super::{Distillation, Student, TrainError};
use crate::config::Validation;
use crate::draw::{Curve, SaveError, curves, grid, save_png};
use crate::encode::Encoders;
use crate::models::UNet;
use crate::stop::Stop;

/// Steps of the teacher's sampler that counts as its endpoint.
const ENDPOINT_STEPS: usize = 50;

/// The teacher: its network and the embedding of the empty caption, `[1, T, width]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Teacher<'a> {
    pub(super) unet: &'a UNet,
    pub(super) uncond: &'a Tensor,
}

/// Mean squared distance, in scaled latents, of samples from the teacher's 50-step DDIM samples: same noise, same captions, same
/// guidance.
#[derive(Debug)]
pub(super) struct Endpoint {
    prompts: Prompts,
    guidance: f64,
    reference: Tensor,
    /// The teacher's own error in 1 step and in 4.
    pub(super) teacher: [f64; 2],
}

impl Endpoint {
    /// Draws the teacher's samples.
    pub(super) fn new(
        prompts: Prompts,
        guidance: f64,
        teacher: Teacher<'_>,
        distillation: &Distillation,
        stop: &Stop,
    ) -> Result<Self, TrainError> {
        let draw = |steps| {
            prompts.teacher(
                teacher.unet,
                teacher.uncond,
                &distillation.schedule,
                (steps, guidance),
                stop,
            )
        };
        let reference = draw(ENDPOINT_STEPS)?;
        let teacher = [
            distance(&draw(1)?, &reference)?,
            distance(&draw(4)?, &reference)?,
        ];
        Ok(Self {
            prompts,
            guidance,
            reference,
            teacher,
        })
    }

    /// The error of a student's one-step samples.
    pub(super) fn of(
        &self,
        student: &UNet,
        distillation: &Distillation,
        stop: &Stop,
    ) -> Result<f64, TrainError> {
        let Distillation {
            schedule, boundary, ..
        } = distillation;
        let drawn = self
            .prompts
            .student(student, schedule, *boundary, (1, self.guidance), stop)?;
        distance(&drawn, &self.reference)
    }
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f64, TrainError> {
    Ok(f64::from((a - b)?.sqr()?.mean_all()?.to_scalar::<f32>()?))
}

/// A figure for people: three significant digits.
pub(super) fn figure(x: f64) -> String {
    let digits = (2 - x.abs().max(1e-12).log10().floor() as i32).clamp(0, 6) as usize;
    format!("{x:.digits$}")
}

/// The grids of a validation: the student's moving average and the student itself.
pub(super) const GRIDS: [&str; 2] = ["target", "online"];

/// Where a grid of a step is written.
pub(super) fn grid_path(folder: &Path, step: u64, name: &str) -> PathBuf {
    folder.join(format!("samples/step-{step}-{name}.png"))
}

/// Writes the grids of a step: a row a prompt, an image a column.
pub(super) fn validation_grids(
    folder: &Path,
    step: u64,
    (prompts, validation): (&Prompts, &Validation),
    encoders: &Encoders,
    student: &Student,
    distillation: &Distillation,
    stop: &Stop,
) -> Result<(), TrainError> {
    let Distillation {
        schedule, boundary, ..
    } = distillation;
    for (name, unet) in GRIDS.into_iter().zip([student.target(), student.frozen()]) {
        let how = (validation.steps, validation.guidance);
        let latents = prompts.student(unet, schedule, *boundary, how, stop)?;
        let images = decode(encoders, &latents)?;
        let rows: Vec<_> = images
            .chunks(validation.images_per_prompt)
            .map(<[_]>::to_vec)
            .collect();
        let picture = grid(&rows, &validation.prompts, &[]);
        save_png(&picture, &grid_path(folder, step, name))?;
    }
    Ok(())
}

/// Writes `samples/comparison.png`: for each prompt the teacher in 50 and 4 steps and the student (the target) in 4 and 1, from
/// the same noise.
pub(super) fn comparison(
    path: &Path,
    (prompts, labels): (&Prompts, &[String]),
    guidance: f64,
    encoders: &Encoders,
    (teacher, student): (Teacher<'_>, &Student),
    distillation: &Distillation,
    stop: &Stop,
) -> Result<(), TrainError> {
    let Distillation {
        schedule, boundary, ..
    } = distillation;
    let teacher = |steps| {
        prompts.teacher(
            teacher.unet,
            teacher.uncond,
            schedule,
            (steps, guidance),
            stop,
        )
    };
    let student = |steps| {
        prompts.student(
            student.target(),
            schedule,
            *boundary,
            (steps, guidance),
            stop,
        )
    };
    let columns = [
        teacher(ENDPOINT_STEPS)?,
        teacher(4)?,
        student(4)?,
        student(1)?,
    ];
    let columns = columns
        .iter()
        .map(|latents| decode(encoders, latents))
        .collect::<Result<Vec<_>, _>>()?;
    let rows: Vec<_> = (0..prompts.len())
        .map(|i| columns.iter().map(|images| images[i].clone()).collect())
        .collect();
    let titles = [
        "teacher, 50 steps",
        "teacher, 4 steps",
        "student, 4 steps",
        "student, 1 step",
    ];
    let picture = grid(&rows, labels, &titles.map(str::to_owned));
    Ok(save_png(&picture, path)?)
}

/// Writes `loss.png`: the loss of every step and, where it was measured, the endpoint error beside the teacher's.
pub(super) fn loss_curve(
    folder: &Path,
    records: &[StepRecord],
    endpoint: Option<&Endpoint>,
) -> Result<(), TrainError> {
    let mut panels = vec![Curve {
        title: "loss".to_owned(),
        points: records.iter().map(|r| (r.step, r.loss)).collect(),
        smoothed: true,
        references: Vec::new(),
    }];
    if let Some(endpoint) = endpoint {
        let [one, four] = endpoint.teacher;
        panels.push(Curve {
            title: "endpoint error of the student in 1 step".to_owned(),
            points: records
                .iter()
                .filter_map(|r| Some((r.step, r.endpoint_error?)))
                .collect(),
            smoothed: false,
            references: vec![
                ("teacher, 1 step".to_owned(), one),
                ("teacher, 4 steps".to_owned(), four),
            ],
        });
    }
    Ok(save_png(&curves(&panels), &folder.join("loss.png"))?)
}

impl From<SaveError> for TrainError {
    fn from(error: SaveError) -> Self {
        Self::Io {
            path: error.path,
            source: error.source,
        }
    }
}
