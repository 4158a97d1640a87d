//! The URL `-`: a shard on standard input.

use std::io::Write;

use crate::child::Child;
use crate::support::shard;

const AGAIN: &str = "-: standard input can be read once, and this is the second time";

#[test]
fn stdin_shard_can_be_read_once() {
    let printed = Child::streams("-").run_with(&shard(0, 5));
    assert_eq!(printed.len(), 2, "{printed:?}");
    assert_eq!(
        printed[0],
        "000000000 000000001 000000002 000000003 000000004"
    );
    assert!(printed[1].starts_with(AGAIN), "{printed:?}");
    assert!(printed[1].contains("save it to a file"), "{printed:?}");
}

#[test]
fn stdin_second_epoch_is_an_error() {
    let printed = Child::trains("-").run_with(&shard(0, 9));
    assert_eq!(printed.len(), 1, "{printed:?}");
    // The batches that the first epoch pushed out of the shuffle buffer come before the error.
    assert!(
        printed[0].starts_with("after ") && !printed[0].starts_with("after 0:"),
        "{printed:?}"
    );
    assert!(printed[0].contains(AGAIN), "{printed:?}");
}

#[test]
fn stdin_gzip_is_told_by_content() {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(&shard(0, 2)).unwrap();
    let printed = Child::streams("-").run_with(&encoder.finish().unwrap());
    assert_eq!(printed[0], "000000000 000000001");
}
