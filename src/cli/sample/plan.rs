//! Sampler and steps of `coffey sample`.

use clap::ValueEnum;

use super::pipeline_folders::PipelineFolders;
use super::{Failure, SampleArgs};
use crate::config::TCD_GAMMA;
use crate::diffusion::LcmSampler;
use crate::sample::SampleScheduler;

/// Steps where --steps is not given.
const STUDENT_STEPS: usize = 4;
const DDIM_STEPS: usize = 50;

/// Sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Scheduler {
    /// The multistep sampler of Latent Consistency Models.
    Lcm,
    /// DDIM over trailing timesteps.
    Ddim,
    /// The sampler of trajectory consistency models.
    Tcd,
}

/// Sampler and steps, by the options or by the model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// Sampler.
    pub(super) scheduler: SampleScheduler,
    /// Number of steps.
    pub(super) steps: usize,
    /// Whether the sampler is made for few steps.
    pub(super) few: bool,
}

impl Plan {
    /// The plan for a student (or a LoRA) or a teacher, of which `timesteps` is the number of timesteps.
    pub(super) fn new(
        args: &SampleArgs,
        folders: &PipelineFolders,
        student: bool,
        timesteps: usize,
    ) -> Result<Self, Failure> {
        let own = if student {
            folders.scheduler.unwrap_or(SampleScheduler::Lcm)
        } else {
            SampleScheduler::Ddim
        };
        let scheduler = match (args.scheduler, own) {
            (None, own) => own,
            (Some(Scheduler::Lcm), _) => SampleScheduler::Lcm,
            (Some(Scheduler::Ddim), _) => SampleScheduler::Ddim,
            (Some(Scheduler::Tcd), own @ SampleScheduler::Tcd { .. }) => own,
            (Some(Scheduler::Tcd), _) => SampleScheduler::Tcd { gamma: TCD_GAMMA },
        };
        let scheduler = match (args.eta, scheduler) {
            (None, scheduler) => scheduler,
            (Some(gamma), SampleScheduler::Tcd { .. }) => SampleScheduler::Tcd { gamma },
            (Some(_), _) => {
                return Err(Failure::Usage(
                    "--eta: has no effect, it belongs to --scheduler tcd".into(),
                ));
            }
        };
        let (most, why) = match scheduler {
            SampleScheduler::Lcm => (LcmSampler::ORIGINAL_STEPS, "with the lcm scheduler"),
            SampleScheduler::Tcd { .. } => (LcmSampler::ORIGINAL_STEPS, "with the tcd scheduler"),
            SampleScheduler::Ddim => (timesteps, "the timesteps of this model"),
        };
        let few = match scheduler {
            SampleScheduler::Lcm | SampleScheduler::Tcd { .. } => true,
            SampleScheduler::Ddim => student && own == SampleScheduler::Ddim,
        };
        let steps = args
            .steps
            .unwrap_or(if few { STUDENT_STEPS } else { DDIM_STEPS });
        if !(1..=most).contains(&steps) {
            return Err(Failure::Usage(
                format!("--steps {steps}: must be between 1 and {most}, {why}").into(),
            ));
        }
        Ok(Self {
            scheduler,
            steps,
            few,
        })
    }

    /// The sampler, for messages.
    pub(super) fn name(&self) -> &'static str {
        match self.scheduler {
            SampleScheduler::Lcm => "LCM",
            SampleScheduler::Ddim => "DDIM",
            SampleScheduler::Tcd { .. } => "TCD",
        }
    }
}
