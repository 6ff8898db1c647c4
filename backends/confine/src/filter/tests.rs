//! The filter of who shares directories beside the source of `pericarp-share`:
//! a system call that it learns to make and the lists do not name is found here,
//! and not when a guest has the server make it on some kernel.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::*;

/// What `pericarp-share` calls of rustix, and what the kernel is asked for then;
/// on some kernels one, on some another.
const CALLS: &[(&str, &[i64])] = &[
    ("capabilities", &[SYS_capget]),
    ("chmodat", &[SYS_fchmodat]),
    ("chownat", &[SYS_fchownat]),
    ("copy_file_range", &[SYS_copy_file_range]),
    ("fallocate", &[SYS_fallocate]),
    ("fchown", &[SYS_fchown]),
    ("fcntl_dupfd_cloexec", &[SYS_fcntl]),
    ("fcntl_getfl", &[SYS_fcntl]),
    ("fcntl_setfl", &[SYS_fcntl]),
    ("fdatasync", &[SYS_fdatasync]),
    ("fgetxattr", &[SYS_fgetxattr]),
    ("flistxattr", &[SYS_flistxattr]),
    ("flock", &[SYS_flock]),
    ("fremovexattr", &[SYS_fremovexattr]),
    ("fsetxattr", &[SYS_fsetxattr]),
    ("fstat", &[SYS_fstat, SYS_newfstatat, SYS_statx]),
    ("fstatfs", &[SYS_fstatfs]),
    ("fstatvfs", &[SYS_fstatfs]),
    ("fsync", &[SYS_fsync]),
    ("ftruncate", &[SYS_ftruncate]),
    ("getegid", &[SYS_getegid]),
    ("geteuid", &[SYS_geteuid]),
    ("getgroups", &[SYS_getgroups]),
    ("getrlimit", &[SYS_prlimit64]),
    ("linkat", &[SYS_linkat]),
    // Arithmetic.
    ("makedev", &[]),
    ("mkdirat", &[SYS_mkdirat]),
    ("mknodat", &[SYS_mknodat]),
    ("mmap", &[SYS_mmap]),
    ("munmap", &[SYS_munmap]),
    ("openat", &[SYS_openat]),
    ("openat2", &[SYS_openat2]),
    ("pread", &[SYS_pread64]),
    ("preadv2", &[SYS_preadv2]),
    ("pwritev2", &[SYS_pwritev2]),
    ("readlinkat", &[SYS_readlinkat]),
    ("renameat_with", &[SYS_renameat2]),
    ("seek", &[SYS_lseek]),
    ("set_capabilities", &[SYS_capset]),
    ("set_thread_groups", &[SYS_setgroups]),
    ("set_thread_res_gid", &[SYS_setresgid]),
    ("set_thread_res_uid", &[SYS_setresuid]),
    ("statx", &[SYS_statx]),
    ("symlinkat", &[SYS_symlinkat]),
    ("syncfs", &[SYS_syncfs]),
    ("umask", &[SYS_umask]),
    ("unlinkat", &[SYS_unlinkat]),
    ("unshare_unsafe", &[SYS_unshare]),
    ("utimensat", &[SYS_utimensat]),
    ("RawDir", &[SYS_getdents64]),
    // By their own numbers.
    ("SYS_faccessat2", &[SYS_faccessat2]),
    ("SYS_fchmodat2", &[SYS_fchmodat2]),
    ("SYS_name_to_handle_at", &[SYS_name_to_handle_at]),
    ("SYS_open_by_handle_at", &[SYS_open_by_handle_at]),
    ("SETXATTRAT", &[SETXATTRAT]),
    ("GETXATTRAT", &[GETXATTRAT]),
    ("LISTXATTRAT", &[LISTXATTRAT]),
    ("REMOVEXATTRAT", &[REMOVEXATTRAT]),
];

/// Types and modules of rustix, which call nothing by themselves.
fn is_call(word: &str) -> bool {
    let modules = ["fs", "io", "mm", "path", "process", "thread", "self"];
    let lower = word.starts_with(|c: char| c.is_ascii_lowercase());
    word == "RawDir" || (lower && !modules.contains(&word))
}

/// The words of a path or of a list of names.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
}

/// What a file calls, its tests left out.
fn calls_of(text: &str, calls: &mut BTreeSet<String>) {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    for (at, _) in text.match_indices("rustix::") {
        let rest = &text[at + "rustix::".len()..];
        let used = text[..at].ends_with("use ");
        let end = match used {
            true => rest.find(';'),
            false => rest.find(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '_' | ':')),
        };
        let path = &rest[..end.unwrap_or(rest.len())];
        calls.extend(words(path).filter(|word| is_call(word)).map(str::to_owned));
    }
    // Raw ones.
    for (at, _) in text.match_indices("libc::syscall(") {
        let rest = &text[at + "libc::syscall(".len()..];
        let number = rest.split(',').next().unwrap_or_default().trim();
        calls.insert(number.trim_start_matches("libc::").to_owned());
    }
}

fn collect(dir: &Path, calls: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, calls);
        } else if path.file_name().is_some_and(|name| name != "tests.rs") {
            calls_of(&fs::read_to_string(&path).unwrap(), calls);
        }
    }
}

/// All that a filter does not kill for.
fn survived(writable: bool) -> BTreeSet<i64> {
    let handles = writable;
    let shared = shared(Opening::Trees { writable, handles });
    let profile = Profile {
        syscalls: &[],
        ioctls: &[],
        registrations: &[],
        namespaces: crate::Namespaces::ALL,
    };
    let conditional = conditional(&profile).unwrap();
    let mut calls: BTreeSet<i64> = conditional.into_keys().collect();
    calls.extend(COMMON);
    calls.extend(shared.allowed);
    calls.extend(shared.refused);
    calls.extend(shared.read_only);
    calls.extend(ABSENT.iter().chain(REFUSED));
    if shared.own_umask {
        calls.insert(SYS_unshare);
    }
    calls
}

#[test]
fn every_call_of_a_share_is_on_a_list() {
    let mut calls = BTreeSet::new();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../share/src");
    collect(&source, &mut calls);
    // Not looking at the right place would find nothing wrong either.
    assert!(calls.contains("mkdirat") && calls.contains("SYS_fchmodat2"));
    let both = [(true, survived(true)), (false, survived(false))];
    for call in &calls {
        let Some((_, numbers)) = CALLS.iter().find(|(name, _)| name == call) else {
            panic!("pericarp-share calls {call}: say here what the kernel is asked for then");
        };
        for (writable, survived) in &both {
            for number in *numbers {
                // Nobody acts as somebody else where nothing can be made.
                let acting = *number == SYS_unshare && !writable;
                assert!(
                    acting || survived.contains(number),
                    "{call} ends a server (system call {number}, writable {writable})"
                );
            }
        }
    }
    let stale: Vec<_> = CALLS
        .iter()
        .filter(|(name, _)| !calls.contains(*name))
        .collect();
    assert!(stale.is_empty(), "nobody calls {stale:?} any more");
}

/// What a writable share needs is allowed, and not just survived.
#[test]
fn a_writable_share_may_do_what_it_calls() {
    let shared = shared(Opening::Trees {
        writable: true,
        handles: true,
    });
    assert!(shared.refused.is_empty() && shared.read_only.is_empty());
    for (name, numbers) in CALLS {
        for number in *numbers {
            let refused = REFUSED.contains(number) || ABSENT.contains(number);
            let allowed = shared.allowed.contains(number);
            assert!(!refused || allowed, "{name} is refused");
        }
    }
}
