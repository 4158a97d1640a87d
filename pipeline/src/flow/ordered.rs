//! An ordered parallel map: work is spread over threads, and results come back in the order of the
//! items.
//!
//! The sender puts a ticket for each item into a bounded queue and hands the item to the workers; the
//! receiver takes tickets in turn and waits for each ticket's result. The queue's capacity bounds the
//! items in flight. Items that need no work travel in the same queue.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::Instant;

use super::channel::{Closed, Receiver, Sender, channel};
use super::clock::{FlowMetrics, StageHandle};
use crate::panic::panic_message;

enum Ticket<O> {
    Ready(O),
    Pending(async_channel::Receiver<Result<O, String>>),
}

struct WorkItem<I, O> {
    input: I,
    done: async_channel::Sender<Result<O, String>>,
}

/// The input end of a sequence. Dropping it ends the sequence; without any, the workers finish and end.
pub(crate) struct OrderedSender<I, O> {
    jobs: Sender<WorkItem<I, O>>,
    tickets: Sender<Ticket<O>>,
}

/// The output end, in order. Dropping it fails the sender.
pub(crate) struct OrderedReceiver<O> {
    tickets: Receiver<Ticket<O>>,
}

/// The names under which the two channels of an ordered map report.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OrderedNames {
    /// Items waiting for a worker.
    pub(crate) items: &'static str,
    /// Tickets.
    pub(crate) tickets: &'static str,
}

/// The two ends of one sequence of an ordered map.
pub(crate) type OrderedEnds<I, O> = (OrderedSender<I, O>, OrderedReceiver<O>);

/// The ends of every sequence of an ordered map, and its threads.
pub(crate) type OrderedMap<I, O> = (Vec<OrderedEnds<I, O>>, Vec<JoinHandle<()>>);

/// Starts `threads` workers, each with its own function from `make_work`, for `sequences` sequences with at most `window` items
/// in flight each. The workers are shared: they take the items of all sequences in the order in which they come.
///
/// `stage` is the workers' stage: its busy time is the time in `work`, and an idle worker is blocked if
/// every window is full (the consumer is slow) and starved otherwise.
///
/// # Errors
/// The system's error if a thread can't be started.
pub(crate) fn ordered_map<I, O, W>(
    metrics: &FlowMetrics,
    stage: &StageHandle,
    names: OrderedNames,
    threads: usize,
    window: usize,
    sequences: usize,
    make_work: impl Fn() -> W,
) -> std::io::Result<OrderedMap<I, O>>
where
    I: Send + 'static,
    O: Send + 'static,
    W: FnMut(I) -> O + Send + 'static,
{
    let (job_sender, job_receiver) = channel::<WorkItem<I, O>>(metrics, names.items, window);
    let ends: Vec<OrderedEnds<I, O>> = (0..sequences)
        .map(|_| {
            let (sender, tickets) = channel::<Ticket<O>>(metrics, names.tickets, window);
            let jobs = job_sender.clone();
            let sender = OrderedSender {
                jobs,
                tickets: sender,
            };
            (sender, OrderedReceiver { tickets })
        })
        .collect();
    let mut workers = Vec::with_capacity(threads);
    for index in 0..threads.max(1) {
        let jobs = job_receiver.clone();
        let tickets = ends.iter().map(|(end, _)| end.tickets.clone()).collect();
        let work = make_work();
        let stage = stage.clone();
        let worker = std::thread::Builder::new()
            .name(format!("{}-{index}", stage.name()))
            .spawn(move || run_worker(&jobs, tickets, &stage, work))?;
        workers.push(worker);
    }
    Ok((ends, workers))
}

fn run_worker<I, O>(
    jobs: &Receiver<WorkItem<I, O>>,
    tickets: Vec<Sender<Ticket<O>>>,
    stage: &StageHandle,
    mut work: impl FnMut(I) -> O,
) {
    loop {
        let start = Instant::now();
        let held_back = tickets.iter().all(Sender::is_full);
        let Some(job) = jobs.recv_untimed() else {
            return;
        };
        if held_back {
            stage.add_blocked(start.elapsed());
        } else {
            stage.add_starved(start.elapsed());
        }
        let WorkItem { input, done } = job;
        let output = stage.work(|| catch_unwind(AssertUnwindSafe(|| work(input))));
        let output = output.map_err(|payload| panic_message(payload.as_ref()));
        // Fails when the stream is ending and the receiver is gone.
        done.try_send(output).ok();
    }
}

impl<I, O> OrderedSender<I, O> {
    /// Hands `input` to the workers. Waiting for room counts as `stage` being blocked.
    pub(crate) fn send(&self, input: I, stage: &StageHandle) -> Result<(), Closed> {
        let (done, result) = async_channel::bounded(1);
        self.tickets.send_blocking(Ticket::Pending(result), stage)?;
        self.jobs.send_blocking(WorkItem { input, done }, stage)
    }

    /// Puts a finished item in the queue, behind all earlier items.
    pub(crate) fn pass(&self, output: O, stage: &StageHandle) -> Result<(), Closed> {
        self.tickets.send_blocking(Ticket::Ready(output), stage)
    }
}

impl<I, O> Drop for OrderedSender<I, O> {
    fn drop(&mut self) {
        // The workers hold other senders of the tickets.
        self.tickets.close();
    }
}

impl<O> OrderedReceiver<O> {
    /// The next item in order: `None` at the end, `Err` with a panic's message if its work panicked.
    /// Waiting counts as `stage` being starved.
    pub(crate) fn recv(&self, stage: &StageHandle) -> Option<Result<O, String>> {
        match self.tickets.recv_blocking(stage)? {
            Ticket::Ready(output) => Some(Ok(output)),
            Ticket::Pending(result) => {
                let start = Instant::now();
                let output = result.recv_blocking();
                stage.add_starved(start.elapsed());
                Some(output.unwrap_or_else(|_| Err("the worker thread ended".to_owned())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stages::Stage;

    const NAMES: OrderedNames = OrderedNames {
        items: "items",
        tickets: "tickets",
    };

    fn run(threads: usize) -> Vec<u64> {
        let metrics = FlowMetrics::new();
        let stage = metrics.stage(Stage::Decode);
        let (mut ends, workers) = ordered_map(&metrics, &stage, NAMES, threads, 6, 1, || {
            |n: u64| {
                std::thread::sleep(Duration::from_micros((n * 7919) % 300));
                n * 2
            }
        })
        .unwrap();
        let (sender, receiver) = ends.pop().unwrap();
        let feeder = std::thread::spawn(move || {
            let stage = metrics.stage(Stage::Shuffle);
            for n in 0..100 {
                if n % 10 == 3 {
                    sender.pass(n * 2, &stage).unwrap();
                } else {
                    sender.send(n, &stage).unwrap();
                }
            }
        });
        let mut results = Vec::new();
        while let Some(result) = receiver.recv(&stage) {
            results.push(result.unwrap());
        }
        feeder.join().unwrap();
        for worker in workers {
            worker.join().unwrap();
        }
        results
    }

    #[test]
    fn ordered_map_keeps_order_for_any_threads() {
        let expected: Vec<u64> = (0..100).map(|n| n * 2).collect();
        for threads in [1, 2, 7] {
            assert_eq!(run(threads), expected);
        }
    }

    #[test]
    fn ordered_map_returns_a_panic_in_order() {
        let metrics = FlowMetrics::new();
        let stage = metrics.stage(Stage::Decode);
        let (ends, _workers) = ordered_map(&metrics, &stage, NAMES, 2, 4, 1, || {
            |n: u64| assert_ne!(n, 1, "one is bad")
        })
        .unwrap();
        let (sender, receiver) = &ends[0];
        for n in 0..3 {
            sender.send(n, &stage).unwrap();
        }
        assert!(receiver.recv(&stage).unwrap().is_ok());
        let message = receiver.recv(&stage).unwrap().unwrap_err();
        assert!(message.contains("one is bad"), "{message}");
        assert!(receiver.recv(&stage).unwrap().is_ok());
    }

    #[test]
    fn ordered_sender_fails_without_a_receiver() {
        let metrics = FlowMetrics::new();
        let stage = metrics.stage(Stage::Decode);
        let (mut ends, workers) =
            ordered_map(&metrics, &stage, NAMES, 1, 2, 1, || |n: u64| n).unwrap();
        let (sender, receiver) = ends.pop().unwrap();
        drop(receiver);
        assert_eq!(sender.send(1, &stage), Err(Closed));
        drop(sender);
        for worker in workers {
            worker.join().unwrap();
        }
    }

    #[test]
    fn ordered_map_keeps_the_order_of_each_sequence() {
        let metrics = FlowMetrics::new();
        let stage = metrics.stage(Stage::Decode);
        let (ends, workers) = ordered_map(&metrics, &stage, NAMES, 3, 4, 3, || |n: u64| n).unwrap();
        let (senders, receivers): (Vec<_>, Vec<_>) = ends.into_iter().unzip();
        // The sequences are read one after another: those that wait fill their windows and hold back no other.
        let feeders: Vec<_> = senders
            .into_iter()
            .zip([100, 200, 300])
            .map(|(sender, first)| {
                let stage = stage.clone();
                std::thread::spawn(move || {
                    for n in first..first + 50 {
                        sender.send(n, &stage).unwrap();
                    }
                })
            })
            .collect();
        for (receiver, first) in receivers.iter().zip([100, 200, 300]) {
            let results = std::iter::from_fn(|| receiver.recv(&stage)).map(Result::unwrap);
            assert_eq!(
                results.collect::<Vec<_>>(),
                Vec::from_iter(first..first + 50)
            );
        }
        for thread in feeders.into_iter().chain(workers) {
            thread.join().unwrap();
        }
    }
}
