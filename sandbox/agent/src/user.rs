//! Who a process runs as: looked up in the container's own `/etc/passwd` and `/etc/group`.
//!
//! The rules are those of docker and podman (`GetExecUser`): a number need not be in the files; a
//! user without a named group gets the groups it is a member of. Called by `container` before a
//! process is registered.

use std::io;

use crate::{error::RequestError, inside::Inside};

/// Longest file that is read.
const MAX_FILE: u64 = 1 << 20;
/// `NGROUPS_MAX` of the kernel is higher; no image has as many.
const MAX_GROUPS: usize = 1024;

/// A user with its groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

/// Looks `wanted` up: "name", "uid", "name:group", "uid:gid"; empty is root.
pub(crate) fn find(inside: &Inside, wanted: &str) -> Result<User, RequestError> {
    let file = |path: &str| {
        inside.read(path, MAX_FILE).map_err(|source: io::Error| {
            RequestError::Invalid(format!("{path} of the container cannot be read: {source}"))
        })
    };
    resolve(wanted, &file("/etc/passwd")?, &file("/etc/group")?)
}

/// The user that the host has looked up already, with the home that the container's files give it.
pub(crate) fn numbered(
    inside: &Inside,
    (uid, gid, groups): (u32, u32, Vec<u32>),
) -> Result<User, RequestError> {
    let found = find(inside, &uid.to_string())?;
    Ok(User {
        uid,
        gid,
        groups,
        home: found.home,
    })
}

struct PasswdLine<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_line(line: &str) -> Option<PasswdLine<'_>> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, ..] = fields[..] else {
        return None;
    };
    Some(PasswdLine {
        name,
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        home,
    })
}

fn resolve(wanted: &str, passwd: &str, group: &str) -> Result<User, RequestError> {
    let (user_name, group_name) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (wanted, None),
    };
    let user_name = if user_name.is_empty() { "0" } else { user_name };
    let number = user_name.parse::<u32>().ok();
    let found = passwd
        .lines()
        .filter_map(passwd_line)
        .find(|line| line.name == user_name || number == Some(line.uid));
    let mut user = match (&found, number) {
        (Some(line), _) => User {
            uid: line.uid,
            gid: line.gid,
            groups: Vec::new(),
            home: line.home.to_owned(),
        },
        (None, Some(uid)) => User {
            uid,
            gid: 0,
            groups: Vec::new(),
            home: String::new(),
        },
        (None, None) => {
            return Err(RequestError::Invalid(format!(
                "there is no user '{user_name}' in the container's /etc/passwd"
            )));
        }
    };
    if !user.home.starts_with('/') {
        user.home = "/".to_owned();
    }
    match group_name {
        Some(name) => user.gid = group_number(name, group)?,
        None => {
            if let Some(line) = found {
                user.groups = memberships(line.name, group);
            }
        }
    }
    // The kernel takes the largest number for "unchanged".
    if user.uid == u32::MAX || user.gid == u32::MAX {
        return Err(RequestError::Invalid(format!(
            "'{wanted}' is no user: ids are less than {}",
            u32::MAX
        )));
    }
    Ok(user)
}

fn group_number(name: &str, group: &str) -> Result<u32, RequestError> {
    let number = name.parse::<u32>().ok();
    group
        .lines()
        .filter_map(group_line)
        .find(|(known, gid, _)| *known == name || number == Some(*gid))
        .map(|(_, gid, _)| gid)
        .or(number)
        .ok_or_else(|| {
            RequestError::Invalid(format!(
                "there is no group '{name}' in the container's /etc/group"
            ))
        })
}

fn memberships(user: &str, group: &str) -> Vec<u32> {
    group
        .lines()
        .filter_map(group_line)
        .filter(|(_, _, members)| members.split(',').any(|member| member.trim() == user))
        .map(|(_, gid, _)| gid)
        .take(MAX_GROUPS)
        .collect()
}

/// Name, number, members.
fn group_line(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let (name, _, gid, members) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next().unwrap_or(""),
    );
    Some((name, gid.parse().ok()?, members))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
# a comment
broken:x:one:2::/:
web:x:33:33:www:/var/www:/usr/sbin/nologin
homeless:x:34:34:::
";
    const GROUP: &str = "root:x:0:\nweb:x:33:\nlog:x:4:web,root\nssl:x:110: web\nshort:x:7\n";

    fn user(wanted: &str) -> (u32, u32, Vec<u32>, String) {
        let user = resolve(wanted, PASSWD, GROUP).unwrap();
        (user.uid, user.gid, user.groups, user.home)
    }

    #[test]
    fn names_and_numbers_are_looked_up() {
        assert_eq!(user(""), (0, 0, vec![4], "/root".into()));
        assert_eq!(user("web"), (33, 33, vec![4, 110], "/var/www".into()));
        assert_eq!(user("33"), user("web"));
        assert_eq!(user("web:log"), (33, 4, vec![], "/var/www".into()));
        assert_eq!(user("web:7"), (33, 7, vec![], "/var/www".into()));
        assert_eq!(user("web:"), user("web"));
        assert_eq!(user("homeless").3, "/");
    }

    #[test]
    fn numbers_need_not_be_known() {
        assert_eq!(user("1234"), (1234, 0, vec![], "/".into()));
        assert_eq!(user("1234:5678"), (1234, 5678, vec![], "/".into()));
        let empty = resolve("", "", "").unwrap();
        assert_eq!((empty.uid, empty.gid, empty.home), (0, 0, "/".into()));
    }

    #[test]
    fn strangers_are_refused() {
        for wanted in ["nobody", "web:nogroup", "-1", "4294967295", "0:4294967295"] {
            assert!(
                matches!(
                    resolve(wanted, PASSWD, GROUP),
                    Err(RequestError::Invalid(_))
                ),
                "{wanted}"
            );
        }
    }
}
