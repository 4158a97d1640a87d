//! `coffey train`

use std::time::Duration;

use clap::Args;
use coffey_pipeline::order::Order;
use coffey_pipeline::{Stream, StreamConfig, counted};

use super::output::{check_apart, check_writable};
use super::resources::{
    DataAccess, check_memory, content, encode_devices, source_options, start_monitor,
    stream_config, train_device,
};
use super::{ConfigArgs, Failure, job};
use crate::config::Config;
use crate::device;
use crate::hub::{HubError, Push, PushError, Pushed};
use crate::latents::LatentSource;
use crate::memory::Command;
use crate::monitor::StreamingCommand;
use crate::pretrained::Components;
use crate::ranks::{Job, Rank};
use crate::signals::cancel_on_signals;
use crate::train::{self, LockWait, Outcome, RunDir, RunOptions, Services, TrainError};

/// Time within which the ranks of an earlier job end after their launcher.
const RESTART: Duration = Duration::from_secs(10);

/// Options of `coffey train`.
#[derive(Args, Debug)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    config: ConfigArgs,
}

pub(super) fn run(args: TrainArgs) -> Result<(), Failure> {
    let mut config = args.config.load()?;
    let mut job = job::join(&config)?;
    job::share_machine(&mut config, &job)?;
    let done = train(config, &mut job);
    job::end(&job, done)
}

fn train(mut config: Config, job: &mut Job) -> Result<(), Failure> {
    let cancel = cancel_on_signals()?;
    let leads = job.collective.rank().leads();
    let required = config.require_train()?;
    if config.audit.is_some() && job.collective.rank() != Rank::SOLO {
        let message = "[audit] keeps the steps of one process: leave it out, or start one rank, which makes the same numbers";
        return Err(Failure::Usage(message.into()));
    }
    let (teacher, output) = (&required.teacher, required.output.display());
    errln!("distilling {teacher} into {output}");
    device::allow_tf32(config.train.tf32);
    let train_device = train_device(&config)?;
    if let Some(how) = job.connect_devices(&train_device)? {
        errln!("{how}");
    }
    let encode_devices = encode_devices(&config)?;
    let access = DataAccess::open(source_options(&config))?;
    let destination = |place: &str| access.sources.destination(place, access.runtime.handle());
    let mut output = None;
    if leads {
        let place = &required.output;
        check_writable("train.output", place, &access)?;
        let wait = LockWait {
            limit: match job.collective.rank() {
                Rank::SOLO => Duration::ZERO,
                // A launcher may return a moment before rank 0 has ended.
                _ => RESTART,
            },
            cancel: &cancel,
            say: &|text| errln!("{text}"),
        };
        output = Some(RunDir::open(&config, place, destination, wait)?);
    }
    let push = match leads {
        true => Push::prepare(&config.hub)?,
        false => None,
    };
    if let Some(push) = &push {
        match push.check(&cancel) {
            Ok(said) => errln!("when it is done, this run {said}"),
            Err(error @ (HubError::WrongToken { .. } | HubError::Stopped)) => {
                return Err(error.into());
            }
            // The Hub may be reachable when the run is done.
            Err(error) => errln!("warning: {error}; the run goes on, and pushes when it is done"),
        }
    }
    let (monitor, _server) = start_monitor(&config, &access, StreamingCommand::Train)?;
    let models = access.until_cancelled(&cancel, || {
        access.models(&mut config, &required.teacher, Components::training)
    })?;
    errln!("opening {}", config.data.shown_shards());
    let list = access.shards(&config.data.shards)?;
    let looked_up = match leads {
        true => access.until_cancelled(&cancel, || access.look_up(&config, list.unlisted()))?,
        // Rank 0 does it for all.
        false => String::new(),
    };
    let shards = list.shards;
    errln!("{}{looked_up}", counted(shards.len(), "shard"));
    check_apart("train.output", &required.output, &shards)?;
    let latents = access.latents(&mut config, &shards)?;
    if let Some(latents) = &latents {
        latents.check(&models)?;
    }
    check_memory(
        Command::Train,
        &config,
        content(latents.as_ref()),
        Some(&models),
        Some(&train_device),
        job,
    )?;
    let runtime = access.runtime.handle();
    let stream_config = |order, batch_size| StreamConfig {
        content: content(latents.as_ref()),
        listed: latents.as_ref().map(LatentSource::listed),
        ..stream_config(&config, shards.clone(), order, batch_size)
    };
    let services = Services {
        open: Box::new(|batch_size, lanes, resume| {
            let stream = StreamConfig {
                lanes,
                resume,
                ..stream_config(Order::Shuffled, batch_size)
            };
            Stream::open(stream, &access.sources, &access.metrics, runtime)
        }),
        captions: Box::new(|batch_size| {
            let stream = stream_config(Order::Sequential, batch_size);
            Stream::open_captions(stream, &access.sources, &access.metrics, runtime)
        }),
        shards: shards.clone(),
        destination: Box::new(destination),
        monitor,
        runtime: runtime.clone(),
        cancel: cancel.clone(),
    };
    let options = RunOptions {
        config: &config,
        models: &models,
        device: &train_device,
        encode_devices: &encode_devices,
        job,
    };
    match train::run(&options, &services, output)? {
        Outcome::Done(None) => Ok(()),
        Outcome::Done(Some(output)) => {
            outln!("{}", output.display());
            push.map_or(Ok(()), |push| {
                report_push(push.run(&config, &output, &cancel))
            })
        }
        Outcome::Stopped => Err(Failure::Stopped),
    }
}

/// Prints how a push ended.
fn report_push(pushed: Result<Pushed, PushError>) -> Result<(), Failure> {
    match pushed {
        Ok(Pushed::Commit(url)) => errln!("pushed: {url}"),
        Ok(Pushed::Unchanged) => errln!("pushed: the repository holds the same already"),
        Err(PushError {
            source: HubError::Stopped,
            ..
        }) => return Err(Failure::Stopped),
        Err(error) => return Err(Failure::Failed(error.into())),
    }
    Ok(())
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Encode(crate::encode::EncodeError::Stream(error)) => (*error).into(),
            TrainError::Source(error) => error.into(),
            TrainError::Stopped => Self::Stopped,
            TrainError::Mismatch(_) => Self::Usage(error.into()),
            TrainError::Lanes(error) => error.into(),
            TrainError::Ranks(error) => error.into(),
            TrainError::Lora(error) => error.into(),
            error => Self::Failed(error.into()),
        }
    }
}
