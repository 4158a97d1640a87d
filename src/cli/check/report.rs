//! The result of `coffey check`: one line for each step, the memory plan and the cost.

use serde::Serialize;

use super::cost::Cost;
use super::ranks::RanksCheck;
use crate::cli::{Failure, with_causes};
use crate::memory::{MemoryPlan, Verdict};

/// The result of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum StepStatus {
    Ok,
    Warning,
    Error,
}

#[derive(Serialize)]
struct CheckStep {
    step: &'static str,
    status: StepStatus,
    message: String,
}

/// The steps so far. Each is printed when it is done, unless all are printed as JSON at the end.
#[derive(Serialize)]
pub(super) struct CheckReport {
    #[serde(skip)]
    quiet: bool,
    steps: Vec<CheckStep>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<MemoryPlan>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<Cost>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ranks: Option<RanksCheck>,
}

impl CheckReport {
    /// `quiet`: print nothing.
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            steps: Vec::new(),
            memory: None,
            cost: None,
            ranks: None,
        }
    }

    /// Does `work` and records its message, or its error.
    pub(super) fn step<T>(
        &mut self,
        step: &'static str,
        work: impl FnOnce() -> Result<(T, String), Failure>,
    ) -> Result<T, Failure> {
        match work() {
            Ok((result, message)) => {
                self.line(step, StepStatus::Ok, message);
                Ok(result)
            }
            Err(failure) => {
                let message = match &failure {
                    Failure::Usage(error) | Failure::Failed(error) => with_causes(error.as_ref()),
                    Failure::Stopped => "stopped by a signal".to_owned(),
                };
                self.line(step, StepStatus::Error, message);
                Err(failure)
            }
        }
    }

    pub(super) fn cost(&mut self, cost: Cost) {
        self.cost = Some(cost);
    }

    pub(super) fn ranks(&mut self, ranks: RanksCheck) {
        self.ranks = Some(ranks);
    }

    /// Records the memory plan. One that the machine or a card can't hold is an error.
    pub(super) fn memory(&mut self, plan: MemoryPlan) -> Result<(), Failure> {
        let (verdict, message) = plan.verdict();
        let status = match verdict {
            Verdict::Enough => StepStatus::Ok,
            Verdict::MoreThanFree => StepStatus::Warning,
            Verdict::MoreThanThere => StepStatus::Error,
        };
        self.line("memory", status, message.clone());
        if !self.quiet {
            for line in plan.lines() {
                outln!("           {line}");
            }
        }
        self.memory = Some(plan);
        match verdict {
            Verdict::MoreThanThere => Err(Failure::Usage(message.into())),
            _ => Ok(()),
        }
    }

    fn line(&mut self, step: &'static str, status: StepStatus, message: String) {
        // A step is one line.
        let lines = message
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty());
        let message = lines.collect::<Vec<_>>().join("; ");
        if !self.quiet {
            // The error itself goes to standard error, as of every command.
            let (word, message) = match status {
                StepStatus::Ok => ("ok", message.as_str()),
                StepStatus::Warning => ("warning", message.as_str()),
                StepStatus::Error => ("error", ""),
            };
            outln!("{}", format!("{word:<8} {step:<14} {message}").trim_end());
        }
        self.steps.push(CheckStep {
            step,
            status,
            message,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_step_is_reported_and_ends_the_check() {
        let mut report = CheckReport::new(true);
        assert_eq!(
            report.step("one", || Ok((7, "fine".to_owned()))).unwrap(),
            7
        );
        let failed = report.step("two", || {
            Err::<((), String), _>(Failure::Failed("broken".into()))
        });
        assert_eq!(failed.unwrap_err().code(), 1);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["steps"][0]["status"], "ok");
        assert_eq!(
            json["steps"][1],
            serde_json::json!({"step": "two", "status": "error", "message": "broken"})
        );
    }
}
