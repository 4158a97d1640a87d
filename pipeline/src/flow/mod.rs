//! The stage harness: bounded channels, an ordered parallel map, and the time each stage worked and
//! waited.
//!
//! Each step of a run is a stage with an index and a name. Stages are joined by bounded channels only,
//! so a slow stage holds back the stages before it and memory stays flat. A stage records its items
//! and how long it worked, waited for input (*starved*) and waited for room in its output (*blocked*);
//! the stage that waits least limits the run.
//!
//! This room knows no stage and no channel by name; [`stages`](crate::stages) lists both. It never
//! touches shards, images or the network.

mod channel;
mod clock;
mod ordered;
mod recent;
mod snapshot;
mod weighted;

pub use channel::{Closed, Receiver, Sender, channel};
pub use clock::{FlowMetrics, Moment, StageHandle};
pub use recent::Recent;
pub use snapshot::{ChannelSnapshot, FlowSnapshot, StageSnapshot};

pub(crate) use ordered::{OrderedNames, OrderedReceiver, OrderedSender, ordered_map};
pub(crate) use weighted::{WeightedReceiver, WeightedSender, weighted_channel};
