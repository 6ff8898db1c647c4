//! Disks that come to a running QEMU and leave it, each on a port of its own that was there at the
//! start (`MachineSpec::spare_slots`).
//!
//! Called through [`crate::Machine`]. A disk's connection is made by its path and made again
//! whenever it ends, so that its backend may be replaced under the guest.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    monitor::{Monitor, MonitorError},
    spec::DiskSpec,
};

/// What QEMU answers for a device that it does not have: `DeviceNotFound` of its error classes.
const NOT_THERE: &str = "not found";
/// What it answers while the guest has yet to give the device up.
const ON_ITS_WAY: &str = "already in the process of unplug";
/// What it answers for a connection that a device has.
const IN_USE: &str = "busy";

/// The spare ports, by number, and who is on each.
#[derive(Debug, Default)]
pub(crate) struct Ports(Vec<Option<String>>);

impl Ports {
    /// So many that are free.
    pub(super) fn new(count: u8) -> Self {
        Self(vec![None; usize::from(count)])
    }

    /// Adds a disk whose backend listens.
    ///
    /// # Errors
    ///
    /// There is no free port, or QEMU does not want it: then nothing of it is left.
    pub(crate) fn add(
        &mut self,
        monitor: &mut Monitor,
        disk: &DiskSpec,
        limit: Duration,
    ) -> Result<(), MonitorError> {
        let refused = |why: String| Err(MonitorError::Refused(why));
        if self.0.iter().flatten().any(|id| *id == disk.id) {
            return refused(format!("there is a disk '{}'", disk.id));
        }
        let Some(index) = self.0.iter().position(Option::is_none) else {
            return refused(format!("all {} places for disks are taken", self.0.len()));
        };
        monitor.execute_with("chardev-add", connection(disk), limit)?;
        let added = monitor.execute_with("device_add", device(disk, index), limit);
        match added {
            Ok(()) => self.0[index] = Some(disk.id.clone()),
            Err(MonitorError::Refused(_)) => {
                // The first error is the one to tell.
                let _ = monitor.execute_with("chardev-remove", by_id(&connection_id(disk)), limit);
            }
            // It may be there a moment later.
            Err(_) => self.0[index] = Some(disk.id.clone()),
        }
        added
    }

    /// Has the guest give a disk up. True once it has, and nothing of it is left.
    ///
    /// # Errors
    ///
    /// QEMU does not answer, or not so.
    pub(crate) fn remove(
        &mut self,
        monitor: &mut Monitor,
        id: &str,
        limit: Duration,
    ) -> Result<bool, MonitorError> {
        let Some(port) = self.0.iter_mut().find(|port| port.as_deref() == Some(id)) else {
            return Ok(true);
        };
        match monitor.execute_with("device_del", by_id(id), limit) {
            Err(MonitorError::Refused(why))
                if !why.contains(NOT_THERE) && !why.contains(ON_ITS_WAY) =>
            {
                return Err(MonitorError::Refused(why));
            }
            Ok(()) | Err(MonitorError::Refused(_)) => {}
            Err(other) => return Err(other),
        }
        match monitor.execute_with("chardev-remove", by_id(&connection_of(id)), limit) {
            Err(MonitorError::Refused(why)) if why.contains(IN_USE) => Ok(false),
            Ok(()) | Err(MonitorError::Refused(_)) => {
                *port = None;
                Ok(true)
            }
            Err(other) => Err(other),
        }
    }
}

fn by_id(id: &str) -> Value {
    json!({ "id": id })
}

fn connection_id(disk: &DiskSpec) -> String {
    connection_of(&disk.id)
}

/// No device's name ends so.
fn connection_of(id: &str) -> String {
    format!("{id}-connection")
}

fn connection(disk: &DiskSpec) -> Value {
    // Checked to be text by `DiskSpec::check`.
    let path = disk.socket.to_string_lossy();
    json!({
        "id": connection_id(disk),
        "backend": {"type": "socket", "data": {
            "addr": {"type": "unix", "data": {"path": path}},
            "server": false,
            "reconnect": 1,
        }},
    })
}

fn device(disk: &DiskSpec, port: usize) -> Value {
    json!({
        "driver": "vhost-user-blk-pci",
        "id": disk.id,
        "chardev": connection_id(disk),
        "num-queues": disk.num_queues,
        "queue-size": disk.queue_size,
        "bus": super::arguments::spare_port(port + 1),
    })
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::net::UnixStream,
        thread,
    };

    use super::*;
    use crate::spec::tests::sample;

    const LIMIT: Duration = Duration::from_secs(10);

    /// Answers commands so, one after the other; gives them.
    fn qemu(theirs: UnixStream, answers: &[&str]) -> thread::JoinHandle<Vec<Value>> {
        let answers: Vec<String> = answers.iter().map(|text| (*text).to_owned()).collect();
        thread::spawn(move || {
            let mut source = BufReader::new(theirs.try_clone().unwrap());
            let mut theirs = theirs;
            let answer = |text: &String| {
                let mut line = String::new();
                source.read_line(&mut line).unwrap();
                let asked: Value = serde_json::from_str(&line).unwrap();
                let id = &asked["id"];
                writeln!(theirs, "{{{text},\"id\":{id}}}").unwrap();
                asked
            };
            answers.iter().map(answer).collect()
        })
    }

    #[test]
    fn a_disk_takes_a_port_and_gives_it_back() {
        let (mut monitor, theirs) = Monitor::pair().unwrap();
        let done = r#""return":{}"#;
        let busy = r#""error":{"desc":"Chardev 'root-connection' is busy"}"#;
        let unplugging = r#""error":{"desc":"Device root is already in the process of unplug"}"#;
        let gone = r#""error":{"desc":"Device 'root' not found"}"#;
        let answers = [done, done, done, busy, unplugging, busy, gone, done];
        let qemu = qemu(theirs.into(), &answers);
        let disk = &sample().disks[0];
        let mut ports = Ports::new(1);
        ports.add(&mut monitor, disk, LIMIT).unwrap();
        let other = DiskSpec {
            id: "other".into(),
            ..disk.clone()
        };
        let error = ports.add(&mut monitor, &other, LIMIT).unwrap_err();
        assert_eq!(error.to_string(), "all 1 places for disks are taken");
        let error = ports.add(&mut monitor, disk, LIMIT).unwrap_err();
        assert_eq!(error.to_string(), "there is a disk 'root'");
        for is_gone in [false, false, true, true] {
            assert_eq!(ports.remove(&mut monitor, "root", LIMIT), Ok(is_gone));
        }
        let asked = qemu.join().unwrap();
        let backend = &asked[0]["arguments"]["backend"]["data"];
        assert_eq!(backend["addr"]["data"]["path"], "/run/x/root,1.sock");
        assert_eq!(backend["reconnect"], 1);
        assert_eq!(asked[1]["arguments"]["bus"], "spare1");
        assert_eq!(asked[1]["arguments"]["chardev"], "root-connection");
        assert_eq!(asked[7]["execute"], "chardev-remove");
        assert_eq!(ports.0, [None]);
    }

    #[test]
    fn what_qemu_does_not_want_leaves_nothing() {
        let (mut monitor, theirs) = Monitor::pair().unwrap();
        let (done, no) = (r#""return":{}"#, r#""error":{"desc":"no such backend"}"#);
        let qemu = qemu(theirs.into(), &[done, no, done]);
        let mut ports = Ports::new(1);
        let error = ports.add(&mut monitor, &sample().disks[0], LIMIT);
        assert_eq!(error, Err(MonitorError::Refused("no such backend".into())));
        assert_eq!(qemu.join().unwrap()[2]["execute"], "chardev-remove");
        assert_eq!(ports.0, [None]);
    }
}
