//! The stage harness: bounded channels, an ordered parallel map, and the times every stage reports.
//!
//! Whatever runs in the pipeline (and in the trainer behind it) is a [`Stage`]. Stages are joined by
//! bounded channels only, so a slow stage holds back the ones before it and memory stays flat. Each
//! records what it did and how long it worked, waited for input (*starved*) and waited for room in
//! its output (*blocked*): together these say which stage limits the whole.
//!
//! Nothing here knows about shards, images or S3.

mod cancel;
mod channel;
mod metrics;
mod ordered;
mod recent;
mod snapshot;
mod weighted;

pub use channel::{Closed, Receiver, Sender, channel};
pub use metrics::{FlowMetrics, Moment, Stage, StageHandle};
pub use recent::Recent;
pub use snapshot::{ChannelSnapshot, FlowSnapshot, StageSnapshot};

pub(crate) use cancel::Cancel;
pub(crate) use ordered::{OrderedReceiver, OrderedSender, ordered_map};
pub(crate) use weighted::{WeightedReceiver, WeightedSender, weighted_channel};

use std::any::Any;

/// The message of a caught panic, for an error text.
pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without a message".to_owned()
    }
}
