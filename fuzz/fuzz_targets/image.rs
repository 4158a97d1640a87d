#![no_main]

use libfuzzer_sys::fuzz_target;

// A decoder's panic is caught and counts as a damaged image: only an uncaught panic is a finding.
fuzz_target!(
    init: std::panic::set_hook(Box::new(|_| {})),
    |bytes: &[u8]| coffey_pipeline::fuzzing::image(bytes)
);
