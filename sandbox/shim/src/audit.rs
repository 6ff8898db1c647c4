//! What is done to a pod and in it, as JSON lines for who keeps watch: one file for all pods of a
//! node's profiles that ask for it, which is set aside when it is large.
//!
//! Told by `pod`. A line is written before what it says is done, or where a guest is heard. What cannot
//! be written is a line in the log, and nobody waits.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

const FILE: &str = "audit.jsonl";
const OLD: &str = "audit.jsonl.old";
/// Set aside when larger; what was set aside before goes then.
const LARGE: u64 = 64 << 20;
/// Another shim may be setting it aside.
const TRIES: u32 = 8;

/// The stream of one pod.
#[derive(Debug, Default)]
pub(crate) struct Audit {
    stream: Mutex<Option<Stream>>,
}

#[derive(Debug, Clone)]
struct Stream {
    directory: PathBuf,
    namespace: String,
    id: String,
    name: String,
}

impl Audit {
    /// Begins, if the pod's profile has a directory for it.
    pub(crate) fn begin(&self, directory: Option<&Path>, namespace: &str, id: &str, name: &str) {
        let stream = directory.map(|directory| Stream {
            directory: directory.to_owned(),
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            name: name.to_owned(),
        });
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }

    /// Says that this happens to a container, or to the pod.
    pub(crate) fn tell(&self, event: &str, container: Option<&str>, more: Value) {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stream) = stream.clone() else {
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
        if let Err(error) = append(&stream.directory, &format!("{object}\n"), LARGE) {
            log::warn!("audit: {}: {error}: {object}", stream.directory.display());
        }
    }
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
}
