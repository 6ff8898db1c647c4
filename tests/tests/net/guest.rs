//! Linux's own driver, in QEMU with an emulated CPU: addresses by hand, echo
//! requests, and a file there and back with its checksum.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use pericarp_tests::guest::{Assets, emulated, exit_code, initramfs};
use pericarp_tests::network::{HOST, Network, dotted};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::process::Process;

use crate::card::Served;

/// A boot and 32 MiB, in an emulated CPU.
const LIMIT: Duration = Duration::from_secs(240);

const SCRIPT: &str = "
ip link set eth0 up; ip addr add 10.99.0.2/24 dev eth0
cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu
ping -c 3 -W 20 10.99.0.1
nc 10.99.0.1 7000 </dev/null >/tmp/part
nc 10.99.0.1 7001 </tmp/part
md5sum </tmp/part
";

/// What goes there and back.
const BYTES: usize = 16 << 20;

/// The host's ends of a file's way to the guest, port 7000, and back, 7001.
pub(crate) struct Exchange {
    sent: Vec<u8>,
    give: JoinHandle<io::Result<()>>,
    take: JoinHandle<io::Result<Vec<u8>>>,
}

impl Exchange {
    /// Listens in this network.
    pub(crate) fn begin() -> Self {
        let there = TcpListener::bind((dotted(HOST), 7000)).unwrap();
        let back = TcpListener::bind((dotted(HOST), 7001)).unwrap();
        let sent: Vec<u8> = (0..BYTES).map(|n| (n ^ (n >> 9)) as u8).collect();
        let content = sent.clone();
        Self {
            sent,
            give: spawn(move || there.accept()?.0.write_all(&content)),
            take: spawn(move || {
                let mut got = Vec::new();
                back.accept()?.0.read_to_end(&mut got)?;
                Ok(got)
            }),
        }
    }

    /// What came back is what was sent.
    pub(crate) fn finish(self) {
        self.give.join().unwrap().unwrap();
        let got = self.take.join().unwrap().unwrap();
        assert!(got == self.sent, "what came back differs");
    }
}

#[test]
fn linux_reaches_the_host_and_is_reached() {
    let test = "net linux";
    if !have(test, &[Part::PERICARP_NET]) {
        return;
    }
    let Some(assets) = Assets::for_test(test, &[Part::PERICARP_NET]) else {
        return;
    };
    let Some(_network) = Network::here(test, &[], 1) else {
        return;
    };
    let served = Served::start(&[]);
    let (modules, loads) = assets.network().unwrap();
    let tools: Vec<&str> = modules.iter().map(String::as_str).collect();
    let script = loads + SCRIPT;
    let image = initramfs(&served.scratch, &assets, &tools, &script).unwrap();
    let mut qemu = emulated(&assets, &image, "");
    qemu.arg("-chardev")
        .arg(format!("socket,id=net,path={}", served.socket.display()))
        .args(["-netdev", "vhost-user,id=net,chardev=net"])
        // Without message interrupts: where there is no KVM, QEMU 7.2 gives those of
        // this device to it all the same, and dies of that.
        .args([
            "-device",
            "virtio-net-pci,netdev=net,mac=02:00:00:00:00:02,vectors=0",
        ]);
    let exchange = Exchange::begin();
    let mut process = Process::start(&mut qemu, LIMIT).unwrap();
    let status = process.wait(LIMIT);
    let epitaph = process.epitaph();
    process.kill();
    let console = process.output().lines().join("\n");
    let ended = status.is_some_and(|status| status.success());
    assert!(ended, "QEMU {epitaph}: {console}");
    assert_eq!(exit_code(&console), Some("0"), "{console}");
    assert!(console.contains("3 packets received"), "{console}");
    exchange.finish();
    served.finish();
}
