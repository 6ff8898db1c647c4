//! Finds the machine's disks by the serial their backends report.
//!
//! Device names such as `vda` depend on the order of probing; serials do not. Called once after
//! the block driver is loaded.

use std::{collections::HashMap, fs, io, path::Path, time::Duration};

use pericarp_protocol::RunSpec;

use crate::error::InitError;

const TRIES: u32 = 1000;
const PAUSE: Duration = Duration::from_millis(5);
/// Where the guest's programs find them.
const LINKS: &str = "/dev/pericarp";

/// Device names by disk id.
pub(crate) type Disks = HashMap<String, String>;

/// Waits for every disk of `spec` and links it as `/dev/pericarp/<id>`.
pub(crate) fn find(spec: &RunSpec) -> Result<Disks, InitError> {
    let wanted: Vec<&str> = std::iter::once(&spec.root)
        .chain(&spec.disks)
        .map(|disk| disk.id.as_str())
        .collect();
    let mut found = Disks::new();
    for _ in 0..TRIES {
        found = present(Path::new("/sys/block"));
        if wanted.iter().all(|id| found.contains_key(*id)) {
            return match link(&wanted, &found) {
                Ok(()) => Ok(found),
                Err(source) => Err(InitError::System {
                    what: LINKS.into(),
                    source,
                }),
            };
        }
        std::thread::sleep(PAUSE);
    }
    let missing = wanted
        .into_iter()
        .find(|id| !found.contains_key(*id))
        .unwrap_or_default();
    Err(InitError::NoDisk(missing.to_owned()))
}

/// The disks whose serial can be read now.
fn present(blocks: &Path) -> Disks {
    let Ok(entries) = fs::read_dir(blocks) else {
        return Disks::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let serial = fs::read_to_string(entry.path().join("serial")).ok()?;
            let serial = serial.trim_matches(['\0', '\n', ' ']);
            let device = entry.file_name().into_string().ok()?;
            (!serial.is_empty()).then(|| (serial.to_owned(), device))
        })
        .collect()
}

fn link(wanted: &[&str], found: &Disks) -> io::Result<()> {
    fs::create_dir_all(LINKS)?;
    for id in wanted {
        // The host's ids are checked on its side; a slash here would only fail.
        std::os::unix::fs::symlink(format!("../{}", found[*id]), format!("{LINKS}/{id}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_known_by_serial_only() {
        let dir = std::env::temp_dir().join(format!("pericarp-disks-{}", std::process::id()));
        for (device, serial) in [("vda", Some("root\n")), ("vdb", Some("")), ("loop0", None)] {
            fs::create_dir_all(dir.join(device)).unwrap();
            if let Some(serial) = serial {
                fs::write(dir.join(device).join("serial"), serial).unwrap();
            }
        }
        let found = present(&dir);
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(found, Disks::from([("root".to_owned(), "vda".to_owned())]));
    }
}
