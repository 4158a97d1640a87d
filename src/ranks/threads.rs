//! Ranks that are threads of one process, for tests.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use candle_core::Tensor;

use super::{Collective, ExchangeError, Outgoing, Patience, Rank, RanksError, TensorForm};

/// A rank that is a thread.
#[derive(Debug)]
pub(crate) struct ThreadRank {
    rank: Rank,
    /// To each rank, and from each.
    to: Vec<Sender<Vec<Vec<u8>>>>,
    from: Vec<Receiver<Vec<Vec<u8>>>>,
}

/// Runs `work` on each of `world` ranks; returns what it gave, in rank order.
pub(crate) fn on_ranks<T: Send>(world: usize, work: impl Fn(ThreadRank) -> T + Sync) -> Vec<T> {
    let mut to: Vec<Vec<_>> = (0..world).map(|_| Vec::new()).collect();
    let mut from: Vec<Vec<_>> = (0..world).map(|_| Vec::new()).collect();
    for to in &mut to {
        for from in &mut from {
            let (sender, receiver) = channel();
            to.push(sender);
            from.push(receiver);
        }
    }
    thread::scope(|scope| {
        let ranks = to.into_iter().zip(from).enumerate();
        let threads: Vec<_> = ranks
            .map(|(index, (to, from))| {
                let rank = Rank { index, world };
                let work = &work;
                scope.spawn(move || work(ThreadRank { rank, to, from }))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

impl Collective for ThreadRank {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn gather(&self, message: Vec<u8>, _: Patience) -> Result<Option<Vec<Vec<u8>>>, RanksError> {
        self.to[0].send(vec![message]).unwrap();
        let receive = |from: &Receiver<Vec<Vec<u8>>>| from.recv().unwrap().remove(0);
        Ok(self
            .rank
            .leads()
            .then(|| self.from.iter().map(receive).collect()))
    }

    fn broadcast(&self, message: Vec<u8>, _: Patience) -> Result<Vec<u8>, RanksError> {
        if self.rank.leads() {
            for to in &self.to {
                to.send(vec![message.clone()]).unwrap();
            }
        }
        Ok(self.from[0].recv().unwrap().remove(0))
    }

    fn exchange(
        &self,
        sent: Outgoing,
        expected: &[Vec<TensorForm>],
        _: Patience,
    ) -> Result<Vec<Vec<Tensor>>, ExchangeError> {
        for (rank, to) in self.to.iter().enumerate() {
            let bytes = |tensor: &Tensor| {
                let mut bytes = Vec::new();
                super::tensors::append(&mut bytes, tensor).unwrap();
                bytes
            };
            to.send(sent.row(rank).iter().map(bytes).collect()).unwrap();
        }
        let rows = self.from.iter().zip(expected).map(|(from, forms)| {
            let row = from.recv().unwrap();
            assert_eq!(row.len(), forms.len());
            let tensors = forms
                .iter()
                .zip(row)
                .map(|(form, bytes)| form.tensor(&bytes));
            tensors.collect()
        });
        Ok(rows.collect::<candle_core::Result<_>>()?)
    }

    fn abort(&self, code: u8) -> ! {
        panic!("rank {} ends the job with {code}", self.rank.index)
    }

    fn finish(&self, _: Patience) -> Result<(), RanksError> {
        Ok(())
    }
}
