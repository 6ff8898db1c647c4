//! libFuzzer's way into [`pericarp_fuzz::frames`]; `cargo xtask fuzz` builds and
//! runs it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pericarp_fuzz::frames::play(bytes));
