//! What the shim has to say beside its answers: lines in the pipe that containerd reads for each
//! pod, in the form of its own log.

use std::{
    fs::File,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::fs::OFlags;

struct Pipe {
    file: Mutex<File>,
    pod: String,
}

impl Log for Pipe {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // ttrpc has a word for everything.
        metadata.level() <= Level::Warn || !metadata.target().starts_with("ttrpc")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            Level::Warn => "warning".to_owned(),
            level => level.as_str().to_lowercase(),
        };
        let line = format!(
            "time={} level={level} msg={:?} pod={} runtime={}\n",
            humantime::format_rfc3339_millis(SystemTime::now()),
            record.args().to_string(),
            self.pod,
            crate::RUNTIME
        );
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // A pipe that nobody reads is full at some time; no pod waits for that.
        let _ = file.write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Logs to the pipe `log` of the bundle from now on, or nowhere if there is none.
pub(crate) fn begin(bundle: &Path, pod: &str, debug: bool) {
    // For both, or opening waits for a reader, and a write without one ends us.
    let opened = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(bundle.join("log"));
    let Ok(file) = opened else { return };
    let pipe = Pipe {
        file: Mutex::new(file),
        pod: pod.to_owned(),
    };
    if log::set_boxed_logger(Box::new(pipe)).is_ok() {
        log::set_max_level(match debug {
            true => LevelFilter::Debug,
            false => LevelFilter::Info,
        });
    }
}
