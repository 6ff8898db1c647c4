//! What is done to a pod and in it, as JSON lines for who keeps watch: one file for all pods of a
//! node's profiles that ask for it, which is set aside when it is large.
//!
//! Told by `pod`, before what a line says is done, or where a guest is heard. A thread writes them in
//! that order, so that a directory which does not answer (a dead server, somebody who keeps the file
//! locked) holds up nothing. What cannot be written is a line in the log, and nobody waits.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        mpsc::{
            Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, channel, sync_channel,
        },
    },
    thread,
    time::{Duration, SystemTime},
};

use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

const FILE: &str = "audit.jsonl";
const OLD: &str = "audit.jsonl.old";
/// Set aside when larger; what was set aside before goes then.
const LARGE: u64 = 64 << 20;
/// Another shim may be setting it aside.
const TRIES: u32 = 8;
/// Lines that wait to be written; a container with all its mounts is some dozens.
const MOST: usize = 1024;
/// For those that are left when the shim leaves.
const LAST_LIMIT: Duration = Duration::from_secs(2);

/// The stream of one pod.
#[derive(Debug, Default)]
pub(crate) struct Audit {
    begun: Mutex<Option<Begun>>,
}

#[derive(Debug)]
struct Begun {
    stream: Stream,
    /// Ends when all lines have been written, once nobody has the stream.
    written: Receiver<()>,
}

#[derive(Debug, Clone)]
struct Stream {
    namespace: String,
    id: String,
    name: String,
    lines: SyncSender<String>,
}

impl Audit {
    /// Begins, if the pod's profile has a directory for it.
    pub(crate) fn begin(&self, directory: Option<&Path>, namespace: &str, id: &str, name: &str) {
        let begun = directory.map(|directory| {
            let (lines, said) = sync_channel(MOST);
            let (end, written) = channel();
            let directory = directory.to_owned();
            let write = move || write_all(&directory, &said, end);
            if let Err(error) = thread::Builder::new().name("audit".into()).spawn(write) {
                log::error!("audit: a thread: {error}");
            }
            let stream = Stream {
                namespace: namespace.to_owned(),
                id: id.to_owned(),
                name: name.to_owned(),
                lines,
            };
            Begun { stream, written }
        });
        *self.begun() = begun;
    }

    fn begun(&self) -> MutexGuard<'_, Option<Begun>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that this happens to a container, or to the pod.
    pub(crate) fn tell(&self, event: &str, container: Option<&str>, more: Value) {
        let stream = self.begun().as_ref().map(|begun| begun.stream.clone());
        let Some(stream) = stream else {
            return;
        };
        let mut object = json!({
            "time": humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            "event": event,
            "namespace": stream.namespace,
            "pod": stream.name,
            "pod_id": stream.id,
        });
        if let Some(container) = container {
            object["container_id"] = container.into();
        }
        for (key, value) in more.as_object().into_iter().flatten() {
            object[key] = value.clone();
        }
        match stream.lines.try_send(format!("{object}\n")) {
            Ok(()) => {}
            Err(TrySendError::Full(line)) => {
                log::warn!(
                    "audit: {MOST} lines wait already, not written: {}",
                    line.trim_end()
                );
            }
            Err(TrySendError::Disconnected(line)) => {
                log::warn!("audit: nobody writes: {}", line.trim_end());
            }
        }
    }

    /// Waits a moment until everything has been written. Nothing more is.
    pub(crate) fn finish(&self) {
        let Some(Begun { stream, written }) = self.begun().take() else {
            return;
        };
        drop(stream);
        if written.recv_timeout(LAST_LIMIT) == Err(RecvTimeoutError::Timeout) {
            log::warn!("audit: the last lines are not written: the directory does not answer");
        }
    }
}

/// Writes what comes; `end` goes with this.
fn write_all(directory: &Path, lines: &Receiver<String>, end: Sender<()>) {
    for line in lines {
        if let Err(error) = append(directory, &line, LARGE) {
            let line = line.trim_end();
            log::warn!("audit: {}: {error}: {line}", directory.display());
        }
    }
    drop(end);
}

fn append(directory: &Path, line: &str, large: u64) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let path = directory.join(FILE);
    for _ in 0..TRIES {
        let mut file = open(&path)?;
        if file.metadata()?.len() < large {
            // In one piece, behind what others write.
            return file.write_all(line.as_bytes());
        }
        flock(&file, FlockOperation::LockExclusive)?;
        let number = |found: fs::Metadata| (found.dev(), found.ino());
        let is_there = fs::metadata(&path).map(number);
        match is_there {
            Ok(there) if there == number(file.metadata()?) => {
                fs::rename(&path, directory.join(OLD))?;
            }
            // Another one was faster.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("is always full"))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn lines_are_whole_and_files_bounded() {
        let directory = std::env::temp_dir().join(format!("pericarp-audit-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let directory = directory.clone();
                thread::spawn(move || {
                    for number in 0..200 {
                        let line = format!("{{\"writer\":{writer},\"number\":{number}}}\n");
                        append(&directory, &line, 4096).unwrap();
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        for name in [FILE, OLD] {
            let text = fs::read_to_string(directory.join(name)).unwrap();
            assert!(text.len() < 4096 + 4 * 64, "{}", text.len());
            for line in text.lines() {
                serde_json::from_str::<Value>(line).unwrap();
            }
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn nothing_is_written_where_nobody_asks() {
        let audit = Audit::default();
        audit.tell("exec", Some("c"), json!({}));
        let directory = std::env::temp_dir().join(format!("pericarp-told-{}", std::process::id()));
        audit.begin(Some(&directory), "k8s.io", "p", "default/web");
        audit.tell("exec", Some("c"), json!({"args": ["sh", "-c", "a\nb"]}));
        audit.finish();
        let text = fs::read_to_string(directory.join(FILE)).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        let said: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(said["event"], "exec");
        assert_eq!(
            (&said["pod"], &said["container_id"]),
            (&json!("default/web"), &json!("c"))
        );
        assert_eq!(said["args"][2], "a\nb");
    }

    #[test]
    fn a_directory_that_does_not_answer_holds_up_nobody() {
        let directory = std::env::temp_dir().join(format!("pericarp-deaf-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir(&directory).unwrap();
        // It is to be set aside, which waits for the lock.
        let locked = open(&directory.join(FILE)).unwrap();
        locked.set_len(LARGE).unwrap();
        flock(&locked, FlockOperation::LockExclusive).unwrap();
        let audit = Audit::default();
        audit.begin(Some(&directory), "k8s.io", "p", "default/web");
        // One is being written.
        for _ in 0..MOST + 8 {
            audit.tell("exec", None, json!({}));
        }
        drop(locked);
        audit.finish();
        let text = fs::read_to_string(directory.join(FILE)).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        let lines = text.lines().count();
        assert!((MOST..=MOST + 1).contains(&lines), "{lines}");
    }
}
