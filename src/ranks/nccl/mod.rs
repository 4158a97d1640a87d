//! NCCL as a [`Collective`] between GPUs: tensors go from device memory to device memory, all else over another [`Collective`].
//!
//! Only point-to-point transfers are used, so that no algorithm of NCCL decides the order of a sum. **Never run on a GPU.**
#![allow(unsafe_code, reason = "transfers between memory of tensors")]

mod library;

use std::rc::Rc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, Device, Tensor};

use self::library::{Communicator, Nccl, Span, UniqueId};
use super::wait::Silence;
use super::{
    Collective, ExchangeError, NcclError, Outgoing, Patience, Rank, RanksError, TensorForm,
};
use crate::device;

/// The ranks of a job, whose GPUs NCCL connects.
#[derive(Debug)]
pub(super) struct NcclRanks {
    /// Carries messages, and tensors that are not in device memory.
    control: Rc<dyn Collective>,
    communicator: Communicator,
    device: CudaDevice,
}

/// How the GPUs of the ranks exchange tensors.
pub(super) enum Connected {
    /// By NCCL of this version.
    Nccl(NcclRanks, String),
    /// Through main memory, because of this.
    MainMemory(String),
}

impl NcclRanks {
    /// Connects the GPUs of all ranks, if every rank can load NCCL. Every rank calls it.
    ///
    /// # Errors
    /// When NCCL is there and fails, or a rank does not answer.
    pub(super) fn connect(
        control: Rc<dyn Collective>,
        device: &CudaDevice,
        limit: Duration,
    ) -> Result<Connected, RanksError> {
        let patience = Patience::ForLife(limit);
        let loaded = Nccl::load();
        let cause = loaded.as_ref().err().cloned().unwrap_or_default();
        let causes = control.gather(cause.into_bytes(), patience)?;
        let causes = causes.unwrap_or_default();
        let missing = causes
            .iter()
            .enumerate()
            .find(|(_, cause)| !cause.is_empty());
        let missing = missing.map(|(rank, cause)| {
            format!(
                "rank {rank} can't load NCCL ({})",
                String::from_utf8_lossy(cause)
            )
        });
        let missing = control.broadcast(missing.unwrap_or_default().into_bytes(), patience)?;
        let nccl = match loaded {
            Ok(nccl) if missing.is_empty() => nccl,
            _ => {
                let missing = String::from_utf8_lossy(&missing).into_owned();
                return Ok(Connected::MainMemory(missing));
            }
        };
        let rank = control.rank();
        let id = match rank.leads() {
            true => nccl.unique_id()?.to_bytes(),
            false => Vec::new(),
        };
        let id = control.broadcast(id, patience)?;
        let id = UniqueId::from_bytes(&id).ok_or(NcclError::Id)?;
        let version = nccl.version()?;
        let ranks = Self {
            communicator: start(nccl, id, rank, device, limit)?,
            control,
            device: device.clone(),
        };
        Ok(Connected::Nccl(ranks, version))
    }

    /// Whether a device is this rank's GPU.
    fn is_here(&self, device: &Device) -> bool {
        device.same_device(&Device::Cuda(self.device.clone()))
    }

    /// Waits until the stream has done what was submitted.
    fn wait(&self, patience: Patience) -> Result<(), ExchangeError> {
        let stream = self.device.cuda_stream();
        let done = stream.record_event(None).w()?;
        let mut silence = Silence::new();
        while !done.is_complete() {
            self.communicator.check().map_err(RanksError::from)?;
            let waited = silence.pause();
            if waited >= patience.limit() {
                self.communicator.abort();
                return Err(RanksError::from(NcclError::NoAnswer { waited }).into());
            }
        }
        Ok(())
    }
}

/// Starts NCCL on a thread of its own, because it waits for all ranks without a limit.
fn start(
    nccl: Nccl,
    id: UniqueId,
    rank: Rank,
    device: &CudaDevice,
    limit: Duration,
) -> Result<Communicator, NcclError> {
    let context = device.cuda_stream().context().clone();
    let (started, result) = mpsc::sync_channel(1);
    let start = move || {
        let bound = context.bind_to_thread().map_err(|error| NcclError::Call {
            function: "cuCtxSetCurrent",
            message: error.to_string(),
        });
        let made = bound.and_then(|()| nccl.communicator(id, rank.index, rank.world));
        drop(started.send(made));
    };
    let failed = |error: std::io::Error| NcclError::Call {
        function: "a thread for NCCL",
        message: error.to_string(),
    };
    thread::Builder::new()
        .name("nccl".to_owned())
        .spawn(start)
        .map_err(failed)?;
    match result.recv_timeout(limit) {
        Ok(made) => made,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            Err(NcclError::NotStarted { waited: limit })
        }
    }
}

impl Collective for NcclRanks {
    fn rank(&self) -> Rank {
        self.control.rank()
    }

    fn gather(
        &self,
        message: Vec<u8>,
        patience: Patience,
    ) -> Result<Option<Vec<Vec<u8>>>, RanksError> {
        self.control.gather(message, patience)
    }

    fn broadcast(&self, message: Vec<u8>, patience: Patience) -> Result<Vec<u8>, RanksError> {
        self.control.broadcast(message, patience)
    }

    fn exchange(
        &self,
        sent: Outgoing,
        expected: &[Vec<TensorForm>],
        patience: Patience,
    ) -> Result<Vec<Vec<Tensor>>, ExchangeError> {
        let Rank { index, world } = self.rank();
        let peers = || (0..world).filter(move |peer| *peer != index);
        // All ranks take the same way: one that receives in main memory expects it of all tensors, and sends none.
        let mut sent_here = peers().flat_map(|peer| sent.row(peer)).map(Tensor::device);
        let mut received_here = peers()
            .flat_map(|peer| &expected[peer])
            .map(|form| &form.device);
        if !sent_here.all(|device| self.is_here(device))
            || !received_here.all(|device| self.is_here(device))
        {
            return self.control.exchange(sent, expected, patience);
        }
        let (mut outgoing, mut incoming, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for peer in peers() {
            for tensor in sent.row(peer) {
                let tensor = tensor.contiguous()?;
                let (address, bytes) = device::cuda_place(&tensor)?;
                outgoing.push(Span {
                    peer,
                    address,
                    bytes,
                });
                kept.push(tensor);
            }
        }
        let mut rows = Vec::with_capacity(world);
        for (peer, forms) in expected.iter().enumerate() {
            if peer == index {
                rows.push(sent.row(index).to_vec());
                continue;
            }
            let mut row = Vec::with_capacity(forms.len());
            for form in forms {
                let tensor = Tensor::zeros(&form.shape, form.dtype, &form.device)?;
                let (address, bytes) = device::cuda_place(&tensor)?;
                incoming.push(Span {
                    peer,
                    address,
                    bytes,
                });
                row.push(tensor);
            }
            rows.push(row);
        }
        let stream = self.device.cuda_stream();
        // SAFETY: `kept` and `rows` hold the memory until the stream is done or the run ends; the device has one stream.
        let submitted = unsafe { self.communicator.submit(&outgoing, &incoming, &stream) };
        let done = submitted.map_err(RanksError::from);
        if let Err(error) = done
            .map_err(ExchangeError::from)
            .and_then(|()| self.wait(patience))
        {
            // Transfers may still be under way.
            std::mem::forget((kept, rows));
            return Err(error);
        }
        Ok(rows)
    }

    fn abort(&self, code: u8) -> ! {
        self.control.abort(code)
    }

    fn finish(&self, patience: Patience) -> Result<(), RanksError> {
        self.control.finish(patience)
    }
}
