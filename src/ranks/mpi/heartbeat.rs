//! Signs of life between rank 0 and each other rank, whatever work their main threads do.
#![allow(
    unsafe_code,
    reason = "a byte that MPI reads or writes between two polls"
)]

use std::time::{Duration, Instant};

use super::HEARTBEAT;
use super::error::MpiError;
use super::library::{MpiLibrary, Request};
use crate::ranks::wait::Silence;

/// Time between two heartbeats to a rank.
const INTERVAL: Duration = Duration::from_millis(500);
/// Time between two looks at the heartbeats of other ranks.
const LOOK: Duration = Duration::from_millis(50);
/// The most that the time between two looks counts as silence: a longer one means that this process stood still.
const GAP: Duration = Duration::from_secs(1);
/// A heartbeat, and the last one of a rank.
const BEAT: u8 = 0;
const LAST: u8 = 1;

/// The heartbeats between this rank and others: between rank 0 and all, and between another rank and rank 0.
#[derive(Debug)]
pub(super) struct Heartbeats {
    pulses: Vec<Pulse>,
    looked: Instant,
}

/// Heartbeats to and from one rank. The bytes are never freed: MPI may use them as long as the process runs.
#[derive(Debug)]
struct Pulse {
    peer: usize,
    sent: *mut u8,
    received: *mut u8,
    sending: Option<Request>,
    /// `None` after the rank's last heartbeat.
    receiving: Option<Request>,
    /// Time of the last heartbeat to the rank.
    since: Instant,
    /// Time since the rank's last heartbeat.
    silence: Duration,
}

impl Heartbeats {
    /// Expects heartbeats of the other ranks; the first to them are sent by [`Self::beat`].
    pub(super) fn new(library: &MpiLibrary, rank: usize, world: usize) -> Result<Self, MpiError> {
        let peers = if rank == 0 { 1..world } else { 0..1 };
        let pulse = |peer: usize| {
            let byte = || -> *mut u8 { Box::leak(Box::new(BEAT)) };
            let mut pulse = Pulse {
                peer,
                sent: byte(),
                received: byte(),
                sending: None,
                receiving: None,
                since: Instant::now(),
                silence: Duration::ZERO,
            };
            pulse.receive(library)?;
            Ok(pulse)
        };
        Ok(Self {
            pulses: peers.map(pulse).collect::<Result<_, _>>()?,
            looked: Instant::now(),
        })
    }

    /// Sends the heartbeats that are due and looks at those that have come. Returns at once.
    pub(super) fn beat(&mut self, library: &MpiLibrary) -> Result<(), MpiError> {
        let gap = self.looked.elapsed();
        if gap < LOOK {
            return Ok(());
        }
        self.looked = Instant::now();
        for pulse in &mut self.pulses {
            pulse.silence += gap.min(GAP);
            pulse.look(library)?;
            if pulse.sending.is_none() && pulse.since.elapsed() >= INTERVAL {
                pulse.send(library, BEAT)?;
            }
        }
        Ok(())
    }

    /// Time since the last heartbeat of a rank; without an end for a rank that sends none to this one.
    pub(super) fn silence(&self, rank: usize) -> Duration {
        let pulse = self.pulses.iter().find(|pulse| pulse.peer == rank);
        pulse.map_or(Duration::MAX, |pulse| pulse.silence)
    }

    /// Exchanges the last heartbeats: no transfer is in flight after them. Every rank calls it. Returns the ranks that do not answer for
    /// `limit`.
    pub(super) fn close(
        &mut self,
        library: &MpiLibrary,
        limit: Duration,
    ) -> Result<Vec<usize>, MpiError> {
        let mut silence = Silence::new();
        let mut open: Vec<&mut Pulse> = self.pulses.iter_mut().collect();
        let mut last_sent = vec![false; open.len()];
        loop {
            let mut ended = true;
            for (pulse, last_sent) in open.iter_mut().zip(&mut last_sent) {
                pulse.look(library)?;
                if pulse.sending.is_none() && !*last_sent {
                    pulse.send(library, LAST)?;
                    *last_sent = true;
                }
                ended &= *last_sent && pulse.sending.is_none() && pulse.receiving.is_none();
            }
            if ended {
                return Ok(Vec::new());
            }
            if silence.pause() >= limit {
                let missing = open.iter().filter(|pulse| pulse.receiving.is_some());
                return Ok(missing.map(|pulse| pulse.peer).collect());
            }
        }
    }
}

impl Pulse {
    /// Ends the transfers that are done, and expects the next heartbeat.
    fn look(&mut self, library: &MpiLibrary) -> Result<(), MpiError> {
        if let Some(request) = &mut self.sending
            && library.test(request)?.is_some()
        {
            self.sending = None;
        }
        while let Some(request) = &mut self.receiving
            && library.test(request)?.is_some()
        {
            self.receiving = None;
            self.silence = Duration::ZERO;
            // SAFETY: the byte is never freed, and no transfer uses it now.
            if unsafe { *self.received } == LAST {
                break;
            }
            self.receive(library)?;
        }
        Ok(())
    }

    /// Sends a heartbeat. None may be in flight.
    fn send(&mut self, library: &MpiLibrary, beat: u8) -> Result<(), MpiError> {
        // SAFETY: the byte is never freed, and no transfer uses it now; it is not written to before the request has ended.
        self.sending = Some(unsafe {
            *self.sent = beat;
            library.send(self.sent, 1, HEARTBEAT.with(self.peer))
        }?);
        self.since = Instant::now();
        Ok(())
    }

    fn receive(&mut self, library: &MpiLibrary) -> Result<(), MpiError> {
        // SAFETY: the byte is never freed, and nothing reads it before the request has ended.
        let request = unsafe { library.receive(self.received, 1, HEARTBEAT.with(self.peer)) }?;
        self.receiving = Some(request);
        Ok(())
    }
}
