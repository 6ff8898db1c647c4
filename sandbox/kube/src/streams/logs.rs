//! What a container has written, from the file that containerd keeps of it.
//!
//! A line of the file is a time, a stream, `F` or `P` for a part of a line, and the text. Following
//! looks at the file again and again, which costs nothing that can be measured and needs no
//! descriptor of the kernel's for each reader.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::mpsc::Sender;

use super::container_of;
use crate::{
    failure::Failure,
    http::{Answer, Api, Body, Query, answer},
    objects::name_of,
    store::Kind,
};

/// Read at once.
const PIECE: usize = 64 << 10;
/// A longer line than containerd writes is passed on in parts.
const LONGEST: usize = 256 << 10;
/// How often a file is looked at that may grow.
const LOOK: Duration = Duration::from_millis(100);

/// Which part of a log is wanted, and how.
#[derive(Clone, Debug, Default)]
struct Wanted {
    timestamps: bool,
    since: Option<SystemTime>,
    /// Bytes that may still be sent.
    left: Option<u64>,
    /// Only this stream.
    stream: Option<&'static str>,
}

/// Whose log it is.
struct Whose {
    namespace: String,
    pod: String,
    container: String,
}

/// GET of a pod's log.
pub(super) async fn answer_log(
    api: &Arc<Api>,
    pod: &Value,
    query: &Query,
) -> Result<Answer, Failure> {
    let container = container_of(pod, query)?;
    let previous = query.flag("previous")?;
    let follow = query.flag("follow")? && !previous;
    let tail = query.number("tailLines")?;
    let wanted = wanted(query)?;
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
    let whose = Whose {
        namespace: namespace.to_owned(),
        pod: name_of(pod),
        container,
    };
    let path = super::of_node(api, {
        let (namespace, pod) = (namespace.to_owned(), whose.pod.clone());
        let container = whose.container.clone();
        move |node| node.log_path(&namespace, &pod, &container, previous)
    });
    let Some(path) = path.await? else {
        return Err(nothing_yet(pod, &whose, previous));
    };
    let opened = tokio::task::spawn_blocking(move || open(&path, tail).map(|file| (file, path)));
    let opened = opened
        .await
        .map_err(|_| Failure::internal("the request failed"))?;
    let (file, path) = opened.map_err(|error| {
        Failure::internal(format!("the log of \"{}\": {error}", whose.container))
    })?;
    let (sender, body) = Body::pieces();
    let api = Arc::clone(api);
    tokio::spawn(async move {
        let mut reader = Reader::new(file, wanted);
        let follow = follow.then_some((&path, &whose));
        send(&api, &mut reader, follow, &sender).await;
    });
    Ok(answer(200, "text/plain", body))
}

fn wanted(query: &Query) -> Result<Wanted, Failure> {
    let now = SystemTime::now();
    let seconds = query.number("sinceSeconds")?;
    let since = match (seconds, query.get("sinceTime")) {
        (Some(_), Some(_)) => {
            let message = "at most one of sinceSeconds and sinceTime may be given";
            return Err(Failure::bad_request(message));
        }
        (Some(seconds), None) => now.checked_sub(Duration::from_secs(seconds)),
        (None, Some(text)) => {
            let bad = || Failure::bad_request("sinceTime: is no time of RFC 3339");
            Some(parse(text).ok_or_else(bad)?)
        }
        (None, None) => None,
    };
    let stream = match query.get("stream") {
        None | Some("All") => None,
        Some("Stdout") => Some("stdout"),
        Some("Stderr") => Some("stderr"),
        Some(_) => {
            let message = "stream: is none of All, Stdout and Stderr";
            return Err(Failure::bad_request(message));
        }
    };
    Ok(Wanted {
        timestamps: query.flag("timestamps")?,
        since,
        left: query.number("limitBytes")?,
        stream,
    })
}

/// A time, which may be that of a zone: containerd writes those of the node's.
fn parse(text: &str) -> Option<SystemTime> {
    // Such as +02:00, behind the seconds at least.
    let split = text.len().checked_sub(6).filter(|at| *at >= 19);
    let zone = split.and_then(|at| text.split_at_checked(at));
    let zone = zone.filter(|(_, zone)| zone.starts_with(['+', '-']));
    let Some((local, zone)) = zone else {
        return humantime::parse_rfc3339_weak(text).ok();
    };
    let east = zone.starts_with('+');
    let (hours, minutes) = zone.strip_prefix(['+', '-'])?.split_once(':')?;
    let minutes = hours.parse::<u64>().ok()? * 60 + minutes.parse::<u64>().ok()?;
    let offset = Duration::from_secs(minutes * 60);
    let local = humantime::parse_rfc3339_weak(local).ok()?;
    match east {
        true => local.checked_sub(offset),
        false => local.checked_add(offset),
    }
}

/// Why there is no log.
fn nothing_yet(pod: &Value, whose: &Whose, previous: bool) -> Failure {
    let (container, name) = (&whose.container, &whose.pod);
    if previous {
        return Failure::bad_request(format!(
            "previous terminated container \"{container}\" in pod \"{name}\" not found"
        ));
    }
    let state = status_of(pod, container).map(|status| &status["state"]["waiting"]);
    let reason = state.and_then(|waiting| waiting["reason"].as_str());
    let reason = reason.unwrap_or("ContainerCreating");
    let message = state.and_then(|waiting| waiting["message"].as_str());
    let message = message.map(|message| format!(": {message}"));
    Failure::bad_request(format!(
        "container \"{container}\" in pod \"{name}\" is waiting to start: {reason}{}",
        message.unwrap_or_default()
    ))
}

fn status_of<'a>(pod: &'a Value, container: &str) -> Option<&'a Value> {
    ["initContainerStatuses", "containerStatuses"]
        .iter()
        .flat_map(|list| pod["status"][list].as_array().into_iter().flatten())
        .find(|status| status["name"] == container)
}

/// Opens a log at its beginning, or so many lines before its end.
fn open(path: &Path, tail: Option<u64>) -> io::Result<File> {
    let mut file = File::open(path)?;
    let Some(lines) = tail else {
        return Ok(file);
    };
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut found = 0;
    let mut start = 0;
    let mut piece = vec![0; PIECE];
    let mut is_last = true;
    'search: while end > 0 {
        let size = end.min(PIECE as u64);
        let from = end - size;
        let piece = &mut piece[..usize::try_from(size).unwrap_or(PIECE)];
        file.seek(SeekFrom::Start(from))?;
        file.read_exact(piece)?;
        for (index, byte) in piece.iter().enumerate().rev() {
            // The end of the last line is not the beginning of one.
            let is_end = std::mem::take(&mut is_last);
            if *byte == b'\n' && !is_end {
                found += 1;
                if found == lines {
                    start = from + index as u64 + 1;
                    break 'search;
                }
            }
        }
        end = from;
    }
    if lines == 0 {
        file.seek(SeekFrom::End(0))?;
    } else {
        file.seek(SeekFrom::Start(start))?;
    }
    Ok(file)
}

/// Sends what there is, and what comes, as long as somebody listens and the container runs.
async fn send(
    api: &Api,
    reader: &mut Reader,
    follow: Option<(&PathBuf, &Whose)>,
    sender: &Sender<Bytes>,
) {
    let first_id = follow.and_then(|(_, whose)| running(api, whose));
    let mut ended = false;
    loop {
        match reader.read() {
            Ok(Some(text)) => {
                if !text.is_empty() && sender.send(Bytes::from(text)).await.is_err() {
                    return;
                }
                if reader.wanted.left == Some(0) {
                    return;
                }
                continue;
            }
            Ok(None) => {}
            Err(error) => {
                log::warn!("a log cannot be read: {error}");
                return;
            }
        }
        let Some((path, whose)) = follow else {
            return;
        };
        match reader.replaced(path) {
            Some(file) => {
                reader.go_on_with(file);
                continue;
            }
            None if ended => return,
            None => {}
        }
        // What it wrote last is read once more.
        ended = first_id.is_none() || running(api, whose) != first_id;
        if !ended {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = sender.closed() => return,
            }
        }
    }
}

/// The container's id while it runs.
fn running(api: &Api, whose: &Whose) -> Option<String> {
    let pod = api.store.get(Kind::Pod, &whose.namespace, &whose.pod)?;
    let status = status_of(&pod, &whose.container)?;
    let runs = !status["state"]["running"].is_null();
    let id = status["containerID"].as_str()?;
    runs.then(|| id.to_owned())
}

/// Reads lines and passes on their text.
struct Reader {
    file: File,
    wanted: Wanted,
    /// What is not a whole line yet.
    rest: Vec<u8>,
    /// Whether what comes next begins a line of the container's.
    at_start: bool,
}

impl Reader {
    fn new(file: File, wanted: Wanted) -> Self {
        Self {
            file,
            wanted,
            rest: Vec::new(),
            at_start: true,
        }
    }

    /// The text of what could be read, or `None` at the end of the file.
    fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        let before = self.rest.len();
        self.rest.resize(before + PIECE, 0);
        let count = self.file.read(&mut self.rest[before..]);
        self.rest
            .truncate(before + count.as_ref().ok().copied().unwrap_or_default());
        if count? == 0 {
            return Ok(None);
        }
        let mut text = Vec::new();
        let mut lines = std::mem::take(&mut self.rest);
        let whole = match lines.iter().rposition(|byte| *byte == b'\n') {
            Some(last) => last + 1,
            None if lines.len() > LONGEST => lines.len(),
            None => 0,
        };
        let rest = lines.split_off(whole);
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            self.line(line, &mut text);
        }
        self.rest = rest;
        if let Some(left) = &mut self.wanted.left {
            text.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= text.len() as u64;
        }
        Ok(Some(text))
    }

    fn line(&mut self, line: &[u8], text: &mut Vec<u8>) {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let parts = (parts.next(), parts.next(), parts.next(), parts.next());
        let (Some(time), Some(stream), Some(tag), Some(content)) = parts else {
            return;
        };
        if self
            .wanted
            .stream
            .is_some_and(|one| one.as_bytes() != stream)
        {
            return;
        }
        if let Some(since) = self.wanted.since {
            let time = str::from_utf8(time).ok().and_then(parse);
            if time.is_some_and(|time| time < since) {
                return;
            }
        }
        if self.wanted.timestamps && self.at_start {
            text.extend_from_slice(time);
            text.push(b' ');
        }
        let partial = tag.starts_with(b"P");
        let end = content.len() - usize::from(partial && content.ends_with(b"\n"));
        text.extend_from_slice(&content[..end]);
        self.at_start = !partial;
    }

    /// The file that is at `path` now, if it is another.
    fn replaced(&self, path: &Path) -> Option<File> {
        let (old, new) = (self.file.metadata().ok()?, path.metadata().ok()?);
        let same = (old.dev(), old.ino()) == (new.dev(), new.ino());
        (!same).then(|| File::open(path).ok())?
    }

    fn go_on_with(&mut self, file: File) {
        self.file = file;
        self.rest.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const LOG: &str = "2026-01-01T00:00:00.000000001Z stdout F one\n\
        2026-01-01T00:00:01.000000001Z stderr F two\n\
        2026-01-01T00:00:02.000000001Z stdout P thr\n\
        2026-01-01T00:00:03.000000001Z stdout F ee\n\
        garbage\n";

    fn log(name: &str) -> PathBuf {
        let name = format!("pericarp-log-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        File::create(&path)
            .unwrap()
            .write_all(LOG.as_bytes())
            .unwrap();
        path
    }

    fn text(path: &Path, tail: Option<u64>, wanted: Wanted) -> String {
        let mut reader = Reader::new(open(path, tail).unwrap(), wanted);
        let mut all = Vec::new();
        while let Some(text) = reader.read().unwrap() {
            all.extend(text);
        }
        String::from_utf8(all).unwrap()
    }

    #[test]
    fn lines_are_put_together_and_chosen() {
        let path = log("lines");
        let all = Wanted::default();
        assert_eq!(text(&path, None, all.clone()), "one\ntwo\nthree\n");
        assert_eq!(text(&path, Some(0), all.clone()), "");
        assert_eq!(text(&path, Some(2), all.clone()), "ee\n");
        assert_eq!(text(&path, Some(99), all.clone()), "one\ntwo\nthree\n");
        let mut stamped = all.clone();
        stamped.timestamps = true;
        stamped.since = humantime::parse_rfc3339("2026-01-01T00:00:02Z").ok();
        assert_eq!(
            text(&path, None, stamped),
            "2026-01-01T00:00:02.000000001Z three\n"
        );
        let mut short = all.clone();
        short.left = Some(5);
        assert_eq!(text(&path, None, short), "one\nt");
        let mut errors = all;
        errors.stream = Some("stderr");
        assert_eq!(text(&path, None, errors), "two\n");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn times_of_zones_are_read() {
        let utc = parse("2026-01-01T00:30:00.5Z").unwrap();
        assert_eq!(parse("2026-01-01T02:30:00.5+02:00").unwrap(), utc);
        assert_eq!(parse("2025-12-31T19:00:00.5-05:30").unwrap(), utc);
        for bad in ["", "now", "2026-01-01T00:30:00+0200", "+02:00"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_file_in_the_place_of_another_is_seen() {
        let path = log("rotated");
        let mut reader = Reader::new(open(&path, Some(0)).unwrap(), Wanted::default());
        assert!(reader.read().unwrap().is_none());
        assert!(reader.replaced(&path).is_none());
        let old = path.with_extension("old");
        std::fs::rename(&path, &old).unwrap();
        assert!(reader.replaced(&path).is_none(), "there is none yet");
        File::create(&path)
            .unwrap()
            .write_all(LOG.as_bytes())
            .unwrap();
        let file = reader.replaced(&path).unwrap();
        reader.go_on_with(file);
        assert!(reader.read().unwrap().unwrap().starts_with(b"one\n"));
        for path in [path, old] {
            std::fs::remove_file(path).unwrap();
        }
    }
}
