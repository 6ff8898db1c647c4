//! What a command that goes on for long has to say, a line each, on its error output.

use std::io::Write as _;

use log::{LevelFilter, Log, Metadata, Record};

/// To whoever started us; journald adds the time.
struct Words;

impl Log for Words {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Libraries have nothing to say to an operator.
        metadata.target().starts_with("pericarp")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_lowercase();
            let text = record.args().to_string();
            let text = pericarp_api::hello::printable(&text);
            // Nobody may be reading, which ends nothing.
            let _ = writeln!(std::io::stderr(), "pericarp: {level}: {text}");
        }
    }

    fn flush(&self) {}
}

/// From now on, everything from this level.
pub(crate) fn begin(verbose: bool) {
    let level = match verbose {
        true => LevelFilter::Debug,
        false => LevelFilter::Info,
    };
    if log::set_logger(&Words).is_ok() {
        log::set_max_level(level);
    }
}
