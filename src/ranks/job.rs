//! The job that this process belongs to, by the launcher's environment.

use std::rc::Rc;
use std::time::Duration;

use candle_core::Device;

use super::launcher::{RankOrigin, from_environment, from_mpi_launcher, master};
use super::mpi::{ExpectedRank, MpiOptions, MpiRanks, ProcessManager};
#[cfg(feature = "cuda")]
use super::nccl::{Connected, NcclRanks};
use super::tcp::TcpRanks;
use super::world::World;
use super::{Collective, Patience, RanksError, Solo};

/// How to join a job.
#[derive(Clone, Copy)]
pub struct JobOptions<'a> {
    /// Name or path of the MPI library; `None`: the first that is found.
    pub library: Option<&'a str>,
    /// Reads a variable of the environment.
    pub get: &'a dyn Fn(&str) -> Option<String>,
    /// Time without an answer of another rank after which the job fails.
    pub limit: Duration,
    /// Tells what is waited for.
    pub say: &'a dyn Fn(String),
}

impl std::fmt::Debug for JobOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobOptions").finish_non_exhaustive()
    }
}

/// The ranks of a job, as this process sees them.
#[derive(Clone, Debug)]
pub struct Job {
    /// Connects the ranks.
    pub collective: Rc<dyn Collective>,
    /// Number of this rank among the ranks of its machine, from 0.
    pub local_rank: usize,
    /// Ranks of this machine, at least 1.
    pub local_world: usize,
    /// Ranks that share this rank's cores, at least 1.
    sharing: usize,
    /// The job, for people; empty for one process.
    pub description: String,
    /// Time without an answer of another rank after which the job fails.
    pub limit: Duration,
}

impl Job {
    /// A job of one process.
    pub fn solo() -> Self {
        Self {
            collective: Rc::new(Solo),
            local_rank: 0,
            local_world: 1,
            sharing: 1,
            description: String::new(),
            limit: Duration::ZERO,
        }
    }

    /// Joins the job that started this process: over MPI if its launcher started several processes, over TCP if its environment says so, else alone. Called before other
    /// threads are started.
    ///
    /// # Errors
    /// When MPI can't be opened or sees other ranks than the launcher started, when the ranks can't be connected, or when nothing connects
    /// them.
    pub fn join(options: &JobOptions<'_>) -> Result<Self, RanksError> {
        let manager = ProcessManager::from_environment(options.get);
        if manager == ProcessManager::Absent {
            let RankOrigin { rank, origin } = from_environment(options.get)?;
            // Every job of an array is a run of its own, and a batch script is one process.
            if rank.world == 1 || origin.contains("SLURM") {
                return Ok(Self::solo());
            }
            let Some(master) = master(options.get)? else {
                return Err(RanksError::NoTransport {
                    origin,
                    rank: rank.index,
                    world: rank.world,
                });
            };
            let tcp = TcpRanks::connect(rank, &master, options.limit, options.say)?;
            let world = tcp.world().clone();
            return Self::of(Rc::new(tcp), &world, options.limit);
        }
        let RankOrigin { rank, origin } = from_mpi_launcher(options.get)?;
        if rank.world == 1 {
            return Ok(Self::solo());
        }
        let mpi = MpiRanks::open(MpiOptions {
            library: options.library.map(str::to_owned),
            manager,
            expected: Some(ExpectedRank {
                rank: rank.index,
                world: rank.world,
                origin,
            }),
            limit: options.limit,
        })?;
        let world = mpi.world().clone();
        Self::of(Rc::new(mpi), &world, options.limit)
    }

    /// The job whose ranks `collective` connects.
    fn of(
        collective: Rc<dyn Collective>,
        world: &World,
        limit: Duration,
    ) -> Result<Self, RanksError> {
        let own = format!("{} {}", world.node().unwrap_or_default(), allowed_cores());
        let sharing = ranks_that_say(&*collective, own, limit)?;
        let (nodes, size) = (world.node_count(), world.size());
        let machines = if nodes == 1 { "machine" } else { "machines" };
        Ok(Self {
            local_rank: world.local_rank(),
            local_world: world.local_size(),
            sharing,
            description: format!("{size} ranks on {nodes} {machines}, {}", world.transport),
            collective,
            limit,
        })
    }

    /// Has the ranks exchange tensors on `device` by NCCL, if that is a GPU and all ranks can load it. Every rank calls it. Returns how
    /// they do it, for people; `None` where there is nothing to say.
    ///
    /// # Errors
    /// When NCCL is there and fails, or a rank does not answer.
    pub fn connect_devices(&mut self, device: &Device) -> Result<Option<String>, RanksError> {
        #[cfg(feature = "cuda")]
        if let (Device::Cuda(device), 2..) = (device, self.collective.rank().world) {
            let control = Rc::clone(&self.collective);
            return Ok(Some(
                match NcclRanks::connect(control, device, self.limit)? {
                    Connected::Nccl(ranks, version) => {
                        self.collective = Rc::new(ranks);
                        format!("the GPUs of the ranks are connected by NCCL {version}")
                    }
                    Connected::MainMemory(cause) => format!(
                        "gradients pass through main memory: {cause}; install libnccl2 on all machines"
                    ),
                },
            ));
        }
        let _ = device;
        Ok(None)
    }

    /// Threads for the work of this rank: its share of the cores that it may use.
    pub fn threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        (cores / self.sharing).max(1)
    }
}

/// Number of ranks that say the same as this one. A launcher that binds ranks gives each its own cores.
fn ranks_that_say(
    collective: &dyn Collective,
    own: String,
    limit: Duration,
) -> Result<usize, RanksError> {
    let patience = Patience::ForLife(limit);
    let all = collective.gather(own.clone().into_bytes(), patience)?;
    let all = all.unwrap_or_default().join(&b'\n');
    let all = collective.broadcast(all, patience)?;
    let same = all.split(|&byte| byte == b'\n');
    Ok(same.filter(|said| *said == own.as_bytes()).count().max(1))
}

/// The cores that this process may use, as Linux lists them; empty where that is not known.
fn allowed_cores() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut lines = status.lines();
    let list = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.unwrap_or_default().trim().to_owned()
}
