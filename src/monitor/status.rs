//! The data of the page, as JSON. It changes with the page; scripts should read `/metrics`.

use std::collections::BTreeMap;
use std::time::Instant;

use coffey_pipeline::flow::{FlowSnapshot, StageSnapshot};
use coffey_pipeline::source::S3Counts;
use coffey_pipeline::stages::{FlowChannel, Stage};
use serde::Serialize;

use super::history::{Curves, Mark};
use super::{
    Goal, Monitor, NOT_WAITING, RankFigures, Reported, Stalled, StepFigures, StreamingCommand,
};

/// One event for the page: the status of the run, and new points of its curves.
#[derive(Debug, Serialize)]
pub(super) struct PageUpdate<'a> {
    pub(super) status: &'a RunStatus,
    pub(super) curves: Curves,
}

/// The status of the run at one moment.
#[derive(Debug, Serialize)]
pub(super) struct RunStatus {
    version: &'static str,
    command: StreamingCommand,
    /// The output of the command.
    subject: String,
    state: RunState,
    /// Time since the command began.
    seconds: f64,
    progress: Option<ProgressStatus>,
    /// Recent speed of the last stage.
    samples_per_second: f64,
    /// The limiting stage, as in the progress line.
    limit: Option<Stage>,
    stalled: Option<Stalled>,
    stages: Vec<StageStatus>,
    /// In the order of the data.
    channels: Vec<ChannelStatus>,
    /// Counts of this process.
    skipped: BTreeMap<String, u64>,
    /// Captions that were cut, by this process.
    truncated_captions: u64,
    #[serde(flatten)]
    s3: S3Counts,
    step: Option<StepFigures>,
    /// Of a run of several ranks, from its first step on.
    ranks: Option<RankFigures>,
    checkpoint: Option<CheckpointStatus>,
    /// Step of the newest validation grid.
    grid: Option<u64>,
}

/// The phase of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum RunState {
    /// The command loads models and evaluates the teacher.
    Preparing,
    /// The command waits for the first batch.
    Filling,
    /// Batches arrive.
    Running,
    /// No batch has arrived for the stall timeout.
    Stalled,
    /// The last batch is done, and results are written.
    Finishing,
}

#[derive(Debug, Serialize)]
struct ProgressStatus {
    unit: &'static str,
    done: u64,
    total: u64,
    seconds_left: Option<f64>,
}

/// Recent numbers of a stage: over the last half minute or eight batches, whichever is longer.
#[derive(Debug, Serialize)]
struct StageStatus {
    name: Stage,
    items_per_second: f64,
    bytes_per_second: f64,
    /// Shares of its threads' time, 0 to 1; `None` before it did anything.
    busy: Option<f64>,
    starved: Option<f64>,
    blocked: Option<f64>,
    /// Items since the command began.
    items: u64,
}

#[derive(Debug, Serialize)]
struct ChannelStatus {
    name: &'static str,
    /// The stage that takes items from it.
    before: Stage,
    items: u64,
    capacity: u64,
}

#[derive(Debug, Serialize)]
struct CheckpointStatus {
    /// Time that saving took.
    seconds: f64,
    seconds_ago: f64,
}

impl Monitor {
    /// The status of the run now.
    pub(super) fn status(&self) -> RunStatus {
        let shared = &*self.0;
        let (command, stalled) = (shared.command, self.stalled());
        let waiting = shared.since.load(std::sync::atomic::Ordering::Relaxed) != NOT_WAITING;
        let flow = shared.flow.snapshot();
        let reported = &*self.reported();
        let now = Instant::now();

        // Shares are measured between marks, since a wait is counted when it ends; speeds up to now, so that they fall at once.
        let shares = reported.recent.window().unwrap_or(&flow);
        let recent = reported.recent.until(&flow);
        let speeds = recent.as_ref().unwrap_or(&flow);
        let stage = |name: Stage| {
            let (shares, speed) = (shares.stage(name), speeds.stage(name));
            let share = |time: fn(&StageSnapshot) -> f64| {
                let total = shares.total_seconds();
                (total > 0.0).then(|| time(shares) / total)
            };
            StageStatus {
                name,
                items_per_second: per_second(speed.items, speeds),
                bytes_per_second: per_second(speed.bytes, speeds),
                busy: share(|s| s.busy_seconds),
                starved: share(|s| s.starved_seconds),
                blocked: share(|s| s.blocked_seconds),
                items: flow.stage(name).items,
            }
        };
        RunStatus {
            version: env!("CARGO_PKG_VERSION"),
            command,
            subject: shared.subject.clone(),
            state: state(reported, waiting, stalled),
            seconds: (now - shared.begun).as_secs_f64(),
            progress: reported.goal.as_ref().map(|goal| progress(goal, now)),
            samples_per_second: per_second(speeds.stage(command.consumer()).items, speeds),
            limit: reported
                .recent
                .window()
                .and_then(FlowSnapshot::limiting_stage),
            stalled,
            stages: command.stages().map(stage).collect(),
            channels: channels(command, &flow),
            skipped: flow.skipped.clone(),
            truncated_captions: flow.truncated_captions,
            s3: shared.s3.counts(),
            step: reported.step,
            ranks: reported.ranks,
            checkpoint: reported.checkpoint.map(|checkpoint| CheckpointStatus {
                seconds: checkpoint.took.as_secs_f64(),
                seconds_ago: (now - checkpoint.saved).as_secs_f64(),
            }),
            grid: reported.grid.as_ref().map(|grid| grid.step),
        }
    }

    /// New points of the curves since `mark`, which is advanced.
    pub(super) fn curves(&self, mark: &mut Mark) -> Curves {
        self.reported().history.since(mark)
    }
}

fn state(reported: &Reported, waiting: bool, stalled: Option<Stalled>) -> RunState {
    match (reported.streams, waiting) {
        _ if stalled.is_some() => RunState::Stalled,
        (false, _) => RunState::Preparing,
        (true, false) => RunState::Finishing,
        (true, true) if reported.recent.started() => RunState::Running,
        (true, true) => RunState::Filling,
    }
}

fn progress(goal: &Goal, now: Instant) -> ProgressStatus {
    ProgressStatus {
        unit: goal.unit,
        done: goal.pace.done,
        total: goal.pace.total,
        seconds_left: goal.pace.left(now).map(|left| left.as_secs_f64()),
    }
}

fn per_second(count: u64, over: &FlowSnapshot) -> f64 {
    if over.seconds > 0.0 {
        count as f64 / over.seconds
    } else {
        0.0
    }
}

/// The open channels, each with the stage that takes items from it.
fn channels(command: StreamingCommand, flow: &FlowSnapshot) -> Vec<ChannelStatus> {
    let consumer = |channel: FlowChannel| {
        let stage = channel.consumer();
        // `bench` has no encoders: it takes the batches itself.
        let stage = stage.filter(|stage| command.stages().any(|other| other == *stage));
        stage.unwrap_or(command.consumer())
    };
    let open = FlowChannel::ALL.into_iter().filter_map(|channel| {
        let fill = flow.channels.get(channel.name())?;
        Some(ChannelStatus {
            name: channel.name(),
            before: consumer(channel),
            items: fill.items,
            capacity: fill.capacity,
        })
    });
    open.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffey_pipeline::FlowMetrics;
    use coffey_pipeline::flow::channel;
    use coffey_pipeline::source::ServerRecord;
    use serde_json::{Value, json};
    use std::time::Duration;

    fn json(monitor: &Monitor) -> Value {
        serde_json::to_value(monitor.status()).unwrap()
    }

    #[test]
    fn status_is_complete_from_the_start() {
        let flow = FlowMetrics::new();
        let minute = Duration::from_secs(60);
        let monitor = Monitor::new(
            flow.clone(),
            ServerRecord::s3(),
            StreamingCommand::Train,
            "runs/a".to_owned(),
            minute,
        );
        let status = json(&monitor);
        assert_eq!(status["state"], "preparing");
        assert_eq!(status["limit"], Value::Null);
        let names = |of: &Value| -> Vec<String> {
            let list = of.as_array().unwrap().iter();
            list.map(|s| s["name"].as_str().unwrap().to_owned())
                .collect()
        };
        let stages = names(&status["stages"]);
        assert_eq!(
            stages.join(" "),
            "fetch untar filter shuffle decode batch encode train"
        );

        monitor.expect("steps", 0, 10);
        monitor.heartbeat();
        assert_eq!(json(&monitor)["state"], "filling");
        let (sender, _receiver) = channel::<u8>(&flow, FlowChannel::Encoded.name(), 2);
        sender.send_blocking(1, &flow.stage(Stage::Encode)).unwrap();
        let train = flow.stage(Stage::Train);
        for step in 1..=3 {
            train.add_busy(Duration::from_millis(900));
            train.add_starved(Duration::from_millis(100));
            train.add_items(4);
            flow.skip("no_image");
            monitor.step(StepFigures {
                step,
                loss: 0.5,
                lr: 1e-4,
                grad_norm: 1.0,
                endpoint_error: None,
                samples: 4 * step,
            });
        }
        monitor.checkpoint(Duration::from_millis(250));
        let status = json(&monitor);
        assert_eq!(status["state"], "running");
        assert_eq!(status["limit"], "train");
        assert_eq!(status["progress"]["done"], 3);
        assert!(status["progress"]["seconds_left"].is_number());
        assert!(status["samples_per_second"].as_f64().unwrap() > 0.0);
        assert_eq!(status["skipped"], json!({"no_image": 3}));
        assert_eq!(status["step"]["step"], 3);
        assert_eq!(status["checkpoint"]["seconds"], 0.25);
        let train = status["stages"].as_array().unwrap().last().unwrap();
        assert!(
            (train["busy"].as_f64().unwrap() - 0.9).abs() < 1e-6,
            "{train}"
        );
        assert_eq!(train["items"], 12);
        assert_eq!(
            status["channels"],
            json!([{"name": "encoded", "before": "train", "items": 1, "capacity": 2}])
        );
        monitor.stop_waiting();
        assert_eq!(json(&monitor)["state"], "finishing");
    }

    #[test]
    fn status_lists_the_stages_of_a_command() {
        let last =
            |command: StreamingCommand| command.stages().map(Stage::name).collect::<Vec<_>>();
        assert_eq!(last(StreamingCommand::Bench)[5..], ["batch", "train"]);
        assert_eq!(
            last(StreamingCommand::Precompute)[5..],
            ["batch", "encode", "write"]
        );
    }
}
