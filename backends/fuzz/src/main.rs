//! Fuzzing on any toolchain: seeds and random scripts, the same every time, or
//! the script in one file. `cargo xtask fuzz` starts it where nightly is
//! missing, and for `--replay`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use pericarp_fuzz::random::Generator;
use pericarp_fuzz::{frames, requests, rings, sessions};

const HELP: &str = "pericarp-fuzz rings|requests|frames|sessions (--seconds N | --replay FILE | --write-seeds DIR)";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ([name, option, value], true) = (
        words.as_slice().try_into().unwrap_or([""; 3]),
        words.len() == 3,
    ) else {
        eprintln!("usage: {HELP}");
        return ExitCode::from(2);
    };
    let (play, seeds): (fn(&[u8]), _) = match name {
        "rings" => (rings::play, rings::seeds()),
        "requests" => (requests::play, requests::seeds()),
        "frames" => (frames::play, frames::seeds()),
        "sessions" => (sessions::play, sessions::seeds()),
        _ => {
            eprintln!(
                "pericarp-fuzz: '{name}': no such target; use rings, requests, frames or sessions"
            );
            return ExitCode::from(2);
        }
    };
    match option {
        "--seconds" => match value.parse() {
            Ok(seconds) => random(play, seeds, Duration::from_secs(seconds)),
            Err(_) => {
                eprintln!("pericarp-fuzz: --seconds '{value}': must be a whole number; give one");
                return ExitCode::from(2);
            }
        },
        "--replay" => match std::fs::read(value) {
            Ok(script) => play(&script),
            Err(error) => {
                eprintln!(
                    "pericarp-fuzz: --replay '{value}': cannot be read ({error}); give a script"
                );
                return ExitCode::from(2);
            }
        },
        "--write-seeds" => {
            for (name, bytes) in seeds {
                if let Err(error) = std::fs::write(format!("{value}/{name}"), bytes) {
                    eprintln!("pericarp-fuzz: --write-seeds '{value}': {error}; give a directory");
                    return ExitCode::from(2);
                }
            }
        }
        _ => {
            eprintln!("usage: {HELP}");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn random(play: fn(&[u8]), seeds: Vec<(String, Vec<u8>)>, time: Duration) {
    let end = Instant::now() + time;
    // The same scripts in every run, unless other ones are asked for.
    let seed = std::env::var("PERICARP_FUZZ_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let mut generator = Generator::new(seed, seeds.into_iter().map(|(_, bytes)| bytes).collect());
    let mut count = 0u64;
    // What is being played, for whoever looks at the crash.
    let last = std::env::temp_dir().join(format!("pericarp-fuzz-{}", std::process::id()));
    while Instant::now() < end {
        let script = generator.script();
        if std::panic::catch_unwind(|| play(&script)).is_err() {
            let _ = std::fs::write(&last, &script);
            eprintln!(
                "pericarp-fuzz: script {count} failed; it is in {}",
                last.display()
            );
            std::process::exit(1);
        }
        count += 1;
    }
    println!("{count} scripts, nothing found");
}
