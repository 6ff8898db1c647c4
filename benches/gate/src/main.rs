//! `pericarp-gate`: runs one piece of the data plane, for `cargo xtask bench
//! regress`. A developer has little reason to start it by hand.

use std::io::{Write, stdout};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pericarp_gate::{ALL, Entry, Piece};

const HELP: &str = "\
pericarp-gate list              every piece, and the requests of one turn
pericarp-gate run PIECE TURNS   that many turns, in a function called measured:
                                for callgrind --toggle-collect=*measured*
pericarp-gate time PIECE MS     nanoseconds per request, in the fastest millisecond of so many
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let answer = match words.as_slice() {
        ["--help"] => Ok(HELP.to_owned()),
        ["list"] => Ok(ALL
            .iter()
            .map(|entry| format!("{} {}\n", entry.name, entry.count))
            .collect()),
        [what @ ("run" | "time"), name, number] => task(what, name, number),
        _ => Err("use list, run PIECE TURNS or time PIECE MS; see --help".to_owned()),
    };
    match answer {
        Ok(text) => {
            // Whoever closed the pipe has what he wanted.
            let _ = stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(mistake) => {
            eprintln!("pericarp-gate: {mistake}");
            ExitCode::from(2)
        }
    }
}

fn task(what: &str, name: &str, number: &str) -> Result<String, String> {
    let entry = ALL.iter().find(|entry| entry.name == name);
    let entry = entry.ok_or(format!("'{name}': no such piece; see pericarp-gate list"))?;
    let number = number.parse().ok().filter(|n| (1..=1_000_000).contains(n));
    let number = number.ok_or("the number must be from 1 to 1000000".to_owned())?;
    let mut piece = entry.make();
    if what == "time" {
        return Ok(format!("{:.3}\n", fastest(entry, piece.as_mut(), number)));
    }
    for _ in 0..number {
        piece.prepare();
        measured(piece.as_mut());
    }
    Ok(String::new())
}

/// Callgrind counts in here only.
#[inline(never)]
fn measured(piece: &mut dyn Piece) {
    piece.run();
}

/// Nanoseconds per request in the fastest of `slices` milliseconds: what
/// others do on this machine slows most of them, and seldom all.
fn fastest(entry: &Entry, piece: &mut dyn Piece, slices: u64) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..slices {
        let (mut took, mut turns) = (Duration::ZERO, 0);
        while took < Duration::from_millis(1) {
            piece.prepare();
            let start = Instant::now();
            measured(piece);
            took += start.elapsed();
            turns += 1;
        }
        best = best.min(took.as_nanos() as f64 / (turns * entry.count) as f64);
    }
    best
}
