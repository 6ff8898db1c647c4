//! Users by name or number, as a container's own files know them.
//!
//! Called for containers on the host, whose runtime wants numbers; in a virtual machine the agent
//! does this. The files are the image's: opened without leaving its root, bounded, and a line that
//! makes no sense is no line.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use thiserror::Error;

const MOST_FILE: u64 = 4 << 20;
/// The kernel's `NGROUPS_MAX`.
const MOST_GROUPS: usize = 65_536;

/// Whom a process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// The other groups the user is in; none when a group was named.
    pub additional_gids: Vec<u32>,
}

/// A user the container does not have.
#[derive(Debug, Error)]
pub enum UserError {
    /// No such name.
    #[error("the container's /etc/{file} has no {what} '{name}'; name one it has, or use a number")]
    Unknown {
        /// `passwd` or `group`.
        file: &'static str,
        /// Which.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Neither a name nor a number.
    #[error("user '{0}' is not of the form USER[:GROUP], names or numbers up to 4294967294")]
    Form(String),
    /// A file of the container.
    #[error("the container's /etc/{file} cannot be read: {source}")]
    Read {
        /// Which.
        file: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Looks `user[:group]` up below `root`. A number needs no entry; then its group is 0.
pub fn look_up(root: &Path, text: &str) -> Result<User, UserError> {
    let read = |file| match read_inside(root, file) {
        Ok(content) => Ok(content),
        // A container made of one program has neither.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(UserError::Read { file, source }),
    };
    resolve(text, &read("passwd")?, &read("group")?)
}

fn resolve(text: &str, passwd: &str, group: &str) -> Result<User, UserError> {
    let form = || UserError::Form(crate::image::printable(text));
    let (name, group_name) = match text.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (text, None),
    };
    if (name.is_empty() && !text.is_empty())
        || group_name.is_some_and(|it| it.is_empty() || it.contains(':'))
    {
        return Err(form());
    }
    let name = if name.is_empty() { "root" } else { name };
    let number = number(name);
    let entry = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let (uid, gid) = (id(fields.get(2)?)?, id(fields.get(3)?)?);
        (fields[0] == name || number == Some(uid)).then(|| (fields[0].to_owned(), uid, gid))
    });
    let (entry_name, uid, gid) = match (entry, number) {
        (Some((name, uid, gid)), _) => (Some(name), uid, gid),
        (None, Some(uid)) if uid != u32::MAX => (None, uid, 0),
        (None, None) if name == "root" => (None, 0, 0),
        (None, Some(_)) => return Err(form()),
        (None, None) => {
            return Err(UserError::Unknown {
                file: "passwd",
                what: "user",
                name: crate::image::printable(name),
            });
        }
    };
    if let Some(group_name) = group_name {
        return Ok(User {
            uid,
            gid: group_id(group_name, group).map_err(|unknown| unknown.unwrap_or_else(form))?,
            additional_gids: Vec::new(),
        });
    }
    let member = |line: &&str| {
        let members = line.split(':').nth(3).unwrap_or_default();
        entry_name.is_some()
            && members
                .split(',')
                .any(|it| Some(it) == entry_name.as_deref())
    };
    let mut additional_gids: Vec<u32> = group
        .lines()
        .filter(member)
        .filter_map(|line| id(line.split(':').nth(2)?))
        .take(MOST_GROUPS)
        .collect();
    additional_gids.sort_unstable();
    additional_gids.dedup();
    Ok(User {
        uid,
        gid,
        additional_gids,
    })
}

fn group_id(name: &str, group: &str) -> Result<u32, Option<UserError>> {
    if let Some(number) = number(name) {
        return Some(number).filter(|&it| it != u32::MAX).ok_or(None);
    }
    group
        .lines()
        .find(|line| line.split(':').next() == Some(name))
        .and_then(|line| id(line.split(':').nth(2)?))
        .ok_or_else(|| {
            Some(UserError::Unknown {
                file: "group",
                what: "group",
                name: crate::image::printable(name),
            })
        })
}

/// A name of digits is a number; one too large is the number nobody has.
fn number(text: &str) -> Option<u32> {
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| text.parse().unwrap_or(u32::MAX))
}

fn id(text: &str) -> Option<u32> {
    number(text).filter(|&it| it != u32::MAX)
}

fn read_inside(root: &Path, file: &str) -> io::Result<String> {
    let root = rustix::fs::open(
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let file = File::from(openat2(
        &root,
        format!("etc/{file}"),
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    if file.take(MOST_FILE + 1).read_to_end(&mut bytes)? as u64 > MOST_FILE {
        return Err(io::Error::other("it is larger than 4 MiB"));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Dir;

    const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nbroken\n:::\napp:x:1000:100::/app:/bin/sh\n";
    const GROUP: &str =
        "root:x:0:\nweb:x:33:app,other\nadm:x:4:app\nbad:x:y:app\nothers:x:5:apple\n";

    fn user(uid: u32, gid: u32, additional_gids: &[u32]) -> User {
        User {
            uid,
            gid,
            additional_gids: additional_gids.to_vec(),
        }
    }

    #[test]
    fn names_and_numbers_are_looked_up() {
        for (text, expected) in [
            ("", user(0, 0, &[])),
            ("root", user(0, 0, &[])),
            ("app", user(1000, 100, &[4, 33])),
            ("1000", user(1000, 100, &[4, 33])),
            ("app:web", user(1000, 33, &[])),
            ("app:7", user(1000, 7, &[])),
            ("7", user(7, 0, &[])),
            ("7:8", user(7, 8, &[])),
            ("4294967294", user(u32::MAX - 1, 0, &[])),
        ] {
            assert_eq!(resolve(text, PASSWD, GROUP).unwrap(), expected, "{text}");
        }
        assert_eq!(resolve("", "", "").unwrap(), User::default());
        for text in [
            "nobody",
            "app:nobody",
            ":",
            "app:",
            ":web",
            "a:b:c",
            "4294967295",
            "99999999999",
            "0:4294967295",
            "-1",
        ] {
            assert!(resolve(text, PASSWD, GROUP).is_err(), "{text}");
        }
    }

    #[test]
    fn the_files_are_read_inside_the_root_only() {
        let dir = Dir::new("users");
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        assert_eq!(look_up(&root, "7").unwrap(), user(7, 0, &[]));
        std::fs::write(dir.path().join("passwd"), "evil:x:1:1::/:\n").unwrap();
        std::os::unix::fs::symlink("../../passwd", root.join("etc/passwd")).unwrap();
        assert!(look_up(&root, "evil").is_err());
        std::fs::write(root.join("passwd"), "good:x:2:2::/:\n").unwrap();
        assert_eq!(look_up(&root, "good").unwrap(), user(2, 2, &[]));
        std::fs::remove_file(root.join("etc/passwd")).unwrap();
        std::fs::create_dir(root.join("etc/passwd")).unwrap();
        assert!(matches!(
            look_up(&root, "good"),
            Err(UserError::Read { .. })
        ));
    }
}
