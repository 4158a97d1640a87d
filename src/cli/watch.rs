//! Letting others look on: `[metrics]`, for the commands that stream.

use std::time::Duration;

use coffey_pipeline::flow::Stage;

use super::Failure;
use super::data::DataAccess;
use crate::config::Config;
use crate::monitor::{Monitor, Server};

/// The monitor of a command whose last stage is `consumer`, and the server that answers from it while it is held, if the
/// configuration asks for one.
pub(super) fn watch(
    config: &Config,
    data: &DataAccess,
    consumer: Stage,
) -> Result<(Monitor, Option<Server>), Failure> {
    let timeout = Duration::from_secs(config.train.stall_timeout);
    let monitor = Monitor::new(data.metrics.clone(), consumer, timeout);
    let Some(listen) = config.metrics.listen else {
        return Ok((monitor, None));
    };
    let server = Server::start(listen.0, monitor.clone(), data.runtime.handle())
        .map_err(|error| config.refuse_listen(listen, &error))?;
    errln!("metrics at http://{}/metrics", server.address());
    Ok((monitor, Some(server)))
}
