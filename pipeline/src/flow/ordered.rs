//! An ordered parallel map: work is spread over threads, results come back in the order it was given.
//!
//! The sender puts a ticket for every item into a bounded queue and the item itself before the
//! workers; the receiver takes tickets in turn and waits for each one's result. The queue's bound is
//! the bound on what is in flight. Items that need no work travel in the same queue.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::Instant;

use super::channel::{Closed, Receiver, Sender, channel};
use super::metrics::{FlowMetrics, StageHandle};
use super::panic_message;

enum Ticket<O> {
    Ready(O),
    Pending(async_channel::Receiver<Result<O, String>>),
}

struct Job<I, O> {
    input: I,
    done: async_channel::Sender<Result<O, String>>,
}

/// Where work goes in. Dropping it lets the workers finish and end.
pub(crate) struct OrderedSender<I, O> {
    jobs: Sender<Job<I, O>>,
    tickets: Sender<Ticket<O>>,
}

/// Where results come out, in order. Dropping it fails the sender.
pub(crate) struct OrderedReceiver<O> {
    tickets: Receiver<Ticket<O>>,
}

/// The two ends of an ordered map, and its threads.
pub(crate) type OrderedMap<I, O> = (OrderedSender<I, O>, OrderedReceiver<O>, Vec<JoinHandle<()>>);

/// Starts `threads` workers, each applying a function that `make_work` makes for it, with at most
/// `window` items in flight.
///
/// `stage` is the workers' stage: its busy time is the time in `work`, and a worker without a job is
/// blocked if the window is full (the consumer is slow) and starved otherwise.
///
/// # Errors
/// The system's error if a thread can't be started.
pub(crate) fn ordered_map<I, O, W>(
    metrics: &FlowMetrics,
    stage: &StageHandle,
    threads: usize,
    window: usize,
    make_work: impl Fn() -> W,
) -> std::io::Result<OrderedMap<I, O>>
where
    I: Send + 'static,
    O: Send + 'static,
    W: FnMut(I) -> O + Send + 'static,
{
    let (job_sender, job_receiver) = channel::<Job<I, O>>(metrics, "decode", window);
    let (ticket_sender, ticket_receiver) = channel::<Ticket<O>>(metrics, "decoded", window);
    let mut workers = Vec::with_capacity(threads);
    for index in 0..threads.max(1) {
        let jobs = job_receiver.clone();
        let tickets = ticket_sender.clone();
        let work = make_work();
        let stage = stage.clone();
        let worker = std::thread::Builder::new()
            .name(format!("{stage}-{index}", stage = stage.stage()))
            .spawn(move || run_worker(&jobs, &tickets, &stage, work))?;
        workers.push(worker);
    }
    let sender = OrderedSender {
        jobs: job_sender,
        tickets: ticket_sender,
    };
    let receiver = OrderedReceiver {
        tickets: ticket_receiver,
    };
    Ok((sender, receiver, workers))
}

fn run_worker<I, O>(
    jobs: &Receiver<Job<I, O>>,
    tickets: &Sender<Ticket<O>>,
    stage: &StageHandle,
    mut work: impl FnMut(I) -> O,
) {
    loop {
        let start = Instant::now();
        let held_back = tickets.is_full();
        let Some(job) = jobs.recv_untimed() else {
            return;
        };
        if held_back {
            stage.add_blocked(start.elapsed());
        } else {
            stage.add_starved(start.elapsed());
        }
        let Job { input, done } = job;
        let output = stage.work(|| catch_unwind(AssertUnwindSafe(|| work(input))));
        let output = output.map_err(|payload| panic_message(payload.as_ref()));
        // Nobody waits for it any more when the stream is ending.
        let _ended = done.try_send(output);
    }
}

impl<I, O> OrderedSender<I, O> {
    /// Gives `input` to the workers. Waiting for room counts as `stage` being blocked.
    pub(crate) fn send(&self, input: I, stage: &StageHandle) -> Result<(), Closed> {
        let (done, result) = async_channel::bounded(1);
        self.tickets.send_blocking(Ticket::Pending(result), stage)?;
        self.jobs.send_blocking(Job { input, done }, stage)
    }

    /// Puts a finished item in the queue, behind everything given before.
    pub(crate) fn pass(&self, output: O, stage: &StageHandle) -> Result<(), Closed> {
        self.tickets.send_blocking(Ticket::Ready(output), stage)
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
    use super::super::metrics::Stage;
    use super::*;
    use std::time::Duration;

    fn run(threads: usize) -> Vec<u64> {
        let metrics = FlowMetrics::new();
        let stage = metrics.stage(Stage::Decode);
        let (sender, receiver, workers) = ordered_map(&metrics, &stage, threads, 6, || {
            |n: u64| {
                std::thread::sleep(Duration::from_micros((n * 7919) % 300));
                n * 2
            }
        })
        .unwrap();
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
    fn results_keep_their_order_whatever_the_threads() {
        let expected: Vec<u64> = (0..100).map(|n| n * 2).collect();
        for threads in [1, 2, 7] {
            assert_eq!(run(threads), expected);
        }
    }

    #[test]
    fn a_panic_is_an_error_in_its_place() {
        let metrics = FlowMetrics::new();
        let stage = metrics.stage(Stage::Decode);
        let (sender, receiver, _workers) = ordered_map(&metrics, &stage, 2, 4, || {
            |n: u64| assert_ne!(n, 1, "one is bad")
        })
        .unwrap();
        for n in 0..3 {
            sender.send(n, &stage).unwrap();
        }
        assert!(receiver.recv(&stage).unwrap().is_ok());
        let message = receiver.recv(&stage).unwrap().unwrap_err();
        assert!(message.contains("one is bad"), "{message}");
        assert!(receiver.recv(&stage).unwrap().is_ok());
    }

    #[test]
    fn a_gone_receiver_stops_the_sender() {
        let metrics = FlowMetrics::new();
        let stage = metrics.stage(Stage::Decode);
        let (sender, receiver, workers) =
            ordered_map(&metrics, &stage, 1, 2, || |n: u64| n).unwrap();
        drop(receiver);
        assert_eq!(sender.send(1, &stage), Err(Closed));
        drop(sender);
        for worker in workers {
            worker.join().unwrap();
        }
    }
}
