//! Whether something below a directory is served by another process or machine,
//! from the kernel's table of mounts. `prepare` asks before the process is
//! confined, unless it follows what is mounted later: nobody knows what that will be.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Their types; FUSE has one for each program besides.
const TYPES: [&str; 10] = [
    "fuse", "fuseblk", "virtiofs", "nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "afs",
];

/// What the table says of mounts below `directory`, which is canonical. Without a
/// table nothing is known, and nothing said.
pub(crate) fn is_below(directory: &Path) -> bool {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    table
        .split(|byte| *byte == b'\n')
        .filter_map(mount)
        .any(|(place, kind)| {
            let served = TYPES.contains(&&*kind) || kind.starts_with("fuse.");
            served && place.starts_with(directory)
        })
}

/// Where a line's mount is, and its type (proc_pid_mountinfo(5)).
fn mount(line: &[u8]) -> Option<(PathBuf, String)> {
    let mut fields = line.split(|byte| *byte == b' ');
    let place = plain(fields.nth(4)?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    let place = PathBuf::from(OsString::from_vec(place));
    Some((place, String::from_utf8_lossy(kind).into_owned()))
}

/// Spaces and the like are written as a backslash and three octal digits.
fn plain(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, others)) = rest.split_first() {
        let octal = others.first_chunk::<3>().filter(|_| *first == b'\\');
        let value = octal.and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        bytes.push(value.unwrap_or(*first));
        rest = match value {
            Some(_) => &others[3..],
            None => others,
        };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_where_and_what() {
        let line =
            b"36 35 98:0 /mnt1 /a\\040b/c rw,noatime master:1 shared:2 - fuse.sshfs /dev/root rw";
        let (place, kind) = mount(line).unwrap();
        assert_eq!(
            (place.as_path(), &*kind),
            (Path::new("/a b/c"), "fuse.sshfs")
        );
        assert!(place.starts_with("/a b"));
        assert!(!place.starts_with("/a"));
        let (place, kind) = mount(b"1 2 0:5 / /x\\134 rw - nfs4 h:/ rw").unwrap();
        assert_eq!((place.as_path(), &*kind), (Path::new("/x\\"), "nfs4"));
        assert_eq!(mount(b""), None);
        assert_eq!(mount(b"1 2 3 4 5 6 - "), Some(("5".into(), String::new())));
        assert_eq!(plain(b"\\9\\04"), b"\\9\\04");
    }

    #[test]
    fn nothing_is_below_what_is_not_there() {
        assert!(!is_below(Path::new("/no/such/directory")));
    }
}
