//! A directory on a file system that another process serves, as Azure Files and
//! NFS are served by another machine: every call is made elsewhere than on the
//! worker, by a server that is confined.

use std::fs;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::fs::wire::ROOT;
use pericarp_tests::fs::{Client, TAG};
use pericarp_tests::fuse::{self, Fuse};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;

fn serve(scratch: &Scratch) -> (Process, Client) {
    let socket = scratch.path("fs.sock");
    let mut server = command(&Part::PERICARP_FS.find().unwrap());
    server.arg("--socket-path").arg(&socket);
    server.arg("--shared-dir").arg(scratch.path("dir"));
    server.args(["--tag", TAG]);
    let server = Process::start(&mut server, Duration::from_secs(60)).unwrap();
    poll(Duration::from_secs(10), || socket.exists().then_some(())).unwrap();
    let mut c = Client::connect(&socket, &Client::setup()).unwrap();
    c.init().unwrap();
    (server, c)
}

#[test]
fn a_directory_of_another_process_is_served() {
    let test = "a_directory_of_another_process_is_served";
    if !fuse::usable(test) || !have(test, &[Part::PERICARP_FS]) {
        return;
    }
    let scratch = Scratch::new();
    let store = Fuse::mount_share(&scratch.path("dir"), vec![7; 1 << 20]).unwrap();
    store
        .behaviour
        .delay(Duration::from_millis(1), Duration::from_millis(3));
    let (mut server, mut c) = serve(&scratch);
    let file = c.lookup(ROOT, "disk").unwrap();
    assert_eq!(file.attr.size, fs::metadata(store.file()).unwrap().len());
    let fh = c.open(file.node, 2).unwrap();
    assert_eq!(c.read(file.node, fh, 4096, 4096).unwrap(), [7; 4096]);
    assert_eq!(c.write(file.node, fh, 0, &[8; 4096]).unwrap(), 4096);
    assert_eq!(c.read(file.node, fh, 0, 4096).unwrap(), [8; 4096]);
    c.fsync(file.node, fh).unwrap();
    // Such a file system wants to hear of every close.
    c.flush(file.node, fh).unwrap();
    c.release(file.node, fh).unwrap();
    c.getattr(ROOT).unwrap();
    assert!(server.ended().is_none(), "{}", server.epitaph());
}

/// A close is where such a file system says what went wrong, be it below one that
/// says nothing.
#[test]
fn a_mount_of_another_process_below_hears_of_every_close() {
    let test = "a_mount_of_another_process_below_hears_of_every_close";
    if !fuse::usable(test) || !have(test, &[Part::PERICARP_FS]) {
        return;
    }
    let scratch = Scratch::new();
    let below = scratch.path("dir/sub");
    let _store = Fuse::mount_share(&below, vec![7; 1 << 20]).unwrap();
    fs::write(scratch.path("dir/file"), b"x").unwrap();
    let (mut server, mut c) = serve(&scratch);
    for path in ["file", "sub/disk", "file"] {
        let node = c.walk(path).unwrap().node;
        let fh = c.open(node, 2).unwrap();
        c.flush(node, fh).unwrap();
        c.release(node, fh).unwrap();
    }
    assert!(server.ended().is_none(), "{}", server.epitaph());
}
