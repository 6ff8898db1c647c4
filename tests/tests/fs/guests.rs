//! Linux's own driver: under User-mode Linux at native speed, and in QEMU with
//! a stock kernel. What the guest does is checked in the guest and on the host.
//!
//! A peer on the `vhost` crate refuses the memory table of User-mode Linux: to
//! prove these tests against it, put `pericarp_tests::relay` in between.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use pericarp_tests::bounded::{Alone, OneCpu};
use pericarp_tests::fs::mounted::attach;
use pericarp_tests::fs::{Options, Server, TAG};
use pericarp_tests::guest::{Assets, emulated, exit_code, initramfs};
use pericarp_tests::parts::Part;
use pericarp_tests::process::Process;
use pericarp_tests::uml::Machine;

/// With an emulated CPU all of it takes about a minute.
const LIMIT: Duration = Duration::from_secs(180);

/// Loads the driver, which User-mode Linux has as modules, and mounts.
pub(crate) const MOUNT: &str = r#"
modules=/usr/lib/uml/modules/$(uname -r)/kernel/fs/fuse
insmod $modules/fuse.ko
insmod $modules/virtiofs.ko
mkdir share
mount -t virtiofs "$tag" share
"#;

/// What a shell and its programs do to files. Runs under dash and busybox.
const FILES: &str = r#"
cd share
mkdir -p tree/a/b/c
echo hello >tree/a/file
[ "$(cat tree/a/file)" = hello ]
echo more >>tree/a/file
[ "$(wc -l <tree/a/file)" -eq 2 ]
ln tree/a/file tree/hard
[ "$(stat -c %h tree/hard)" -eq 2 ]
ln -s a/file tree/soft
[ "$(cat tree/soft)" = "$(cat tree/a/file)" ]
mv tree/a/file tree/a/b/moved
[ ! -e tree/a/file ]
[ -e tree/hard ]
chmod 640 tree/hard
[ "$(stat -c %a tree/a/b/moved)" = 640 ]
chown 1000:1001 tree/hard
[ "$(stat -c %u:%g tree/hard)" = 1000:1001 ]
mkfifo tree/fifo
( echo through >tree/fifo ) &
[ "$(cat tree/fifo)" = through ]
wait
# Open, without a name, and larger than one request.
exec 3<>tree/open
rm tree/open
dd if=/dev/zero bs=64k count=64 >&3 2>/dev/null
exec 3>&-
dd if=/dev/urandom of=data bs=1M count=24 2>/dev/null
cp data copy
sync
echo 3 >/proc/sys/vm/drop_caches
cmp data copy
truncate -s 5000 copy
[ "$(stat -c %s copy)" -eq 5000 ]
# A directory that does not fit one listing.
mkdir many
i=0
while [ $i -lt 500 ]; do : >many/file$i; i=$((i + 1)); done
[ "$(ls many | wc -l)" -eq 500 ]
rm -r many
[ ! -e many ]
# Made by the host.
[ "$(cat host/made)" = "by the host" ]
echo files well
"#;

/// Random writes whose blocks carry a checksum, verified; mapped, buffered, direct.
const VERIFIED: &str = r#"
for job in "psync 0" "psync 1" "mmap 0" "io_uring 1"; do
    set -- $job
    # Linux 6.1 maps no file that bypasses its cache.
    [ $1,$cache != mmap,never ] || continue
    fio --name=verify-$1-$2 --directory=. --ioengine=$1 --direct=$2 --iodepth=16 --rw=randrw \
        --rwmixread=50 --bs=4k --size=4m --verify=crc32c --verify_fatal=1 --do_verify=1 \
        --verify_backlog=256 --randseed=7 --unlink=1 --output-format=terse >/tmp/fio.log 2>&1 ||
        { echo $job; cat /tmp/fio.log; exit 1; }
done
echo data well
"#;

/// Several at a time, each on names of its own and all on the same ones.
const LOOPS: &str = r#"
mkdir loops
worker() {
    i=0
    while [ $i -lt 8 ]; do
        mkdir -p loops/$1/x loops/all
        echo $1 $i >loops/$1/x/file
        cat loops/$1/x/file >loops/all/$i
        mv loops/all/$i loops/all/name 2>/dev/null || true
        ln -f loops/$1/x/file loops/all/link$1
        [ "$(cat loops/$1/x/file)" = "$1 $i" ]
        ls -lR loops >/dev/null 2>&1 || true
        rm -rf loops/$1/x
        i=$((i + 1))
    done
}
for id in 1 2 3 4; do worker $id & eval "pid$id=$!"; done
for id in 1 2 3 4; do eval "wait \$pid$id"; done
[ "$(ls loops/all | wc -l)" -ge 5 ]
rm -r loops
echo loops well
"#;

fn prepare(server: &Server) {
    fs::create_dir(server.path("host")).unwrap();
    fs::write(server.path("host/made"), "by the host\n").unwrap();
}

/// What the guest left is what the host sees.
fn check(server: &mut Server) {
    let hard = fs::metadata(server.path("tree/hard")).unwrap();
    assert_eq!((hard.uid(), hard.gid(), hard.nlink()), (1000, 1001, 2));
    assert_eq!(hard.mode() & 0o7777, 0o640);
    let moved = fs::read_to_string(server.path("tree/a/b/moved")).unwrap();
    assert_eq!(moved, "hello\nmore\n");
    let link = fs::read_link(server.path("tree/soft")).unwrap();
    assert_eq!(link, Path::new("a/file"));
    let (data, copy) = (server.path("data"), server.path("copy"));
    let (data, copy) = (fs::read(data).unwrap(), fs::read(copy).unwrap());
    assert!(data.len() == 24 << 20 && copy == data[..5000]);
    assert!(!server.path("tree/open").exists());
    if server.is_ours() {
        assert!(server.is_alive(), "{}", server.epitaph());
        let status = server.stop();
        assert_eq!(status.and_then(|status| status.code()), Some(0));
    }
}

fn uml(test: &str, cache: &'static str, direct: bool, parts: &[(&str, &str)]) {
    let options = Options {
        cache,
        direct,
        lifetime: LIMIT + Duration::from_secs(60),
        ..Options::default()
    };
    let needed = [Part::UserModeLinux, Part::Fio];
    let Some(mut server) = Server::for_test(test, &needed, options) else {
        return;
    };
    let _cpu = OneCpu::turn();
    prepare(&server);
    let work: String = parts.iter().map(|(part, _)| *part).collect();
    let script = format!("tag={TAG} cache={cache}\n{MOUNT}{work}cd ..; umount share");
    let mut machine = Machine::new(&[], &script);
    machine.shares.push(server.socket());
    machine.limit = LIMIT;
    let report = machine
        .run()
        .unwrap_or_else(|error| panic!("{error}\nthe server {}", server.epitaph()));
    let said = format!("{}\n{}", report.output, report.console);
    assert_eq!(report.code, 0, "{said}\nthe server {}", server.epitaph());
    for (_, well) in parts {
        assert!(report.output.contains(well), "{said}");
    }
    check(&mut server);
}

#[test]
fn user_mode_linux_without_a_cache() {
    let parts = [(FILES, "files well"), (VERIFIED, "data well")];
    uml("user_mode_linux_without_a_cache", "never", true, &parts);
}

#[test]
fn user_mode_linux_with_a_cache() {
    let parts = [
        (FILES, "files well"),
        (VERIFIED, "data well"),
        (LOOPS, "loops well"),
    ];
    uml("user_mode_linux_with_a_cache", "auto", false, &parts);
}

#[test]
fn user_mode_linux_alone_with_the_files() {
    let parts = [(FILES, "files well"), (LOOPS, "loops well")];
    uml(
        "user_mode_linux_alone_with_the_files",
        "always",
        true,
        &parts,
    );
}

#[test]
fn a_stock_kernel_in_qemu() {
    let test = "a_stock_kernel_in_qemu";
    let Some(assets) = Assets::for_test(test, &[]) else {
        return;
    };
    let options = Options {
        cache: "auto",
        lifetime: LIMIT + Duration::from_secs(30),
        ..Options::default()
    };
    let Some(mut server) = Server::for_test(test, &[], options) else {
        return;
    };
    let _alone = Alone::turn();
    prepare(&server);
    // The stock kernel has the driver built in.
    let mount = format!("mkdir share\nmount -t virtiofs {TAG} share\n");
    let script = format!("{mount}{FILES}{LOOPS}cd ..; umount share");
    let image = initramfs(&server.scratch, &assets, &[], &script).unwrap();
    let mut qemu = emulated(&assets, &image, "");
    attach(&mut qemu, &server);
    let mut guest = Process::start(&mut qemu, LIMIT).unwrap();
    let ended = guest.wait(LIMIT);
    let console = guest.output().last(60);
    assert!(
        ended.is_some(),
        "{console}\nthe server {}",
        server.epitaph()
    );
    assert_eq!(exit_code(&console), Some("0"), "{console}");
    assert!(console.contains("loops well"), "{console}");
    check(&mut server);
}
