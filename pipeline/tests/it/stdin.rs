//! `-`: a shard on standard input.

use std::io::Write;

use crate::child::Child;
use crate::support::shard;

const AGAIN: &str = "-: standard input can be read once, and this is the second time";

#[test]
fn standard_input_is_a_shard_that_can_be_read_once() {
    let said = Child::streams("-").run_with(&shard(0, 5));
    assert_eq!(said.len(), 2, "{said:?}");
    assert_eq!(said[0], "000000000 000000001 000000002 000000003 000000004");
    assert!(said[1].starts_with(AGAIN), "{said:?}");
    assert!(said[1].contains("save it to a file"), "{said:?}");
}

#[test]
fn a_second_epoch_of_standard_input_is_an_error_after_the_first() {
    let said = Child::trains("-").run_with(&shard(0, 9));
    assert_eq!(said.len(), 1, "{said:?}");
    // What the first epoch pushed out of the shuffle buffer comes before.
    assert!(
        said[0].starts_with("after ") && !said[0].starts_with("after 0:"),
        "{said:?}"
    );
    assert!(said[0].contains(AGAIN), "{said:?}");
}

#[test]
fn gzip_on_standard_input_is_told_by_its_content() {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(&shard(0, 2)).unwrap();
    let said = Child::streams("-").run_with(&encoder.finish().unwrap());
    assert_eq!(said[0], "000000000 000000001");
}
