//! `/metrics`: the process's recorder, and the values that are read when they are asked for.

use std::sync::OnceLock;

use coffey_pipeline::metrics::{STALLED, describe};
use metrics::{gauge, set_global_recorder, with_local_recorder};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use super::Monitor;

/// `Content-Type` of Prometheus's text format.
pub(super) const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A recorder that knows the help of every metric.
fn recorder() -> PrometheusRecorder {
    let recorder = PrometheusBuilder::new().build_recorder();
    with_local_recorder(&recorder, describe);
    recorder
}

/// The recorder of the process's events; installed by the first call.
///
/// If the process has another recorder, events go there and `/metrics` lacks them.
pub(super) fn event_recorder() -> &'static PrometheusHandle {
    static EVENTS: OnceLock<PrometheusHandle> = OnceLock::new();
    EVENTS.get_or_init(|| {
        let recorder = recorder();
        let handle = recorder.handle();
        set_global_recorder(recorder).ok();
        handle
    })
}

impl Monitor {
    /// The text of `/metrics`: events so far, and the stages, channels and health as they are now.
    pub(super) fn prometheus(&self) -> String {
        // A new recorder: a closed channel must not leave its last fill behind.
        let now = recorder();
        let (flow, stalled) = (self.flow().snapshot(), self.stalled().is_some());
        with_local_recorder(&now, || {
            flow.export();
            gauge!(STALLED).set(f64::from(u8::from(stalled)));
        });
        event_recorder().render() + &now.handle().render()
    }
}
