#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| coffey_pipeline::fuzzing::json(bytes));
