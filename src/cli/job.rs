//! The ranks of a job: how a command joins them, shares their machine, and ends.

use std::time::Duration;

use super::Failure;
use crate::config::{Config, DeviceSpec, Listen};
use crate::print;
use crate::ranks::{Job, JobOptions, Patience, Rank};

/// Joins the job of this process's launcher. Ranks other than 0 print errors and warnings alone.
pub(super) fn join(config: &Config) -> Result<Job, Failure> {
    let job = Job::join(&JobOptions {
        library: config.mpi.library.as_deref(),
        get: &|name| std::env::var(name).ok(),
        limit: Duration::from_secs(config.train.stall_timeout),
        say: &|text| errln!("{text}"),
    })?;
    let rank = job.collective.rank();
    if !rank.leads() {
        print::be_quiet(format!("rank {}: ", rank.index));
    }
    if rank.world > 1 {
        errln!("{}", job.description);
    }
    Ok(job)
}

/// Divides the cores, the CUDA devices and the monitor's ports between the ranks of this machine.
pub(super) fn share_machine(config: &mut Config, job: &Job) -> Result<(), Failure> {
    if job.collective.rank() == Rank::SOLO {
        return Ok(());
    }
    let threads = job.threads();
    if !config.is_written("data.decode_threads") {
        config.data.decode_threads = threads;
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|error| Failure::Failed(error.into()))?;
    let devices = config.encode.devices.iter_mut();
    for device in devices.chain([&mut config.train.device]) {
        if let DeviceSpec::Cuda(ordinal) = device {
            *ordinal += job.local_rank;
        }
    }
    if let Some(Listen(address)) = &mut config.metrics.listen
        && address.port() > 0
    {
        address.set_port(address.port().saturating_add(job.local_rank as u16));
    }
    Ok(())
}

/// Ends the job as this rank's work has ended: together with the others, or all of them after an error.
pub(super) fn end(job: &Job, done: Result<(), Failure>) -> Result<(), Failure> {
    match done {
        Ok(()) | Err(Failure::Stopped) => {
            // The others wait until rank 0 has written everything.
            job.collective.finish(Patience::ForLife(job.limit))?;
            done
        }
        Err(failure) if job.collective.rank() != Rank::SOLO => {
            // The other ranks can't go on without this one.
            failure.print();
            job.collective.abort(failure.code())
        }
        Err(failure) => Err(failure),
    }
}
