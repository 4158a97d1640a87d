//! The record of a server: whether it has answered, and counts of requests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::metrics::{EventCounter, S3_REQUESTS, S3_RETRIES};

/// The record of a server, shared by all its readers: whether it has answered, and for S3 the counts of
/// requests. Clones share it.
#[derive(Debug, Clone)]
pub struct ServerRecord(Arc<Record>);

#[derive(Debug)]
struct Record {
    answered: AtomicBool,
    requests: EventCounter,
    retries: EventCounter,
}

/// Requests to S3 so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct S3Counts {
    /// Requests by outcome (`ok`, `not_found`, `server_error` …).
    #[serde(rename = "s3_requests")]
    pub requests: BTreeMap<String, u64>,
    /// Repeated requests by reason.
    #[serde(rename = "s3_retries")]
    pub retries: BTreeMap<String, u64>,
}

impl ServerRecord {
    /// For S3, with its requests in the metrics.
    #[must_use]
    pub fn s3() -> Self {
        Self(Arc::new(Record {
            answered: AtomicBool::new(false),
            requests: EventCounter::recorded(S3_REQUESTS, "outcome"),
            retries: EventCounter::recorded(S3_RETRIES, "reason"),
        }))
    }

    /// For HTTP servers: there is no metric for their requests.
    pub(crate) fn http() -> Self {
        Self(Arc::new(Record {
            answered: AtomicBool::new(false),
            requests: EventCounter::private(),
            retries: EventCounter::private(),
        }))
    }

    /// Requests so far.
    #[must_use]
    pub fn counts(&self) -> S3Counts {
        S3Counts {
            requests: self.0.requests.counts(),
            retries: self.0.retries.counts(),
        }
    }

    /// Records that the server answered. From then on a failed connection is a passing fault and no
    /// wrong address.
    pub(crate) fn record_response(&self) {
        self.0.answered.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_answered(&self) -> bool {
        self.0.answered.load(Ordering::Relaxed)
    }

    /// Counts a request by its outcome.
    pub(crate) fn record_request(&self, outcome: &'static str) {
        self.0.requests.add(outcome);
    }

    /// Counts a repeated request by its reason.
    pub(crate) fn record_retry(&self, reason: &'static str) {
        self.0.retries.add(reason);
    }
}

#[cfg(test)]
mod tests {
    use metrics_util::debugging::DebuggingRecorder;

    use super::*;

    #[test]
    fn server_record_counts_s3_in_the_recorder() {
        let recorder = DebuggingRecorder::new();
        let (s3, http) = (ServerRecord::s3(), ServerRecord::http());
        ::metrics::with_local_recorder(&recorder, || {
            s3.record_request("ok");
            s3.record_retry("idle");
            s3.record_retry("idle");
            http.record_request("ok");
            http.record_retry("idle");
        });
        let values = recorder.snapshotter().snapshot().into_vec();
        let names: Vec<_> = values.iter().map(|(key, ..)| key.key().name()).collect();
        assert_eq!(names, [S3_REQUESTS, S3_RETRIES]);
        assert_eq!(s3.counts().requests["ok"], 1);
        assert_eq!(s3.counts().retries["idle"], 2);
    }
}
