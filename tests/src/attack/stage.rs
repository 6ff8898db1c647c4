//! Sidecars as a node starts them, confined, each with a device that front ends attack, one that a
//! guest attacks, and one of somebody innocent; what they serve, and what lies beside it and is nobody's.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use super::block::{DISK, TAIL};
use super::{Plan, files, network};
use crate::bounded::poll;
use crate::model::Sequence;
use crate::network::{GUEST, GUEST_MAC, HOST, HOST_MAC, Network, TAP, dotted, mac};
use crate::parts::{Part, beside_us};
use crate::peer::Footprint;
use crate::process::{Process, command};
use crate::scratch::Scratch;
use crate::vsock::CID;

/// The taps of cards that are attacked: by front ends, by a guest.
const ATTACKED: [(&str, u8); 2] = [("t1", network::ATTACKED), ("t2", network::GUESTS)];
/// How long a sidecar may take to start, and to answer.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes that may be in the directories.
const TREE: &str = "size=64m,nr_inodes=20000\0";

/// What sidecars are made of.
pub(super) const PARTS: [Part; 5] = [
    Part::PERICARP_BLOCK,
    Part::PERICARP_FS,
    Part::PERICARP_NET,
    Part::PERICARP_VSOCK,
    Part::Ip,
];

/// A process that is attacked, or stands beside one.
pub(super) struct Sidecar {
    /// What it is called in reports.
    pub(super) name: &'static str,
    process: Process,
    control: Option<PathBuf>,
}

impl Sidecar {
    /// How it ended, if it did: none should.
    pub(super) fn ended(&mut self) -> Option<String> {
        self.process.ended()?;
        let how = self.process.epitaph();
        let words = self.process.output().last(12);
        Some(format!("{} {how}; it wrote:\n{words}", self.name))
    }

    /// What it holds now.
    pub(super) fn footprint(&self) -> Option<Footprint> {
        Footprint::of(self.process.pid())
    }

    /// Asks its control socket; how long the answer took. `None` of one that has none.
    pub(super) fn stats(&self) -> Option<Result<Duration, String>> {
        let control = self.control.as_ref()?;
        let begin = Instant::now();
        let ask = || -> std::io::Result<String> {
            let mut stream = UnixStream::connect(control)?;
            stream.set_read_timeout(Some(LIMIT))?;
            stream.write_all(b"{\"op\":\"stats\"}\n")?;
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line)?;
            Ok(line)
        };
        Some(match ask() {
            Ok(line) if line.contains("\"devices\"") => Ok(begin.elapsed()),
            Ok(line) => Err(format!("{}: no stats: {line:?}", self.name)),
            Err(error) => Err(format!("{}: no stats: {error}", self.name)),
        })
    }

    /// CPU time that it has used.
    pub(super) fn cpu(&self) -> Duration {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.process.pid()));
        let text = text.unwrap_or_default();
        // Behind the name, which may hold anything: user and system time, in hundredths.
        let fields = text.rsplit_once(") ").map_or("", |(_, fields)| fields);
        let ticks = fields.split(' ').skip(11).take(2);
        let ticks: u64 = ticks.filter_map(|field| field.parse::<u64>().ok()).sum();
        Duration::from_millis(10 * ticks)
    }
}

/// A directory of its own kind, until this is dropped.
struct Tree(PathBuf);

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// All of it. Dropped in the order of its fields.
pub(super) struct Stage {
    /// Those that are looked at.
    pub(super) sidecars: Vec<Sidecar>,
    /// What the innocent have and nobody else may see.
    pub(super) canary: Vec<u8>,
    outside: Vec<(PathBuf, (u64, u32, u64, i64))>,
    /// How long its sidecars may live: long after all should be over.
    life: Duration,
    _trees: Vec<Tree>,
    scratch: Scratch,
}

impl Stage {
    /// Puts the calling thread into a network and mounts of its own and starts the sidecars
    /// there. `Ok(None)` is a machine that cannot do it, and says so.
    ///
    /// # Errors
    /// What a sidecar, or the kernel, refuses.
    pub(super) fn set(test: &str, parts: &[Part], plan: &Plan) -> Result<Option<Self>, String> {
        let Some(network) = Network::here(test, &[&PARTS[..], parts].concat(), 1) else {
            return Ok(None);
        };
        more_taps(&network);
        let wrong = |what: &str| {
            let what = what.to_owned();
            move |error: std::io::Error| format!("{what}: {error}")
        };
        #[expect(
            unsafe_code,
            reason = "no descriptors are unshared, which is what is unsafe"
        )]
        // SAFETY: as said.
        let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
        unshared.map_err(|e| wrong("mounts of its own")(e.into()))?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).map_err(|e| wrong("mounts")(e.into()))?;
        let scratch = Scratch::new();
        let mut trees = Vec::new();
        for name in ["tree", "tree-guest", "tree-own"] {
            let path = scratch.path(name);
            fs::create_dir(&path).map_err(wrong(name))?;
            let data = std::ffi::CStr::from_bytes_with_nul(TREE.as_bytes()).ok();
            rustix::mount::mount("tree", &path, "tmpfs", MountFlags::NOSUID, data)
                .map_err(|e| wrong(name)(e.into()))?;
            trees.push(Tree(path));
        }
        for name in ["tree", "tree-guest"] {
            files::renew(&scratch.path(name)).map_err(wrong(name))?;
        }
        // Nobody guesses it.
        let canary = Sequence::new(plan.seed ^ 0xcafe_f00d_dead_beef).bytes(64);
        scratch.file("secret", &canary.repeat(64));
        fs::create_dir(scratch.path("outside")).map_err(wrong("outside"))?;
        fs::write(scratch.path("outside/file"), &canary).map_err(wrong("outside"))?;
        scratch.sparse("disk", DISK + TAIL);
        scratch.sparse("disk-guest", DISK + TAIL);
        let own = File::create(scratch.path("disk-own")).map_err(wrong("disk-own"))?;
        own.write_all_at(&canary.repeat(TAIL as usize / canary.len()), DISK)
            .map_err(wrong("disk-own"))?;
        let mut stage = Self {
            sidecars: Vec::new(),
            canary,
            outside: Vec::new(),
            life: Duration::from_secs(plan.seconds.saturating_add(480)),
            _trees: trees,
            scratch,
        };
        stage.start()?;
        let beside = ["secret", "outside", "outside/file"].map(|name| stage.path(name));
        for path in beside {
            stage.outside.push((path.clone(), looks(&path)));
        }
        Ok(Some(stage))
    }

    /// A path in its directory.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    /// For a guest that attacks.
    pub(super) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    fn start(&mut self) -> Result<(), String> {
        let path = |name: &str| self.scratch.path(name).display().to_string();
        let device = |id: &str, more: String| format!("id={id},socket={}{more}", path(id));
        let block = [
            device("block", format!(",file={},num-queues=2", path("disk"))),
            device(
                "block-guest",
                format!(",file={},num-queues=2", path("disk-guest")),
            ),
            device(
                "block-own",
                format!(",file={},cache=buffered", path("disk-own")),
            ),
        ];
        let files = [
            device("fs", format!(",dir={},tag=a,xattr=on", path("tree"))),
            device("fs-guest", format!(",dir={},tag=c", path("tree-guest"))),
            device("fs-own", format!(",dir={},tag=b", path("tree-own"))),
        ];
        let cards = [
            device("net", format!(",tap={}", ATTACKED[0].0)),
            device("net-guest", format!(",tap={}", ATTACKED[1].0)),
            device("net-own", format!(",tap={TAP}")),
        ];
        for (name, program, devices) in [
            ("block", "pericarp-block", block),
            ("fs", "pericarp-fs", files),
            ("net", "pericarp-net", cards),
        ] {
            let control = self.scratch.path(&format!("{name}.control"));
            let mut sidecar = command(&beside_us().join(program));
            for device in devices {
                sidecar.arg("--device").arg(device);
            }
            sidecar.arg("--control-path").arg(&control);
            let sockets = ["", "-guest", "-own"].map(|whose| format!("{name}{whose}"));
            self.run(name, sidecar, &sockets, Some(control))?;
        }
        // One of these serves one guest.
        for (name, id) in [
            ("vsock", "vsock"),
            ("vsock, of the guest", "vsock-guest"),
            ("vsock, of the innocent", "vsock-own"),
        ] {
            let mut sidecar = command(&beside_us().join("pericarp-vsock"));
            sidecar.arg("--socket-path").arg(self.scratch.path(id));
            sidecar
                .arg("--uds-path")
                .arg(self.scratch.path(&format!("{id}-host")));
            sidecar.arg(format!("--guest-cid={CID}"));
            self.run(name, sidecar, &[id.to_owned()], None)?;
        }
        Ok(())
    }

    fn run(
        &mut self,
        name: &'static str,
        mut program: Command,
        sockets: &[String],
        control: Option<PathBuf>,
    ) -> Result<(), String> {
        program.args(["--log-level", "info"]);
        // `vhost` waits for an answer without end, time-outs or not: who waits for a process that
        // hangs hears its end then. Before that the rig kills nobody.
        let mut process =
            Process::start(&mut program, self.life).map_err(|e| format!("{name}: {e}"))?;
        let sockets: Vec<PathBuf> = sockets.iter().map(|name| self.scratch.path(name)).collect();
        let there = poll(LIMIT, || {
            let ended = process.ended().is_some();
            let bound = sockets.iter().chain(&control).all(|path| path.exists());
            let confined = process.output().find("confined: ").is_some();
            (ended || bound && confined).then_some(!ended)
        });
        let said = process.output().last(12);
        self.sidecars.push(Sidecar {
            name,
            process,
            control,
        });
        match there {
            Some(true) => Ok(()),
            _ => Err(format!("{name} did not start; it wrote:\n{said}")),
        }
    }

    /// What is not as it was, or where it should not be, when all is over.
    pub(super) fn damage(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (path, before) in &self.outside {
            if looks(path) != *before {
                found.push(format!("{} was changed", path.display()));
            }
        }
        let secret = fs::read(self.path("secret")).unwrap_or_default();
        if secret != self.canary.repeat(64) {
            found.push("the secret beside the directory was changed".into());
        }
        let mut served = vec![self.path("disk"), self.path("disk-guest")];
        for tree in ["tree", "tree-guest"] {
            walk(&self.path(tree), &mut served);
        }
        for path in served {
            let bytes = fs::read(&path).unwrap_or_default();
            if holds(&bytes, &self.canary) {
                found.push(format!(
                    "{} has got what is not the guest's",
                    path.display()
                ));
            }
        }
        found
    }
}

/// Taps for the cards that are attacked, with addresses of their own.
fn more_taps(network: &Network) {
    for (tap, card) in ATTACKED {
        let [host, guest] = [HOST, GUEST].map(|address| dotted(network::at(card, address)));
        network.ip(&format!("tuntap add {tap} mode tap vnet_hdr"));
        network.ip(&format!("link set {tap} address {}", mac(HOST_MAC)));
        network.ip(&format!("link set {tap} addrgenmode none"));
        network.ip(&format!("link set {tap} up"));
        network.ip(&format!("addr add {host}/24 dev {tap}"));
        let guest_mac = mac(GUEST_MAC);
        network.ip(&format!(
            "neigh replace {guest} lladdr {guest_mac} dev {tap} nud permanent"
        ));
    }
}

/// Inode, mode, size and time of the last change.
fn looks(path: &Path) -> (u64, u32, u64, i64) {
    let seen = fs::symlink_metadata(path).ok();
    seen.map_or((0, 0, 0, 0), |seen| {
        (seen.ino(), seen.mode(), seen.size(), seen.mtime())
    })
}

/// All regular files of a tree that somebody else has made; those that are longer than the tree
/// can be are holes.
fn walk(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let Ok(seen) = fs::symlink_metadata(entry.path()) else {
            continue;
        };
        if seen.is_dir() {
            walk(&entry.path(), files);
        } else if seen.is_file() && seen.len() <= 64 << 20 {
            files.push(entry.path());
        }
    }
}

/// Whether the canary, or half of it, is somewhere in these bytes.
pub(super) fn holds(bytes: &[u8], canary: &[u8]) -> bool {
    // A copy that is torn still has one of these.
    canary.chunks_exact(16).step_by(2).any(|part| {
        let (first, rest) = part.split_at(8);
        let first = u64::from_le_bytes(first.try_into().unwrap_or_default());
        let mut window = 0_u64;
        bytes.iter().enumerate().any(|(at, byte)| {
            window = window >> 8 | u64::from(*byte) << 56;
            window == first && bytes[at + 1..].starts_with(rest)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_canary_is_found_wherever_it_is() {
        let canary: Vec<u8> = (0..64).map(|at| at * 3 + 1).collect();
        let mut bytes = vec![0; 1000];
        assert!(!holds(&bytes, &canary));
        bytes[333..397].copy_from_slice(&canary);
        assert!(holds(&bytes, &canary));
        // The half of it, too.
        bytes[333..365].fill(0);
        assert!(holds(&bytes, &canary));
    }
}
