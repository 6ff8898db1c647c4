//! Front ends that lie in the fields of FUSE: numbers, names, sizes, offsets,
//! nodes and handles.

use pericarp_tests::fs::wire::posix::{O_RDONLY, O_RDWR, PUNCH_HOLE, SEEK_DATA};
use pericarp_tests::fs::wire::{Body, ENTRY, ROOT, feature, op};
use pericarp_tests::fs::{Client, Wrong, refused, transfer_body};
use rustix::io::Errno;

use crate::pattern;
use crate::stage::{
    Act, Ground, Outcome, UNKNOWN, must, play, said_no, said_something, turned_down,
};

#[test]
fn numbers() {
    play(
        "numbers",
        vec![
            Act::new("unknown requests", |c, _| {
                for opcode in [0, 7, 19, 60, 99, 4095, 4096, 1 << 20, 436_207_616, u32::MAX] {
                    let answer = c.ask(opcode, ROOT, [0; 64], 64);
                    refused(answer, &[Errno::NOSYS])
                        .map_err(|wrong| format!("opcode {opcode}: {wrong}"))?;
                }
                Ok(())
            }),
            Act::new("unknown nodes", |c, g| {
                for node in [
                    0,
                    2000,
                    g.file.node ^ (1 << 40),
                    u64::MAX,
                    u64::MAX - 1,
                    1 << 63,
                ] {
                    every_call(c, node, g.fh)?;
                }
                Ok(())
            }),
            Act::new("a node that was forgotten", |c, _| {
                let node = c.mkdir(ROOT, "new", 0o700)?.node;
                c.rmdir(ROOT, "new")?;
                c.forget(node, 1)?;
                every_call(c, node, 0)
            }),
            Act::new("unknown handles", |c, g| {
                for fh in [g.fh + 1000, g.dirh + 1000, u64::MAX, 1 << 32, 1 << 63] {
                    handles(c, g, fh)?;
                }
                Ok(())
            }),
            Act::new("handles of another kind", |c, g| {
                said_no(c.read(g.file.node, g.dirh, 0, 100))?;
                said_no(c.write(g.file.node, g.dirh, 0, b"x"))?;
                said_no(c.readdir(g.dir.node, g.fh, 0, 4096))?;
                said_no(c.readdirplus(g.dir.node, g.fh, 0, 4096))?;
                said_no(c.fallocate(g.file.node, g.dirh, 0, 4096, 0))?;
                said_no(c.copy_file_range((g.file.node, g.dirh, 0), (g.file.node, g.fh, 0), 10))
            }),
            // The node is not what a handle goes by, but it may be compared.
            Act::new("handles of another node", |c, g| {
                said_something(c.read(g.dir.node, g.fh, 0, 100))?;
                said_something(c.read(ROOT, g.fh, 0, 100))?;
                said_something(c.readdir(g.file.node, g.dirh, 0, 4096))?;
                said_something(c.getattr_of(g.dir.node, g.fh))
            }),
            Act::new("RELEASE of what is not open", |c, g| {
                said_something(c.release(g.file.node, g.fh + 1000))?;
                said_something(c.releasedir(g.dir.node, g.fh + 1000))?;
                said_something(c.releasedir(g.dir.node, g.fh))?;
                said_something(c.release(g.file.node, g.dirh))?;
                c.release(g.file.node, g.fh).or_else(known)?;
                said_no(c.read(g.file.node, g.fh, 0, 10))?;
                said_something(c.release(g.file.node, g.fh))
            }),
            Act::new("files used as directories", |c, g| {
                said_no(c.lookup(g.file.node, "x"))?;
                said_no(c.opendir(g.file.node))?;
                said_no(c.mkdir(g.file.node, "x", 0o700))?;
                said_no(c.create(g.file.node, "x", 0o600, O_RDWR))?;
                said_no(c.unlink(g.file.node, "x"))?;
                said_no(c.rename((g.file.node, "x"), (ROOT, "y"), 0))?;
                said_no(c.rename((ROOT, "file"), (g.file.node, "y"), 0))?;
                said_no(c.open(g.dir.node, O_RDWR))?;
                said_no(c.readlink(g.dir.node))
            }),
            Act::new("odd flags for OPEN", |c, g| {
                for flags in [
                    3,
                    u32::MAX,
                    1 << 31,
                    0o100 | 0o200,
                    0o20_200_000,
                    0o10_000_000,
                ] {
                    said_something(c.open(g.file.node, flags))?;
                    said_something(c.ask(
                        op::OPENDIR,
                        g.dir.node,
                        Body::new().u64(flags.into()),
                        16,
                    ))?;
                    said_something(c.create(ROOT, "odd", 0o600, flags))?;
                }
                said_something(c.unlink(ROOT, "odd"))
            }),
            Act::new("odd modes", |c, _| {
                for mode in [u32::MAX, 0o170_000, 0o177_777, 0o040_000, 0o140_777] {
                    said_something(c.mknod(ROOT, "odd", mode, u32::MAX))?;
                    said_something(c.unlink(ROOT, "odd"))?;
                    said_something(c.mkdir(ROOT, "odd", mode))?;
                    said_something(c.rmdir(ROOT, "odd"))?;
                }
                Ok(())
            }),
            Act::new("SETATTR of everything", |c, g| {
                let (_, mut request) = c.request(op::SETATTR, g.file.node, &[0xff; 88]);
                request[40..44].copy_from_slice(&u32::MAX.to_le_bytes());
                let answer = c.send(&request, 120)?;
                turned_down(&answer)
            }),
        ],
    );
}

fn known(wrong: Wrong) -> Result<(), Wrong> {
    match wrong {
        Wrong::Refused(_) => Ok(()),
        wrong => Err(wrong),
    }
}

/// Each call that goes by its node alone.
fn every_call(c: &mut Client, node: u64, fh: u64) -> Outcome {
    let name =
        |what: &'static str| move |wrong: String| format!("{what} of node {node:#x}: {wrong}");
    refused(c.lookup(node, "health"), &UNKNOWN).map_err(name("LOOKUP"))?;
    refused(c.getattr(node), &UNKNOWN).map_err(name("GETATTR"))?;
    refused(c.truncate(node, 0), &UNKNOWN).map_err(name("SETATTR"))?;
    refused(c.open(node, O_RDONLY), &UNKNOWN).map_err(name("OPEN"))?;
    refused(c.opendir(node), &UNKNOWN).map_err(name("OPENDIR"))?;
    refused(c.readlink(node), &UNKNOWN).map_err(name("READLINK"))?;
    refused(c.mkdir(node, "x", 0o700), &UNKNOWN).map_err(name("MKDIR"))?;
    refused(c.create(node, "x", 0o600, O_RDWR), &UNKNOWN).map_err(name("CREATE"))?;
    refused(c.symlink(node, "x", "y"), &UNKNOWN).map_err(name("SYMLINK"))?;
    refused(c.link(node, ROOT, "x"), &UNKNOWN).map_err(name("LINK"))?;
    refused(c.unlink(node, "x"), &UNKNOWN).map_err(name("UNLINK"))?;
    refused(c.rmdir(node, "x"), &UNKNOWN).map_err(name("RMDIR"))?;
    refused(c.rename((node, "x"), (ROOT, "y"), 0), &UNKNOWN).map_err(name("RENAME"))?;
    refused(c.rename((ROOT, "file"), (node, "y"), 0), &UNKNOWN).map_err(name("RENAME"))?;
    refused(c.getxattr(node, "user.x", 64), &UNKNOWN).map_err(name("GETXATTR"))?;
    refused(c.listxattr(node, 64), &UNKNOWN).map_err(name("LISTXATTR"))?;
    said_something(c.read(node, fh, 0, 10))?;
    said_something(c.statfs(node))?;
    said_something(c.access(node, 4))?;
    c.forget(node, 1)?;
    c.batch_forget(&[(node, u64::MAX), (node, 0)])?;
    Ok(())
}

fn handles(c: &mut Client, g: &Ground, fh: u64) -> Outcome {
    let bad = [Errno::BADF];
    let file = g.file.node;
    refused(c.read(file, fh, 0, 100), &bad)?;
    refused(c.write(file, fh, 0, b"x"), &bad)?;
    refused(c.readdir(g.dir.node, fh, 0, 4096), &bad)?;
    refused(c.readdirplus(g.dir.node, fh, 0, 4096), &bad)?;
    refused(c.fsync(file, fh), &bad)?;
    refused(c.fallocate(file, fh, 0, 4096, 0), &bad)?;
    refused(c.lseek(file, fh, 0, SEEK_DATA), &bad)?;
    refused(c.copy_file_range((file, fh, 0), (file, g.fh, 0), 10), &bad)?;
    refused(c.copy_file_range((file, g.fh, 0), (file, fh, 0), 10), &bad)?;
    said_something(c.getattr_of(file, fh))?;
    said_something(c.flush(file, fh))
}

#[test]
fn ranges() {
    play(
        "ranges",
        vec![
            Act::new("READ from 2^63 on", |c, g| offsets(c, g, op::READ)),
            Act::new("WRITE from 2^63 on", |c, g| offsets(c, g, op::WRITE)),
            Act::new("READ that ends beyond 2^63", |c, g| {
                let at = (1 << 63) - 10;
                said_something(c.read(g.file.node, g.fh, at, 100))
            }),
            Act::new("WRITE that ends beyond 2^63", |c, g| {
                said_no(c.write(g.file.node, g.fh, (1 << 63) - 10, &[1; 100]))
            }),
            Act::new("READ of nothing", |c, g| {
                must(
                    c.read(g.file.node, g.fh, 0, 0)?.is_empty(),
                    "bytes of nothing",
                )
            }),
            Act::new("WRITE of nothing", |c, g| {
                must(c.write(g.file.node, g.fh, 0, b"")? == 0, "bytes of nothing")
            }),
            Act::new("WRITE that claims more than it brings", |c, g| {
                for size in [5, 4096, 1 << 20, u32::MAX] {
                    let body = transfer_body(g.fh, 0, size, 0).bytes(b"four");
                    let answer = c.ask(op::WRITE, g.file.node, body, 8);
                    match answer {
                        Err(Wrong::Refused(_)) => {}
                        Ok(body) if body.get(..4) <= Some(&4u32.to_le_bytes()) => {}
                        other => return Err(format!("size {size}: {other:?}").into()),
                    }
                }
                must(c.getattr(g.file.node)?.size == 8192, "the file grew")
            }),
            Act::new("WRITE that claims less than it brings", |c, g| {
                let body = transfer_body(g.fh, 0, 3, 0).bytes(&[9; 100]);
                said_something(c.ask(op::WRITE, g.file.node, body, 8))?;
                let read = c.read(g.file.node, g.fh, 3, 97)?;
                must(
                    read == pattern(78, 8192)[3..100],
                    "more was written than said",
                )
            }),
            Act::new("transfers larger than agreed on", |c, g| {
                let data = vec![3; (c.agreed.max_write + 4096) as usize];
                said_something(c.write(g.file.node, g.fh, 0, &data))?;
                said_something(c.read(g.file.node, g.fh, 0, data.len() as u32))?;
                c.truncate(g.file.node, 8192)?;
                Ok(())
            }),
            Act::new("READ of 2 MiB through 512 descriptors", |c, g| {
                c.shape.reply = pericarp_tests::fs::Pieces::Of(4096);
                said_something(c.read(g.file.node, g.fh, 0, 2 << 20))
            }),
            Act::new("LSEEK anywhere", |c, g| {
                for at in [1 << 63, u64::MAX, 1 << 62] {
                    for whence in 0..8 {
                        said_something(c.lseek(g.file.node, g.fh, at, whence))?;
                    }
                }
                said_no(c.lseek(g.file.node, g.fh, 0, u32::MAX))
            }),
            Act::new("FALLOCATE anywhere", |c, g| {
                for (at, len) in [
                    (1 << 63, 1),
                    (0, 1 << 63),
                    (u64::MAX, u64::MAX),
                    (1 << 62, 1 << 62),
                ] {
                    said_no(c.fallocate(g.file.node, g.fh, at, len, 0))?;
                }
                said_no(c.fallocate(g.file.node, g.fh, 0, 0, 0))?;
                said_no(c.fallocate(g.file.node, g.fh, 0, 4096, PUNCH_HOLE))?;
                said_no(c.fallocate(g.file.node, g.fh, 0, 4096, u32::MAX))
            }),
            Act::new("COPY_FILE_RANGE anywhere", |c, g| {
                let (node, fh) = (g.file.node, g.fh);
                for (from, to, len) in [
                    (1 << 63, 0, 10),
                    (0, 1 << 63, 10),
                    (u64::MAX, u64::MAX, u64::MAX),
                    (0, 4096, u64::MAX),
                    (0, 1, 4096),
                ] {
                    said_something(c.copy_file_range((node, fh, from), (node, fh, to), len))?;
                }
                Ok(())
            }),
            Act::new("SETATTR of sizes from 2^63 on", |c, g| {
                for size in [1 << 63, u64::MAX] {
                    said_no(c.truncate(g.file.node, size))?;
                }
                must(c.getattr(g.file.node)?.size == 8192, "the file changed")
            }),
            Act::new("listings from anywhere", |c, g| {
                for cookie in [1, 1 << 40, 1 << 63, u64::MAX] {
                    said_something(c.readdir(g.dir.node, g.dirh, cookie, 4096))?;
                    said_something(c.readdirplus(g.dir.node, g.dirh, cookie, 4096))?;
                }
                for size in [0, 1, 23, 24, 151, 152] {
                    said_something(c.readdir(g.dir.node, g.dirh, 0, size))?;
                    said_something(c.readdirplus(g.dir.node, g.dirh, 0, size))?;
                }
                let names = c.readdir(g.dir.node, g.dirh, 0, 4096)?;
                must(
                    names.iter().any(|name| name.name == "inner"),
                    "a name is missing",
                )
            }),
        ],
    );
}

fn offsets(c: &mut Client, g: &Ground, opcode: u32) -> Outcome {
    for at in [1 << 63, (1 << 63) + 4096, u64::MAX - 1, u64::MAX] {
        let answer = if opcode == op::READ {
            c.read(g.file.node, g.fh, at, 100).map(drop)
        } else {
            c.write(g.file.node, g.fh, at, b"data").map(drop)
        };
        let no = [Errno::INVAL, Errno::OVERFLOW, Errno::FBIG];
        refused(answer, &no).map_err(|wrong| format!("offset {at:#x}: {wrong}"))?;
    }
    let read = c.read(g.file.node, g.fh, 0, 8192)?;
    must(read == pattern(78, 8192), "the file changed")
}

#[test]
fn names() {
    play(
        "names",
        vec![
            Act::new("names without an end", |c, _| {
                for opcode in [op::LOOKUP, op::UNLINK, op::RMDIR, op::REMOVEXATTR] {
                    said_no(c.ask(opcode, ROOT, b"health".to_vec(), ENTRY as u32))?;
                }
                let body = Body::new().u32(0o700).u32(0).bytes(b"new");
                said_no(c.ask(op::MKDIR, ROOT, body, ENTRY as u32))
            }),
            Act::new("an empty name", |c, _| bad_name(c, "")),
            Act::new("a name of '.'", |c, _| bad_name(c, ".")),
            Act::new("a name of '..'", |c, _| bad_name(c, "..")),
            Act::new("a name with a slash", |c, _| bad_name(c, "dir/inner")),
            Act::new("a name of a slash", |c, _| bad_name(c, "/")),
            Act::new("a name with a slash at its end", |c, _| bad_name(c, "dir/")),
            Act::new("a name of 256 bytes", |c, _| bad_name(c, &"n".repeat(256))),
            Act::new("a name of 4095 bytes", |c, _| {
                bad_name(c, &"n".repeat(4095))
            }),
            Act::new("a name of 60,000 bytes", |c, _| {
                bad_name(c, &"n".repeat(60_000))
            }),
            Act::new("a name of 255 bytes", |c, _| {
                let name = "n".repeat(255);
                c.mkdir(ROOT, &name, 0o700)?;
                c.rmdir(ROOT, &name).map_err(Into::into)
            }),
            Act::new("a name that is no text", |c, _| {
                let body = Body::new()
                    .u32(0o700)
                    .u32(0)
                    .bytes(&[0xff, 0xfe, 1, b'\n', 0]);
                c.ask(op::MKDIR, ROOT, body, ENTRY as u32)?;
                let body = Body::new().bytes(&[0xff, 0xfe, 1, b'\n', 0]);
                c.ask(op::RMDIR, ROOT, body, 0)
                    .map(drop)
                    .map_err(Into::into)
            }),
            Act::new("bytes behind a name", |c, _| {
                said_something(c.ask(op::LOOKUP, ROOT, b"health\0more\0".to_vec(), ENTRY as u32))
            }),
            Act::new("one name where two belong", |c, g| {
                let body = Body::new().u64(g.dir.node).u64(0);
                said_no(c.ask(op::RENAME2, ROOT, body.clone().name("file"), 0))?;
                said_no(c.ask(op::RENAME2, ROOT, body.name("file").bytes(b"new"), 0))?;
                said_no(c.ask(op::SYMLINK, ROOT, Body::new().name("new"), ENTRY as u32))?;
                said_no(c.ask(op::RENAME, ROOT, Body::new().u64(1).name("file"), 0))
            }),
            Act::new("an empty target of a link", |c, _| {
                said_no(c.symlink(ROOT, "new", ""))
            }),
            Act::new("a target of 5000 bytes", |c, _| {
                said_no(c.symlink(ROOT, "new", &"t".repeat(5000)))
            }),
        ],
    );
}

fn bad_name(c: &mut Client, name: &str) -> Outcome {
    let what = |what: &'static str| {
        let name: String = name.chars().take(20).collect();
        move |wrong: Box<dyn std::error::Error>| format!("{what} '{name}': {wrong}")
    };
    if ![".", ".."].contains(&name) {
        said_no(c.lookup(ROOT, name)).map_err(what("LOOKUP"))?;
    }
    said_no(c.mkdir(ROOT, name, 0o700)).map_err(what("MKDIR"))?;
    said_no(c.create(ROOT, name, 0o600, O_RDWR)).map_err(what("CREATE"))?;
    said_no(c.mknod(ROOT, name, 0o100_600, 0)).map_err(what("MKNOD"))?;
    said_no(c.symlink(ROOT, name, "x")).map_err(what("SYMLINK"))?;
    said_no(c.unlink(ROOT, name)).map_err(what("UNLINK"))?;
    said_no(c.rmdir(ROOT, name)).map_err(what("RMDIR"))?;
    said_no(c.rename((ROOT, "file"), (ROOT, name), 0)).map_err(what("RENAME to"))?;
    said_no(c.rename((ROOT, name), (ROOT, "new"), 0)).map_err(what("RENAME of"))?;
    let file = c.lookup(ROOT, "file")?.node;
    said_no(c.link(file, ROOT, name)).map_err(what("LINK"))?;
    Ok(())
}

#[test]
fn counts() {
    play(
        "counts",
        vec![
            Act::new("FORGET more than was looked up", |c, g| {
                c.forget(g.dir.node, u64::MAX)?;
                c.forget(g.dir.node, u64::MAX)?;
                let dir = c.lookup(ROOT, "dir")?;
                must(dir.attr == g.dir.attr, "another directory")?;
                c.getattr(dir.node).map(drop).map_err(Into::into)
            }),
            Act::new("FORGET of the root", |c, _| {
                for count in [1, u64::MAX, u64::MAX] {
                    c.forget(ROOT, count)?;
                }
                c.batch_forget(&[(ROOT, u64::MAX), (ROOT, 1)])?;
                c.getattr(ROOT).map(drop).map_err(Into::into)
            }),
            Act::new("FORGET of nothing", |c, g| {
                c.forget(g.dir.node, 0)?;
                c.getattr(g.dir.node).map(drop).map_err(Into::into)
            }),
            Act::new("FORGET of what is open", |c, g| {
                c.forget(g.file.node, 1)?;
                said_something(c.read(g.file.node, g.fh, 0, 100))?;
                said_something(c.release(g.file.node, g.fh))
            }),
            Act::new("BATCH_FORGET that claims more than it brings", |c, g| {
                for count in [2, 1000, 1 << 28, u32::MAX] {
                    let body = Body::new().u32(count).u32(0).u64(g.dir.node).u64(0);
                    c.tell(op::BATCH_FORGET, 0, body)?;
                }
                c.getattr(g.dir.node).map(drop).map_err(Into::into)
            }),
            Act::new("BATCH_FORGET that claims less than it brings", |c, g| {
                let body = Body::new().u32(0).u32(0).u64(g.dir.node).u64(1);
                c.tell(op::BATCH_FORGET, 0, body)?;
                c.getattr(g.dir.node).map(drop).map_err(Into::into)
            }),
            Act::new("a BATCH_FORGET of 60,000", |c, g| {
                c.batch_forget(&vec![(g.dir.node, 0); 60_000])?;
                c.getattr(g.dir.node).map(drop).map_err(Into::into)
            }),
            Act::new("SETXATTR that claims more than it brings", |c, g| {
                for size in [5, 4096, 1 << 20, u32::MAX] {
                    let body = xattr(c, size).name("user.lie").bytes(b"four");
                    said_no(c.ask(op::SETXATTR, g.file.node, body, 0))
                        .map_err(|wrong| format!("size {size}: {wrong}"))?;
                }
                said_no(c.getxattr(g.file.node, "user.lie", 64))
            }),
            Act::new("SETXATTR that claims less than it brings", |c, g| {
                let body = xattr(c, 2).name("user.short").bytes(b"four");
                said_something(c.ask(op::SETXATTR, g.file.node, body, 0))?;
                match c.getxattr(g.file.node, "user.short", 64) {
                    Ok(value) => must(value == b"fo", format!("{value:?}")),
                    Err(Wrong::Refused(_)) => Ok(()),
                    Err(wrong) => Err(wrong.into()),
                }
            }),
            Act::new("attributes without names", |c, g| {
                let file = g.file.node;
                let body = xattr(c, 4).bytes(b"user.no end");
                said_no(c.ask(op::SETXATTR, file, body, 0))?;
                said_no(c.setxattr(file, "", b"x", 0))?;
                said_no(c.getxattr(file, "", 64))?;
                said_no(c.removexattr(file, ""))?;
                said_no(c.setxattr(file, &"user.".repeat(100), b"x", 0))?;
                said_no(c.setxattr(file, "user.flags", b"x", u32::MAX))
            }),
            Act::new("an attribute of 128 KiB", |c, g| {
                said_no(c.setxattr(g.file.node, "user.big", &vec![1; 1 << 17], 0))
            }),
            Act::new("attributes with room for 4 GiB", |c, g| {
                let body = Body::new().u32(u32::MAX).u32(0).name("user.x");
                said_no(c.ask(op::GETXATTR, g.file.node, body, 64))?;
                let body = Body::new().u32(u32::MAX).u32(0);
                said_something(c.ask(op::LISTXATTR, g.file.node, body, 64))
            }),
        ],
    );
}

fn xattr(c: &Client, size: u32) -> Body {
    let body = Body::new().u32(size).u32(0);
    if c.agreed.features & feature::SETXATTR_EXT == 0 {
        body
    } else {
        body.u64(0)
    }
}
