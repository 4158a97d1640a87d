//! MPI as a [`Collective`]: a thread that owns the library.

use std::process;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use candle_core::Tensor;

use super::{Mpi, MpiError, MpiOptions};
use crate::ranks::tensors::exchange_as_bytes;
use crate::ranks::world::World;
use crate::ranks::{Collective, ExchangeError, Outgoing, Patience, Rank, RanksError, TensorForm};

/// Time between two looks at the heartbeats while no operation is called.
const IDLE: Duration = Duration::from_millis(100);

/// A call of an operation, run by the thread that owns MPI.
type Call = Box<dyn FnOnce(&Mpi) + Send>;

/// The ranks of this job over MPI, which a thread of its own opens, calls and keeps alive: it exchanges heartbeats while other threads
/// work.
#[derive(Debug)]
pub(in crate::ranks) struct MpiRanks {
    world: World,
    calls: Sender<Call>,
}

impl MpiRanks {
    /// Opens MPI. Call it before other threads start: MPI libraries change the environment while they start.
    ///
    /// # Errors
    /// When no library is found or usable, MPI was started before in this process, the library does not see the ranks
    /// that the launcher started, MPI does not start within twice the limit, or a rank does not answer within it. A library may end the process instead:
    /// Open MPI 4 does where its launcher's daemon does not answer.
    pub(in crate::ranks) fn open(options: MpiOptions) -> Result<Self, MpiError> {
        let limit = options.limit;
        let (calls, called) = mpsc::channel::<Call>();
        let (opened, result) = mpsc::sync_channel(1);
        let own = move || {
            let mpi = match Mpi::open(&options) {
                Ok(mpi) => mpi,
                Err(error) => return drop(opened.send(Err(error))),
            };
            if opened.send(Ok(mpi.world.clone())).is_err() {
                return;
            }
            loop {
                match called.recv_timeout(IDLE) {
                    Ok(call) => call(&mpi),
                    Err(RecvTimeoutError::Timeout) => mpi.beat(),
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        };
        let thread = thread::Builder::new().name("mpi".to_owned()).spawn(own);
        thread.map_err(MpiError::Thread)?;
        // The exchange after MPI_Init has the same limit, and its own error.
        let world = match result.recv_timeout(limit.saturating_mul(2)) {
            Ok(world) => world?,
            Err(RecvTimeoutError::Timeout) => {
                let waited = limit.saturating_mul(2);
                return Err(MpiError::NotStarted { waited });
            }
            Err(RecvTimeoutError::Disconnected) => return Err(MpiError::Broken),
        };
        Ok(Self { world, calls })
    }

    /// The ranks and their nodes.
    pub(in crate::ranks) fn world(&self) -> &World {
        &self.world
    }

    /// Runs an operation on the thread that owns MPI, and waits for its result.
    fn call<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&Mpi) -> Result<T, MpiError> + Send + 'static,
    ) -> Result<T, MpiError> {
        let (answer, answered) = mpsc::sync_channel(1);
        let call = move |mpi: &Mpi| drop(answer.send(operation(mpi)));
        let broken = |_| MpiError::Broken;
        self.calls
            .send(Box::new(call))
            .map_err(|_| MpiError::Broken)?;
        answered.recv().map_err(broken)?
    }
}

impl Collective for MpiRanks {
    fn rank(&self) -> Rank {
        Rank {
            index: self.world.rank(),
            world: self.world.size(),
        }
    }

    fn gather(
        &self,
        message: Vec<u8>,
        patience: Patience,
    ) -> Result<Option<Vec<Vec<u8>>>, RanksError> {
        Ok(self.call(move |mpi| mpi.gather(message, patience))?)
    }

    fn broadcast(&self, message: Vec<u8>, patience: Patience) -> Result<Vec<u8>, RanksError> {
        Ok(self.call(move |mpi| mpi.broadcast(message, patience))?)
    }

    fn exchange(
        &self,
        sent: Outgoing,
        expected: &[Vec<TensorForm>],
        patience: Patience,
    ) -> Result<Vec<Vec<Tensor>>, ExchangeError> {
        exchange_as_bytes(self.world.rank(), sent, expected, |rows, lengths| {
            Ok(self.call(move |mpi| mpi.exchange(rows, &lengths, patience))?)
        })
    }

    fn abort(&self, code: u8) -> ! {
        let code = i32::from(code);
        let _ = self.call(move |mpi| -> Result<(), MpiError> { mpi.abort(code) });
        process::exit(code)
    }

    fn finish(&self, patience: Patience) -> Result<(), RanksError> {
        Ok(self.call(move |mpi| mpi.finish(patience))?)
    }
}
