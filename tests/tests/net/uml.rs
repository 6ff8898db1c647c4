//! Linux's own driver at native speed, in User-mode Linux: the address that the device
//! has, and a file there and back.

use pericarp_tests::network::Network;
use pericarp_tests::parts::{Part, have};
use pericarp_tests::uml::Machine;

use crate::card::Served;
use crate::guest::Exchange;

const SCRIPT: &str = "
basename $(readlink /sys/class/net/eth0/device/driver)
cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu
ip link set eth0 up; ip addr add 10.99.0.2/24 dev eth0
busybox nc 10.99.0.1 7000 </dev/null >part
busybox nc 10.99.0.1 7001 <part
";

#[test]
fn user_mode_linux_reaches_the_host_and_is_reached() {
    let test = "net user-mode linux";
    let parts = [Part::PERICARP_NET, Part::UserModeLinux, Part::Busybox];
    if !have(test, &parts) {
        return;
    }
    let Some(_network) = Network::here(test, &[], 1) else {
        return;
    };
    let served = Served::start(&["--mac", "02:00:00:00:00:02", "--mtu", "1400"]);
    let exchange = Exchange::begin();
    let mut machine = Machine::new(&[], SCRIPT);
    machine.cards.push(served.socket.clone());
    let report = machine.run().unwrap();
    assert_eq!(report.code, 0, "{report:?}");
    let lines: Vec<&str> = report.output.lines().collect();
    assert_eq!(lines, ["virtio_net", "02:00:00:00:00:02", "1400"]);
    exchange.finish();
    served.finish();
}
