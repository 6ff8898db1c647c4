//! What an operator sets, as a Linux guest meets it: several queues, write-back
//! caches, access control lists, other ids, mounts below the directory, limits.
//! Most run under User-mode Linux; only QEMU has several CPUs.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pericarp_tests::bounded::{Alone, OneCpu, poll};
use pericarp_tests::fs::wire::posix::O_RDWR;
use pericarp_tests::fs::wire::{Body, ENTRY, OUT_HEADER, ROOT, Who, feature, op};
use pericarp_tests::fs::{Client, Options, Server, TAG};
use pericarp_tests::guest::{Assets, emulated, exit_code, initramfs};
use pericarp_tests::parts::{Part, have, search_path};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::uml::Machine;
use serde_json::json;

use crate::guests::MOUNT;

const LIMIT: Duration = Duration::from_secs(180);

fn options(cache: &'static str, more: &'static [&'static str]) -> Options {
    Options {
        cache,
        more,
        control: true,
        lifetime: LIMIT + Duration::from_secs(60),
        ..Options::default()
    }
}

/// A server with options that only ours has.
fn ours(test: &str, parts: &[Part], options: Options) -> Option<Server> {
    Server::for_test(test, parts, options).filter(Server::is_ours)
}

/// Has Linux do this in the directory, under User-mode Linux.
pub(crate) fn linux(socket: PathBuf, work: &str) {
    let _cpu = OneCpu::turn();
    let script = format!("tag={TAG}\n{MOUNT}cd share\n{work}\ncd ..\numount share");
    let mut machine = Machine::new(&[], &script);
    machine.shares.push(socket);
    machine.limit = LIMIT;
    let report = machine.run().unwrap_or_else(|error| panic!("{error}"));
    let said = format!("{}\n{}", report.output, report.console);
    assert_eq!(report.code, 0, "{said}");
}

/// The stock kernel deals its CPUs out to the queues.
fn each_cpu_has_a_queue(queues: usize, more: &'static [&'static str]) {
    let test = format!("each_cpu_has_a_queue [{queues}]");
    let Some(assets) = Assets::for_test(&test, &[]) else {
        return;
    };
    let Some(mut server) = ours(&test, &[], options("never", more)) else {
        return;
    };
    let _alone = Alone::turn();
    fs::write(server.path("data"), crate::pattern(3, 1 << 20)).unwrap();
    // A file of its own for each CPU, made, read and removed there.
    let script = format!(
        r#"
mkdir share
mount -t virtiofs {TAG} share
[ "$(nproc)" -eq {queues} ]
mask=1
while [ $mask -lt $((1 << {queues})) ]; do
    taskset $(printf %x $mask) sh -ec '
        i=0
        while [ $i -lt 5 ]; do
            dd if=share/data of=share/copy$0 bs=64k 2>/dev/null
            cmp share/data share/copy$0
            rm share/copy$0
            i=$((i + 1))
        done' $mask
    mask=$((mask * 2))
done
# CVE-2022-0358 and its cure: this kernel says which group of the caller's it is.
mkdir share/set
chown 0:77 share/set
chmod 2777 share/set
# By its path, or the shell takes its own, which knows less.
as() {{ /bin/setpriv --reuid 1000 --regid 1000 "$@"; }}
as --groups 77 mknod -m 2755 share/set/member p
as --clear-groups mknod -m 2755 share/set/stranger p
[ "$(stat -c %g:%a share/set/member)" = 77:2755 ]
[ "$(stat -c %g:%a share/set/stranger)" = 77:755 ]
umount share
"#
    );
    let image = initramfs(&server.scratch, &assets, &["setpriv"], &script).unwrap();
    let mut qemu = emulated(&assets, &image, "");
    let socket = server.socket();
    qemu.args(["-smp", &queues.to_string()])
        .arg("-chardev")
        .arg(format!("socket,id=fs,path={}", socket.display()))
        .arg("-device")
        .arg(format!(
            "vhost-user-fs-pci,chardev=fs,tag={TAG},queue-size=1024,num-request-queues={queues}"
        ));
    let mut guest = Process::start(&mut qemu, LIMIT).unwrap();
    let ended = guest.wait(LIMIT);
    let console = guest.output().last(60);
    let epitaph = server.epitaph();
    assert!(ended.is_some(), "{console}\nthe server {epitaph}");
    assert_eq!(exit_code(&console), Some("0"), "{console}");
    let member = fs::metadata(server.path("set/member")).unwrap();
    assert_eq!((member.uid(), member.gid()), (1000, 77));
    assert_eq!(member.mode() & 0o7777, 0o2755);
    let counts = server.counts();
    for queue in 1..=queues {
        // Five files of 16 requests each way, and what belongs to them.
        let served = counts.on(queue);
        assert!(served >= 160, "queue {queue} served {served}: {counts:?}");
    }
}

#[test]
fn each_of_two_cpus_has_a_queue() {
    each_cpu_has_a_queue(2, &["--num-queues", "2"]);
}

#[test]
fn a_guest_writes_back_what_it_kept() {
    const WORK: &str = r#"
dd if=/dev/zero of=small bs=1 count=2000 2>/dev/null
printf abc >>small
[ "$(stat -c %s small)" -eq 2003 ]
[ "$(tail -c 3 small)" = abc ]
printf x | dd of=small bs=1 seek=100 conv=notrunc 2>/dev/null
truncate -s 2001 small
printf z >>small
dd if=/dev/urandom of=/tmp/noise bs=64k count=48 2>/dev/null
cp /tmp/noise noise
cp /tmp/noise part
dd if=/tmp/noise of=part bs=777 count=500 seek=3 skip=9 conv=notrunc 2>/dev/null
cmp noise /tmp/noise
sync
echo 3 >/proc/sys/vm/drop_caches
cmp noise /tmp/noise
dd if=part bs=777 count=500 skip=3 2>/dev/null >/tmp/a
dd if=noise bs=777 count=500 skip=9 2>/dev/null >/tmp/b
cmp /tmp/a /tmp/b
"#;
    let test = "a_guest_writes_back_what_it_kept";
    let mut writes = Vec::new();
    for more in [&[][..], &["--writeback"]] {
        let needed = [Part::UserModeLinux];
        let Some(mut server) = ours(test, &needed, options("auto", more)) else {
            return;
        };
        linux(server.socket(), WORK);
        let small = fs::read(server.path("small")).unwrap();
        let mut expected = vec![0; 2000];
        expected[100] = b'x';
        expected.extend(b"az");
        assert!(small == expected, "{more:?}");
        assert_eq!(fs::metadata(server.path("noise")).unwrap().len(), 48 << 16);
        writes.push(server.counts().of("write"));
        assert!(server.is_alive(), "{}", server.epitaph());
    }
    // Without, each byte is a request.
    assert!(writes[0] >= 2000 && writes[1] < 500, "{writes:?}");
}

fn list_of(path: &Path) -> String {
    let program = search_path("getfacl").unwrap();
    let output = Command::new(program).arg("-cnp").arg(path).output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

#[test]
fn access_control_lists_are_set_in_the_guest_and_seen_on_the_host() {
    const WORK: &str = r#"
mkdir dir
chmod 700 dir
setfacl -m u:1234:rwx dir
setfacl -d -m u:1234:rwx,g:2345:r-x dir
getfacl -cnp dir | grep -q '^user:1234:rwx'
umask 077
: >dir/file
mkdir dir/sub
getfacl -cnp dir/file | grep -q '^user:1234:rwx'
getfacl -cnp dir/sub | grep -q '^default:group:2345:r-x'
# The guest's kernel goes by them.
as() { setpriv --reuid $1 --regid $1 --clear-groups sh -c "$2"; }
as 1234 ': >dir/theirs'
if as 4321 ': >dir/refused' 2>/dev/null; then exit 3; fi
setfacl -b dir/sub
if getfacl -cnp dir/sub | grep -q 1234; then exit 4; fi
getfacl -cnp host | grep -q '^user:77:r--'
as 77 'cat host' | grep -q secret
if as 78 'cat host' 2>/dev/null; then exit 5; fi
"#;
    let test = "access_control_lists_are_set_in_the_guest_and_seen_on_the_host";
    let more = &["--posix-acl"];
    let Some(server) = ours(test, &[Part::UserModeLinux], options("auto", more)) else {
        return;
    };
    let (Some(setfacl), Some(_)) = (search_path("setfacl"), search_path("getfacl")) else {
        pericarp_tests::parts::skip(test, "setfacl is missing (apt-get install acl)");
        return;
    };
    fs::write(server.path("host"), "secret").unwrap();
    fs::set_permissions(server.path("host"), fs::Permissions::from_mode(0o600)).unwrap();
    let set = Command::new(setfacl)
        .args(["-m", "u:77:r"])
        .arg(server.path("host"))
        .status();
    assert!(set.unwrap().success());
    linux(server.socket(), WORK);
    let dir = list_of(&server.path("dir"));
    for line in [
        "user:1234:rwx",
        "default:user:1234:rwx",
        "default:group:2345:r-x",
    ] {
        assert!(dir.contains(line), "{line}: {dir}");
    }
    // Inherited, with the umask left out: the list's own mask is what counts.
    let file = list_of(&server.path("dir/file"));
    assert!(file.contains("user:1234:rwx"), "{file}");
    assert!(file.contains("mask::rw-"), "{file}");
    let theirs = fs::metadata(server.path("dir/theirs")).unwrap();
    assert_eq!((theirs.uid(), theirs.gid()), (1234, 1234));
    assert!(!list_of(&server.path("dir/sub")).contains("1234"));
}

#[test]
fn a_guest_has_other_ids_than_the_host() {
    const WORK: &str = r#"
: >made
chown 5:6 made
[ "$(stat -c %u:%g made)" = 5:6 ]
[ "$(stat -c %u:%g .)" = 0:0 ]
# The host's own root is nobody here.
[ "$(stat -c %u:%g host)" = 65534:65534 ]
if chown 1000:0 made 2>/dev/null; then exit 3; fi
setpriv --reuid 7 --regid 8 --clear-groups sh -c 'mkdir open/theirs; : >open/theirs/file'
setfacl -m u:9:r made
getfacl -cnp made | grep -q '^user:9:r--'
"#;
    let test = "a_guest_has_other_ids_than_the_host";
    let more = &[
        "--posix-acl",
        "--uid-map=:0:100000:1000:",
        "--gid-map=:0:200000:1000:",
    ];
    let Some(server) = ours(test, &[Part::UserModeLinux], options("never", more)) else {
        return;
    };
    if search_path("setfacl").is_none() {
        pericarp_tests::parts::skip(test, "setfacl is missing (apt-get install acl)");
        return;
    }
    chown(server.dir(), Some(100_000), Some(200_000)).unwrap();
    fs::write(server.path("host"), "").unwrap();
    fs::create_dir(server.path("open")).unwrap();
    fs::set_permissions(server.path("open"), fs::Permissions::from_mode(0o777)).unwrap();
    linux(server.socket(), WORK);
    let ids = |name: &str| {
        let found = fs::metadata(server.path(name)).unwrap();
        (found.uid(), found.gid())
    };
    assert_eq!(ids("made"), (100_005, 200_006));
    assert_eq!(ids("open/theirs"), (100_007, 200_008));
    assert_eq!(ids("open/theirs/file"), (100_007, 200_008));
    let list = list_of(&server.path("made"));
    assert!(list.contains("user:100009:r--"), "{list}");
}

/// A server in a mount namespace of its own, where something is mounted below
/// the directory before it starts.
#[test]
fn what_is_mounted_below_the_directory_is_a_mount_in_the_guest() {
    const WORK: &str = r#"
[ "$(cat sub/file)" = inner ]
[ "$(cat plain/file)" = outer ]
[ "$(stat -c %d sub)" != "$(stat -c %d .)" ]
[ "$(stat -c %d plain)" = "$(stat -c %d .)" ]
grep -q ' /mnt/work/share/sub virtiofs ' /proc/mounts
# It is the same mount after the name was looked up again, and what is mounted on it stays.
mount -t tmpfs mine sub
sleep 2
ls sub/. plain >/dev/null
grep -q '^mine /mnt/work/share/sub tmpfs ' /proc/mounts
umount sub
# Links do not lead across, files are copied.
if ln sub/file across 2>/dev/null; then exit 3; fi
mv sub/file moved
[ "$(cat moved)" = inner ]
[ ! -e sub/file ]
echo new >sub/made
[ "$(stat -f -c %b sub)" -eq 256 ]
[ "$(stat -f -c %b .)" -ne 256 ]
"#;
    let test = "what_is_mounted_below_the_directory_is_a_mount_in_the_guest";
    let parts = [Part::UserModeLinux, Part::PERICARP_FS];
    if !have(test, &parts) || !rustix::process::geteuid().is_root() {
        return;
    }
    let unshare = search_path("unshare").expect("util-linux");
    let scratch = Scratch::new();
    for dir in ["dir", "dir/sub", "dir/plain"] {
        fs::create_dir(scratch.path(dir)).unwrap();
    }
    fs::write(scratch.path("dir/plain/file"), "outer\n").unwrap();
    let socket = scratch.path("fs.sock");
    let start = "mount -t tmpfs -o size=1m below \"$1/sub\"\n\
                 echo inner >\"$1/sub/file\"\n\
                 exec \"$0\" --shared-dir \"$1\" --socket-path \"$2\" --tag share";
    let mut program = command(&unshare);
    program.args(["--mount", "--propagation", "private", "sh", "-ec", start]);
    program.arg(Part::PERICARP_FS.find().unwrap());
    program.arg(scratch.path("dir")).arg(&socket);
    let mut server = Process::start(&mut program, LIMIT).unwrap();
    poll(Duration::from_secs(10), || socket.exists().then_some(()))
        .unwrap_or_else(|| panic!("the server {}", server.epitaph()));
    linux(socket, WORK);
    assert!(server.ended().is_none(), "{}", server.epitaph());
    assert_eq!(fs::read(scratch.path("dir/moved")).unwrap(), b"inner\n");
    // It lay on the mount, which is not ours.
    assert!(!scratch.path("dir/sub/made").exists());
}

/// CVE-2022-0358 and its cure: a set-group-ID bit is for members of the group,
/// and who is one the guest's kernel says in the request (Linux 6.2).
#[test]
fn a_group_that_the_guest_vouches_for_keeps_its_bit() {
    const SUPP_GROUP: u64 = 1 << 34;
    let test = "a_group_that_the_guest_vouches_for_keeps_its_bit";
    let Some(mut server) = ours(test, &[], Options::default()) else {
        return;
    };
    fs::create_dir(server.path("dir")).unwrap();
    chown(server.path("dir"), Some(0), Some(77)).unwrap();
    fs::set_permissions(server.path("dir"), fs::Permissions::from_mode(0o2777)).unwrap();
    let mut c = server.connect(&Client::setup()).unwrap();
    let agreed = c.init_as(7, 41, feature::LINUX | SUPP_GROUP).unwrap();
    assert_ne!(agreed.features & SUPP_GROUP, 0);
    let dir = c.lookup(ROOT, "dir").unwrap().node;
    c.who = Who {
        uid: 1000,
        gid: 1000,
    };
    let create = |c: &mut Client, name: &str, groups: &[u32]| {
        let body = Body::new().u32(O_RDWR).u32(0o102_755).u32(0).u32(0);
        let (_, mut request) = c.request(op::CREATE, dir, &body.name(name).0);
        if !groups.is_empty() {
            let size = 8 + 4 + 4 * groups.len() as u32;
            let mut more = Body::new().u32(size.next_multiple_of(8)).u32(32);
            more = more.u32(groups.len() as u32);
            more = groups.iter().fold(more, |more, group| more.u32(*group));
            more.0.resize(size.next_multiple_of(8) as usize, 0);
            request.extend(&more.0);
            let length = (request.len() as u32).to_le_bytes();
            request[..4].copy_from_slice(&length);
            request[36..38].copy_from_slice(&((more.0.len() / 8) as u16).to_le_bytes());
        }
        let room = (OUT_HEADER + ENTRY + 16) as u32;
        let answer = c.send(&request, room).unwrap();
        assert_eq!(answer.errno(), None, "{name}");
        let made = fs::metadata(server.path(&format!("dir/{name}"))).unwrap();
        (made.uid(), made.gid(), made.mode() & 0o7777)
    };
    assert_eq!(create(&mut c, "stranger", &[]), (1000, 77, 0o755));
    assert_eq!(create(&mut c, "other", &[78]), (1000, 77, 0o755));
    assert_eq!(create(&mut c, "member", &[77]), (1000, 77, 0o2755));
    // The next request is a stranger's again.
    assert_eq!(create(&mut c, "after", &[]), (1000, 77, 0o755));
}

#[test]
fn limits_hold_requests_and_what_is_served_is_counted() {
    let test = "limits_hold_requests_and_what_is_served_is_counted";
    let more = &["--iops", "200", "--iops-burst", "20"];
    let Some(mut server) = ours(test, &[], options("never", more)) else {
        return;
    };
    fs::write(server.path("file"), [7; 8192]).unwrap();
    let mut c = server.client().unwrap();
    let node = c.lookup(ROOT, "file").unwrap().node;
    let fh = c.open(node, O_RDWR).unwrap();
    let throttled = |server: &Server| {
        let stats = server.operator(&json!({"op": "stats"}));
        let queues = stats["devices"][0]["queues"].as_array().unwrap().clone();
        let all = queues.iter().map(|q| q["throttled"].as_u64().unwrap());
        all.sum::<u64>()
    };
    let burst = |c: &mut Client| {
        for slot in 0..100 {
            let body = Body::new().u64(0).u64(0);
            c.begin(slot, op::GETATTR, node, body, 104).unwrap();
        }
        c.go();
        let all = c.finish(100).unwrap();
        assert!(all.iter().all(|(_, answer)| answer.errno().is_none()));
    };
    burst(&mut c);
    let held = throttled(&server);
    assert!(held > 0, "a hundred at once, and none had to wait");
    let none = json!({"op": "limits", "iops": 0});
    assert_eq!(server.operator(&none)["ok"], true);
    for _ in 0..5 {
        burst(&mut c);
    }
    assert_eq!(throttled(&server), held, "held without a limit");
    assert_eq!(c.read(node, fh, 0, 8192).unwrap().len(), 8192);
    c.write(node, fh, 0, &[8; 100]).unwrap();
    let counts = server.counts();
    // 600 times attributes, and INIT.
    assert_eq!(counts.of("other"), 601, "{counts:?}");
    let numbers = ["read", "write", "lookup", "open"].map(|class| counts.of(class));
    assert_eq!(numbers, [1, 1, 1, 1], "{counts:?}");
    let stats = server.operator(&json!({"op": "stats"}));
    let read = &stats["devices"][0]["queues"][1]["requests"]["read"];
    assert_eq!(read["bytes"], 8192, "{stats}");
    let metrics = server.operator(&json!({"op": "metrics"})).to_string();
    assert!(metrics.contains("lookup"), "{metrics}");
}
