//! Extended attributes that have other names on the host, in virtiofsd's own
//! syntax, and what the host's kernel then no longer does for them.

use std::fs;
use std::path::Path;

use pericarp_tests::fs::wire::ROOT;
use pericarp_tests::fs::wire::posix::{O_RDWR, O_TRUNC};
use pericarp_tests::fs::wire::set;
use pericarp_tests::fs::{Change, Client, Options, Server, refused};
use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::io::Errno;

fn rig(test: &str, rules: &'static [&'static str]) -> Option<(Server, Client, u64)> {
    let options = Options {
        more: rules,
        ..Options::default()
    };
    let mut server = Server::for_test(test, &[], options).filter(Server::is_ours)?;
    fs::write(server.path("file"), b"0123456789").unwrap();
    let mut c = server.client().unwrap();
    let node = c.lookup(ROOT, "file").unwrap().node;
    Some((server, c, node))
}

fn on_host(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 100];
    let len = getxattr(path, name, &mut value[..]).ok()?;
    value.truncate(len);
    Some(value)
}

fn names(c: &mut Client, node: u64) -> Vec<String> {
    let list = c.listxattr(node, 4096).unwrap();
    let names = list
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    let mut names: Vec<_> = names
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn all_names_have_a_prefix_on_the_host() {
    let rules = &["--xattrmap", ":map::user.vm.:"];
    let test = "all_names_have_a_prefix_on_the_host";
    let Some((server, mut c, node)) = rig(test, rules) else {
        return;
    };
    let path = server.path("file");
    setxattr(&path, "user.own", b"host", XattrFlags::empty()).unwrap();
    // Names that this server has no right to on the host, or that mean something
    // to its kernel.
    let all = [
        "security.selinux",
        "system.posix_acl_access",
        "trusted.t",
        "user.own",
    ];
    for name in all {
        let missing = c.getxattr(node, name, 100);
        refused(missing, &[Errno::NODATA]).unwrap();
        c.setxattr(node, name, name.as_bytes(), 0).unwrap();
        assert_eq!(c.getxattr(node, name, 100).unwrap(), name.as_bytes());
        let stored = on_host(&path, &format!("user.vm.{name}"));
        assert_eq!(stored.as_deref(), Some(name.as_bytes()), "{name}");
    }
    assert_eq!(names(&mut c, node), all);
    assert_eq!(on_host(&path, "user.own").as_deref(), Some(&b"host"[..]));
    for name in all {
        c.removexattr(node, name).unwrap();
    }
    assert!(names(&mut c, node).is_empty());
    assert_eq!(on_host(&path, "user.own").as_deref(), Some(&b"host"[..]));
    let long = format!("user.{}", "x".repeat(245));
    let answer = c.setxattr(node, &long, b"", 0);
    refused(answer, &[Errno::RANGE]).unwrap();
}

#[test]
fn the_first_rule_that_matches_decides() {
    let rules = &[
        "--xattrmap",
        "/unsupported/all/security.selinux/security.selinux/ /prefix/all/trusted./user.vm./ \
         /bad/server//trusted./ /bad/client/user.vm.// /ok/all///",
    ];
    let test = "the_first_rule_that_matches_decides";
    let Some((server, mut c, node)) = rig(test, rules) else {
        return;
    };
    c.setxattr(node, "trusted.a", b"1", 0).unwrap();
    c.setxattr(node, "user.a", b"2", 0).unwrap();
    let path = server.path("file");
    assert_eq!(
        on_host(&path, "user.vm.trusted.a").as_deref(),
        Some(&b"1"[..])
    );
    assert_eq!(on_host(&path, "user.a").as_deref(), Some(&b"2"[..]));
    assert_eq!(names(&mut c, node), ["trusted.a", "user.a"]);
    // What lies under the prefix has one way to it.
    let past = c.setxattr(node, "user.vm.trusted.a", b"3", 0);
    refused(past, &[Errno::PERM]).unwrap();
    let past = c.removexattr(node, "user.vm.trusted.a");
    refused(past, &[Errno::PERM]).unwrap();
    let past = c.getxattr(node, "user.vm.trusted.a", 100);
    refused(past, &[Errno::NODATA]).unwrap();
    let label = c.setxattr(node, "security.selinux", b"l", 0);
    refused(label, &[Errno::OPNOTSUPP]).unwrap();
    let label = c.getxattr(node, "security.selinux", 100);
    refused(label, &[Errno::OPNOTSUPP]).unwrap();
}

/// CVE-2021-20263: the host's kernel takes security.capability away when a file
/// changes, and knows nothing of one that is stored under another name.
#[test]
fn a_capability_under_another_name_goes_with_a_change() {
    const NAME: &str = "security.capability";
    type Act = fn(&mut Client, u64);
    let rules = &["--xattrmap", ":map::user.vm.:"];
    let test = "a_capability_under_another_name_goes_with_a_change";
    let Some((server, mut c, node)) = rig(test, rules) else {
        return;
    };
    let path = server.path("file");
    let acts: [(&str, Act); 7] = [
        ("write", |c, node| {
            let fh = c.open(node, O_RDWR).unwrap();
            c.write(node, fh, 0, b"x").unwrap();
            c.release(node, fh).unwrap();
        }),
        ("truncate", |c, node| {
            c.truncate(node, 5).unwrap();
        }),
        ("truncate by handle", |c, node| {
            let fh = c.open(node, O_RDWR).unwrap();
            let change = Change {
                valid: set::SIZE | set::FH,
                fh,
                size: 4,
                ..Change::default()
            };
            c.setattr(node, change).unwrap();
            c.release(node, fh).unwrap();
        }),
        ("open and cut", |c, node| {
            let fh = c.open(node, O_RDWR | O_TRUNC).unwrap();
            c.release(node, fh).unwrap();
        }),
        ("chown", |c, node| {
            let change = Change {
                valid: set::UID,
                uid: 1,
                ..Change::default()
            };
            c.setattr(node, change).unwrap();
        }),
        ("allocate", |c, node| {
            let fh = c.open(node, O_RDWR).unwrap();
            c.fallocate(node, fh, 0, 100, 0).unwrap();
            c.release(node, fh).unwrap();
        }),
        ("copy", |c, node| {
            let fh = c.open(node, O_RDWR).unwrap();
            c.copy_file_range((node, fh, 0), (node, fh, 50), 10)
                .unwrap();
            c.release(node, fh).unwrap();
        }),
    ];
    for (what, act) in acts {
        c.setxattr(node, NAME, b"capability", 0).unwrap();
        assert!(on_host(&path, "user.vm.security.capability").is_some());
        // Reading takes nothing away, nor does a change of the mode.
        let fh = c.open(node, O_RDWR).unwrap();
        c.read(node, fh, 0, 10).unwrap();
        c.release(node, fh).unwrap();
        let change = Change {
            valid: set::MODE,
            mode: 0o644,
            ..Change::default()
        };
        c.setattr(node, change).unwrap();
        assert!(c.getxattr(node, NAME, 100).is_ok(), "before {what}");
        act(&mut c, node);
        let left = c.getxattr(node, NAME, 100);
        refused(left, &[Errno::NODATA]).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
}
