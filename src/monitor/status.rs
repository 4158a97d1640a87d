//! What the page shows, as JSON. It belongs to the page, and changes with it: scripts read `/metrics`.

use std::collections::BTreeMap;
use std::time::Instant;

use coffey_pipeline::flow::{FlowSnapshot, Stage, StageSnapshot};
use serde::Serialize;

use super::history::{Curves, Mark};
use super::{Command, Goal, Monitor, NOT_WAITING, Seen, Stalled, StepFigures};

/// One event for the page: how the run is now, and what its curves have grown by.
#[derive(Debug, Serialize)]
pub(super) struct Update<'a> {
    pub(super) status: &'a Status,
    pub(super) curves: Curves,
}

/// How the run is at one moment.
#[derive(Debug, Serialize)]
pub(super) struct Status {
    version: &'static str,
    command: Command,
    /// What the command makes.
    subject: String,
    state: State,
    /// Since the command began.
    seconds: f64,
    progress: Option<Progress>,
    /// Of the last stage, lately.
    samples_per_second: f64,
    /// The stage that holds the rest back, as the progress line has it.
    limit: Option<Stage>,
    stalled: Option<Stalled>,
    stages: Vec<StageStatus>,
    /// In the order of the data.
    channels: Vec<ChannelStatus>,
    /// Counts of this process.
    skipped: BTreeMap<String, u64>,
    s3_requests: BTreeMap<String, u64>,
    s3_retries: BTreeMap<String, u64>,
    step: Option<StepFigures>,
    checkpoint: Option<CheckpointStatus>,
    /// Step of the newest validation grid.
    grid: Option<u64>,
}

/// What a command is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// Models are loaded, figures of the teacher taken.
    Preparing,
    /// The first batch is waited for.
    Filling,
    /// Batches come.
    Running,
    /// None has come for too long.
    Stalled,
    /// The last one came: results are written.
    Finishing,
}

#[derive(Debug, Serialize)]
struct Progress {
    unit: &'static str,
    done: u64,
    total: u64,
    seconds_left: Option<f64>,
}

/// One stage lately: over the last half minute or eight batches, whichever is longer.
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
    /// The stage that takes from it.
    before: Stage,
    items: u64,
    capacity: u64,
}

#[derive(Debug, Serialize)]
struct CheckpointStatus {
    /// How long saving took.
    seconds: f64,
    seconds_ago: f64,
}

impl Monitor {
    /// How the run is now.
    pub(super) fn status(&self) -> Status {
        let shared = &*self.0;
        let (command, stalled) = (shared.command, self.stalled());
        let waiting = shared.since.load(std::sync::atomic::Ordering::Relaxed) != NOT_WAITING;
        let flow = shared.flow.snapshot();
        let seen = &*self.seen();
        let now = Instant::now();

        // Shares are from mark to mark, as a wait is counted when it ends; speeds go down at once when nothing comes.
        let shares = seen.recent.window().unwrap_or(&flow);
        let lately = seen.recent.until(&flow);
        let speeds = lately.as_ref().unwrap_or(&flow);
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
        Status {
            version: env!("CARGO_PKG_VERSION"),
            command,
            subject: shared.subject.clone(),
            state: state(seen, waiting, stalled),
            seconds: (now - shared.begun).as_secs_f64(),
            progress: seen.goal.as_ref().map(|goal| progress(goal, now)),
            samples_per_second: per_second(speeds.stage(command.consumer()).items, speeds),
            limit: seen.recent.limit(),
            stalled,
            stages: command.stages().map(stage).collect(),
            channels: channels(command, &flow),
            skipped: flow.skipped.clone(),
            s3_requests: flow.s3_requests.clone(),
            s3_retries: flow.s3_retries.clone(),
            step: seen.step,
            checkpoint: seen.checkpoint.map(|checkpoint| CheckpointStatus {
                seconds: checkpoint.took.as_secs_f64(),
                seconds_ago: (now - checkpoint.saved).as_secs_f64(),
            }),
            grid: seen.grid.as_ref().map(|grid| grid.step),
        }
    }

    /// What the curves have grown by since `mark`, which moves on.
    pub(super) fn curves(&self, mark: &mut Mark) -> Curves {
        self.seen().history.since(mark)
    }
}

fn state(seen: &Seen, waiting: bool, stalled: Option<Stalled>) -> State {
    match (seen.streams, waiting) {
        _ if stalled.is_some() => State::Stalled,
        (false, _) => State::Preparing,
        (true, false) => State::Finishing,
        (true, true) if seen.recent.started() => State::Running,
        (true, true) => State::Filling,
    }
}

fn progress(goal: &Goal, now: Instant) -> Progress {
    Progress {
        unit: goal.unit,
        done: goal.done,
        total: goal.total,
        seconds_left: goal.left(now).map(|left| left.as_secs_f64()),
    }
}

fn per_second(count: u64, over: &FlowSnapshot) -> f64 {
    match over.seconds > 0.0 {
        true => count as f64 / over.seconds,
        false => 0.0,
    }
}

/// The channels there are, each with the stage behind it.
fn channels(command: Command, flow: &FlowSnapshot) -> Vec<ChannelStatus> {
    let consumer = command.consumer();
    let behind_batches = match command {
        Command::Bench => consumer,
        Command::Train | Command::Precompute => Stage::Encode,
    };
    [
        ("chunks", Stage::Untar),
        ("samples", Stage::Shuffle),
        ("decode", Stage::Decode),
        ("decoded", Stage::Batch),
        ("batches", behind_batches),
        ("encode", Stage::Encode),
        ("encoded", consumer),
    ]
    .into_iter()
    .filter_map(|(name, before)| {
        let channel = flow.channels.get(name)?;
        Some(ChannelStatus {
            name,
            before,
            items: channel.items,
            capacity: channel.capacity,
        })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffey_pipeline::FlowMetrics;
    use coffey_pipeline::flow::channel;
    use serde_json::{Value, json};
    use std::time::Duration;

    fn json(monitor: &Monitor) -> Value {
        serde_json::to_value(monitor.status()).unwrap()
    }

    #[test]
    fn the_page_is_told_what_there_is_from_the_first_second_on() {
        let flow = FlowMetrics::new();
        let minute = Duration::from_secs(60);
        let monitor = Monitor::new(flow.clone(), Command::Train, "runs/a".to_owned(), minute);
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
        monitor.beat();
        assert_eq!(json(&monitor)["state"], "filling");
        let (sender, _receiver) = channel::<u8>(&flow, "encoded", 2);
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
        monitor.rest();
        assert_eq!(json(&monitor)["state"], "finishing");
    }

    #[test]
    fn each_command_has_its_own_stages() {
        let last = |command: Command| command.stages().map(Stage::name).collect::<Vec<_>>();
        assert_eq!(last(Command::Bench)[5..], ["batch", "train"]);
        assert_eq!(last(Command::Precompute)[5..], ["batch", "encode", "write"]);
    }
}
