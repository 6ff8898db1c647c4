//! What `main` makes of the options before anything changes: the directories,
//! open, and how each is passed on. Each mistake of the operator's is one line.

use std::fs::File;
use std::os::fd::OwnedFd;

use log::{info, warn};
use pericarp_confine::{Tree, TreeError};
use pericarp_control::Failure;
use pericarp_fs::{DeviceOptions, FsDevice, MOST_DESCRIPTORS, Options};
use pericarp_share::{Share, ShareOptions, State, StateError};
use pericarp_vhost::program::{Keys, set_descriptor_limit};
use pericarp_vhost::{
    InflightFile, InflightFileError, Made, RecordOf, causes, identity_of, inherit_file, own_file,
};

use crate::elsewhere;

/// Descriptors for a worker's ring and mailbox, and for what the program has
/// once.
const FOR_PROCESS: u64 = 192;
/// Those of a device: its sockets, guest memory, its directory.
const FOR_DEVICE: u64 = 64;
/// Those of a queue: kick, call, error, and one that is exchanged.
const FOR_QUEUE: u64 = 4;
/// With fewer for nodes, or for open files, no directory can be passed on.
const FEWEST: u64 = 64;
/// More have no use.
const MOST: u64 = 1 << 19;

/// Sets how many descriptors there may be, and says how many. A guest has one of
/// ours for each file it knows, and an error where there is none left: so as many
/// as the system lets us have, if the operator does not say.
pub(crate) fn descriptor_limit(asked: Option<u64>) -> Result<u64, Failure> {
    let Some(asked) = asked else {
        let most = std::fs::read_to_string("/proc/sys/fs/nr_open").unwrap_or_default();
        let most = most.trim().parse().unwrap_or(MOST_DESCRIPTORS);
        return Ok(set_descriptor_limit(most.min(MOST_DESCRIPTORS)));
    };
    match set_descriptor_limit(asked) {
        limit if limit == asked => Ok(limit),
        limit => {
            let rule = format!("this user may have {limit}: give no more, or start as who may");
            Err(Failure::mistake("--rlimit-nofile", asked, rule))
        }
    }
}

/// Opens all directories. `limit` is that of open files.
pub(crate) fn open_trees(
    options: &Options,
    limit: u64,
) -> Result<(Vec<Tree>, Vec<ShareOptions>), Failure> {
    let devices = &options.devices;
    // The high priority queues count, too.
    let queues = devices.iter().map(|d| u64::from(d.queues) + 1).sum();
    let share = budget(limit, devices.len() as u64, queues).ok_or_else(|| {
        let rule = format!(
            "{limit} open files are allowed, too few for so many directories and queues: \
             raise the limit (ulimit -Hn, --rlimit-nofile), or start a process for each"
        );
        match devices[0].keys {
            Keys::Options => mistake(&devices[0], &rule),
            _ => Failure::mistake("--device", devices.len(), rule),
        }
    })?;
    devices
        .iter()
        .map(|device| open_tree(device, share))
        .collect()
}

/// Descriptors for the nodes of one directory, and as many for its open files,
/// where so many directories and queues divide what is allowed.
fn budget(limit: u64, devices: u64, queues: u64) -> Option<u32> {
    let others = FOR_PROCESS + FOR_DEVICE * devices + FOR_QUEUE * queues;
    let share = limit.saturating_sub(others) / (2 * devices.max(1));
    (share >= FEWEST).then(|| share.min(MOST) as u32)
}

fn open_tree(device: &DeviceOptions, share: u32) -> Result<(Tree, ShareOptions), Failure> {
    let tree = Tree::open(&device.dir).map_err(|error| match error {
        TreeError::Missing { .. } => mistake(device, "it does not exist: give a directory"),
        TreeError::NotADirectory { .. } => mistake(device, "it is no directory: give one"),
        TreeError::Refused { .. } => {
            let rule = "this user may not read it: give another directory, or start as who may";
            mistake(device, rule)
        }
        TreeError::Open { source, .. } => {
            let rule = format!("it cannot be opened ({source}): give another directory");
            mistake(device, &rule)
        }
        TreeError::NotShared { .. } => mistake(device, NOT_SHARED),
    })?;
    let options = ShareOptions {
        read_only: device.read_only,
        xattr: device.xattr,
        xattr_map: device.xattr_map.clone(),
        posix_acl: device.posix_acl,
        direct_io: device.direct_io,
        file_handles: device.file_handles,
        // What will be mounted may be, too.
        elsewhere: device.settings.later_mounts || elsewhere::is_below(tree.path()),
        locks: device.locks,
        uid_map: device.uid_map.clone(),
        gid_map: device.gid_map.clone(),
        descriptors: share,
        open_files: share,
        ..ShareOptions::default()
    };
    Share::check(tree.descriptor(), &options).map_err(|e| mistake(device, &e.to_string()))?;
    let tree = match device.read_only {
        true => tree.read_only(),
        false => tree,
    };
    let tree = match device.settings.alone {
        true => tree.alone(),
        false => tree,
    };
    let tree = match device.settings.later_mounts {
        true => tree.following().map_err(|_| mistake(device, NOT_SHARED))?,
        false => tree,
    };
    Ok((tree, options))
}

const NOT_SHARED: &str = "what is mounted below it later would not be seen: make it a shared mount \
                          (mount --bind DIR DIR; mount --make-shared DIR)";

fn mistake(device: &DeviceOptions, rule: &str) -> Failure {
    let option = match device.keys {
        Keys::Options => "--shared-dir",
        _ => "--device dir",
    };
    Failure::mistake(option, device.dir.display(), rule)
}

/// What the process keeps for its successor.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Whether this process has made the file. Dropped first: it goes while its lock is held.
    made: Made,
    /// The file with the state of all directories, if that is kept.
    pub(crate) file: Option<File>,
    /// The state of each.
    pub(crate) states: Vec<State>,
    /// Requests in flight.
    pub(crate) records: Option<InflightFile>,
}

impl Kept {
    /// All of it stays for a successor from now on, also what was made just now.
    pub(crate) fn keep(&mut self) {
        self.made.keep();
        if let Some(records) = &mut self.records {
            records.keep();
        }
    }
}

/// What a predecessor that lives leaves of its files.
pub(crate) type Inherited = (Option<(OwnedFd, OwnedFd)>, Option<OwnedFd>);

/// Opens the files for a successor that the options name, or goes on with those of a
/// predecessor that lives.
pub(crate) fn open_kept(options: &Options, inherited: Option<Inherited>) -> Result<Kept, Failure> {
    let Some(path) = &options.state_file else {
        return Ok(Kept::default());
    };
    let wrong = |rule: &dyn std::fmt::Display| {
        Failure::mistake("--state-file", path.display(), rule.to_string())
    };
    // The high priority queues count, too.
    let shape = |device: &DeviceOptions| (device.queues + 1, device.queue_size);
    let bytes = |device: &DeviceOptions| {
        let (queues, size) = shape(device);
        State::bytes(queues, size)
    };
    let total = options.devices.iter().map(bytes).sum();
    let (descriptors, file) = inherited.unwrap_or_default();
    let opened = match file {
        None => own_file(path, total),
        Some(file) => inherit_file(path, file, total).map(|file| (file, Made::default())),
    };
    let (file, made) = opened.map_err(|e| match e {
        InflightFileError::Other => wrong(&OTHER),
        other => wrong(&other),
    })?;
    let mut kept = Kept {
        made,
        ..Kept::default()
    };
    let mut offset = 0;
    for device in &options.devices {
        let copy = file.try_clone().map_err(|e| wrong(&e))?;
        let state = open_state(copy, offset, device, shape(device));
        kept.states.push(state.map_err(|rule| wrong(&rule))?);
        offset += bytes(device);
    }
    kept.file = Some(file);
    if let Some(path) = &options.process.inflight_file {
        let devices: Vec<RecordOf<'_>> = options
            .devices
            .iter()
            .map(|device| RecordOf {
                id: &device.id,
                store: &device.dir,
                queues: device.queues + 1,
                queue_size: device.queue_size,
            })
            .collect();
        let records = match descriptors {
            None => InflightFile::open(path, &devices),
            Some(descriptors) => InflightFile::inherit(path, descriptors, &devices),
        };
        let records =
            records.map_err(|rule| Failure::mistake("--inflight-file", path.display(), rule));
        kept.records = Some(records?);
    }
    Ok(kept)
}

const OTHER: &str = "it holds something else than the state of these directories: remove it if \
                     no virtual machine depends on it, or give another file";

fn open_state(
    file: File,
    offset: u64,
    device: &DeviceOptions,
    shape: (u16, u16),
) -> Result<State, String> {
    let identity = identity_of(&device.id, &device.dir);
    State::open(file, offset, shape, identity).map_err(|error| match error {
        StateError::Other => OTHER.to_owned(),
        other => format!("{other}: give a file on a memory file system such as /run"),
    })
}

/// The device over a directory, with an open `/proc/self/fd`. It needs no path:
/// the process may be confined. A state that is inherited is a predecessor's that
/// still serves.
pub(crate) fn make_device(
    device: &DeviceOptions,
    tree: &Tree,
    descriptors: &OwnedFd,
    options: ShareOptions,
    state: Option<State>,
    inherited: bool,
) -> Result<FsDevice, Failure> {
    let failed = |e: std::io::Error| Failure::run_time(format_args!("descriptors: {e}"));
    let root = tree.descriptor().try_clone_to_owned().map_err(failed)?;
    let descriptors = descriptors.try_clone().map_err(failed)?;
    let share = Share::open_with(root, descriptors, options)
        .map_err(|e| Failure::run_time(format_args!("{}: {}", device.dir.display(), causes(&e))))?;
    let (descriptors, dir) = (share.options().descriptors, device.dir.display());
    info!("{dir}: at most {descriptors} descriptors for its nodes, as many open files");
    let share = match state {
        None => share,
        Some(state) if inherited => share.keep(state),
        Some(state) => {
            let (share, found) = share.remember(state);
            let (nodes, open, id) = (found.nodes, found.open, &device.id);
            if nodes > 0 || open > 0 {
                info!("device {id}: goes on with {nodes} files that its guest knows, {open} open");
            }
            if found.lost > 0 {
                let lost = found.lost;
                warn!("device {id}: {lost} files that were open are not to be had any more");
            }
            share
        }
    };
    let (queues, size) = (device.queues, device.queue_size);
    Ok(FsDevice::new(
        share,
        &device.tag,
        queues,
        size,
        device.settings,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_divide_what_is_allowed() {
        assert_eq!(budget(1024, 1, 2), Some(380));
        assert_eq!(budget(1024, 4, 8), Some(68));
        assert_eq!(budget(1024, 5, 10), None);
        assert_eq!(budget(256, 1, 2), None);
        assert_eq!(budget(1 << 20, 64, 128), Some(8154));
        assert_eq!(budget(1 << 20, 1, 2), Some(524_156));
        assert_eq!(budget(u64::MAX, 1, 2), Some(1 << 19));
    }
}
