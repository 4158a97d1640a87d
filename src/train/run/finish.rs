//! The end of a run: its summary, the finished student, the pictures and figures that compare it with the teacher.

use std::time::Instant;

use super::{Outcome, Run};
use crate::stop::Stop;
use crate::train::TrainError;
use crate::train::progress::Progress;
use crate::train::report::{Teacher, comparison, figure, loss_curve};
use crate::train::validation::Prompts;

impl Run<'_> {
    /// Says how the steps went.
    pub(super) fn summarize(&self, progress: &Progress, first: u64, begun: Instant) {
        let seconds = begun.elapsed().as_secs_f64();
        let overall = self.recent.overall(self.monitor.flow());
        let limit = overall.and_then(|flow| flow.limiting_stage());
        let mut parts = vec![format!("{} steps in {seconds:.1} s", self.step - first)];
        parts.extend(limit.map(|stage| format!("limit: {stage}")));
        let counts = self.skipped.counts().iter();
        let counts: Vec<String> = counts.map(|(reason, n)| format!("{reason} {n}")).collect();
        if !counts.is_empty() {
            parts.push(format!("left out since step 1: {}", counts.join(", ")));
        }
        progress.say(parts.join(" · "));
    }

    /// Writes the finished student and the pictures.
    pub(super) fn finish(
        mut self,
        progress: &Progress,
        stop: &Stop,
    ) -> Result<Outcome, TrainError> {
        self.save_at_the_end(progress)?;
        if let Some(snapshot) = self.snapshot(false)? {
            self.saver
                .checkpoints()
                .finish(&snapshot)
                .map_err(|cause| self.not_saved("the finished student".to_owned(), cause))?;
        }
        let folder = self.output.folder();
        loss_curve(folder, self.log.records(), self.endpoint.as_ref())?;
        if let (true, Some((_, validation))) = (self.config.report.grid, &self.validation) {
            progress.say("drawing teacher and student side by side");
            let side =
                self.config.image.resolution as usize / self.encoders.vae().config().downscale();
            let latent = [self.teacher.config().in_channels, side, side];
            let seeded = (self.config.train.seed, "comparison");
            let device = self.uncond.device();
            let prompts = Prompts::new(
                &self.encoders,
                &validation.prompts,
                1,
                latent,
                seeded,
                device,
            )?;
            let teacher = Teacher {
                unet: &self.teacher,
                uncond: &self.uncond,
            };
            let path = folder.join("samples/comparison.png");
            comparison(
                &path,
                (&prompts, &validation.prompts),
                self.config.report.guidance,
                &self.encoders,
                (teacher, &self.student),
                &self.distillation,
                stop,
            )?;
            progress.say("drew samples/comparison.png");
        }
        if let Some(endpoint) = &self.endpoint {
            let [one, four] = endpoint.teacher;
            let student = endpoint.of(self.student.target(), &self.distillation, stop)?;
            progress.say(format!(
                "endpoint error: student in 1 step {} · teacher in 1 step {} · teacher in 4 steps {} (student / teacher in 1 \
                 step: {:.2})",
                figure(student),
                figure(one),
                figure(four),
                student / one
            ));
        }
        self.saver
            .records()
            .upload()
            .map_err(|cause| self.not_saved("metrics and pictures".to_owned(), cause))?;
        let place = self.output.place().to_owned();
        self.output.close();
        Ok(Outcome::Done(place))
    }
}
