//! Letting others look on: `[metrics]`, for the commands that stream.

use std::time::Duration;

use super::Failure;
use super::data::DataAccess;
use crate::config::Config;
use crate::monitor::{Monitor, Server, StreamingCommand};

/// The monitor of a command, and the server that answers from it while it is held, if the configuration asks for one.
pub(super) fn watch(
    config: &Config,
    data: &DataAccess,
    command: StreamingCommand,
) -> Result<(Monitor, Option<Server>), Failure> {
    let output = match command {
        StreamingCommand::Train => config.train.output.as_ref(),
        StreamingCommand::Precompute => config.latents.as_ref().map(|latents| &latents.output),
        StreamingCommand::Bench => None,
    };
    let subject = match output {
        Some(output) => output.display().to_string(),
        None => "the data pipeline alone".to_owned(),
    };
    let timeout = Duration::from_secs(config.train.stall_timeout);
    let monitor = Monitor::new(
        data.metrics.clone(),
        data.sources.s3_server().clone(),
        command,
        subject,
        timeout,
    );
    let Some(listen) = config.metrics.listen else {
        return Ok((monitor, None));
    };
    let server = Server::start(listen.0, monitor.clone(), data.runtime.handle())
        .map_err(|error| config.refuse_listen(listen, &error))?;
    errln!("this run in a browser: http://{}/", server.address());
    errln!("metrics at http://{}/metrics", server.address());
    Ok((monitor, Some(server)))
}
