//! Kernel parameters of the machine, which its containers share.
//!
//! Set once, by `pod`, when the machine is configured. Which ones a pod may have is the host's
//! decision; here a name must only be one.

use std::{fs, path::PathBuf};

use crate::error::{RequestError, trying};

const TOP: &str = "/proc/sys";
const MAX_VALUE: usize = 4096;

/// Sets `name`, such as `net.core.somaxconn`.
pub(crate) fn set(name: &str, value: &str) -> Result<(), RequestError> {
    let place = place(name)?;
    if value.len() > MAX_VALUE {
        return Err(RequestError::Invalid(format!(
            "the value of the kernel parameter '{name}' is longer than {MAX_VALUE} bytes"
        )));
    }
    fs::write(place, value).map_err(trying(format!("the kernel parameter '{name}'")))
}

/// The file of a parameter. A slash in a name stands for a dot in a part of it, as sysctl(8) has
/// it for interfaces (`net.ipv4.conf.eth0/1.forwarding`).
fn place(name: &str) -> Result<PathBuf, RequestError> {
    let mut place = PathBuf::from(TOP);
    for part in name.split('.') {
        let part = part.replace('/', ".");
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.@".contains(c);
        if matches!(part.as_str(), "" | "." | "..") || !part.chars().all(plain) {
            return Err(RequestError::Invalid(format!(
                "'{name}' is no name of a kernel parameter"
            )));
        }
        place.push(part);
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_files_below_the_top() {
        let file = |name| place(name).unwrap().display().to_string();
        assert_eq!(file("kernel.msgmax"), "/proc/sys/kernel/msgmax");
        let vlan = file("net.ipv4.conf.eth0/1.forwarding");
        assert_eq!(vlan, "/proc/sys/net/ipv4/conf/eth0.1/forwarding");
        for bad in ["", "a..b", "net.//", "net./", "a b", "net.\0"] {
            assert!(place(bad).is_err(), "{bad}");
        }
    }
}
