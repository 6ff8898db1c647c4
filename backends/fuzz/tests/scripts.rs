//! The committed scripts and as many random ones as fit a test run, counted by
//! executions so that every machine plays the same. `corpus/` holds the seeds
//! and one file for each fault the fuzzer found.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::path::Path;

use pericarp_fuzz::random::Generator;
use pericarp_fuzz::{frames, requests, rings, sessions};

fn corpus(target: &str, play: fn(&[u8]), seeds: Vec<(String, Vec<u8>)>) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    for (name, bytes) in seeds {
        let committed = std::fs::read(dir.join(&name)).unwrap_or_default();
        assert_eq!(
            committed, bytes,
            "{name}: write the seeds again (--write-seeds)"
        );
    }
    let mut paths: Vec<_> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    paths.sort();
    let scripts: Vec<Vec<u8>> = paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    for (path, script) in paths.iter().zip(&scripts) {
        eprintln!("{}", path.display());
        play(script);
    }
    scripts
}

fn random(scripts: Vec<Vec<u8>>, count: usize, play: fn(&[u8])) {
    let mut generator = Generator::new(7, scripts);
    for _ in 0..count {
        let script = generator.script();
        if std::panic::catch_unwind(|| play(&script)).is_err() {
            panic!("this script: {script:?}");
        }
    }
}

/// Random scripts of `rings`, and a fraction of that of the others, which
/// take longer; `cargo xtask asan` asks for fewer.
fn count() -> usize {
    let asked = std::env::var("PERICARP_FUZZ_SCRIPTS").ok();
    asked.map_or(100_000, |count| count.parse().unwrap())
}

/// One test: the later parts count descriptors of the whole process.
#[test]
fn rings_then_requests_then_frames_then_sessions() {
    let scripts = corpus("rings", rings::play, rings::seeds());
    random(scripts, count(), rings::play);
    let scripts = corpus("requests", requests::play, requests::seeds());
    random(scripts, count() / 20, requests::play);
    let scripts = corpus("frames", frames::play, frames::seeds());
    random(scripts, count() / 10, frames::play);
    let scripts = corpus("sessions", sessions::play, sessions::seeds());
    random(scripts, count() * 3 / 200, sessions::play);
}
