//! What `pericarp-net` is to a process that takes over from it: its taps and sockets,
//! named by what the kernel names them by, and what a card knows beside its session. The
//! taps' queues go along as they are, and nobody touches them until both agree.

use std::io;
use std::path::Path;

use pericarp_vhost::program::{named_at, named_socket};
use pericarp_vhost::{DeviceIdentity, Identity};

use crate::device::Steering;
use crate::options::{DeviceOptions, Options, Source};
use crate::tap::Tap;

/// The network that names are looked up in.
const NETWORK: &str = "/proc/self/ns/net";

/// What this process serves. Taps with a name, and sockets with a path, must be there.
///
/// # Errors
/// The kernel's answer where one is not, and its name.
pub fn identity(options: &Options) -> Result<Identity, (String, io::Error)> {
    let device = |device: &DeviceOptions| {
        let store = match &device.source {
            // Of an interface the kernel has a number, in each network its own.
            Source::Named(name, pairs) => {
                let missing = |e| (name.clone(), io::Error::other(e));
                let index = Tap::find(name, *pairs).map_err(missing)?;
                format!("{} {index}", named_at(Path::new(NETWORK))?)
            }
            Source::Open(_) => "passed".to_owned(),
        };
        Ok(DeviceIdentity {
            id: device.id.clone(),
            store,
            socket: named_socket(&device.socket)?,
            queues: 2 * device.pairs() as u16 + 1,
            queue_size: device.card.queue_size,
            read_only: false,
            geometry: format!("{:?} {:?}", device.card.mac, device.card.mtu),
        })
    };
    let devices = options.devices.iter().map(device);
    Ok(Identity {
        devices: devices.collect::<Result<_, _>>()?,
        records: None,
        state: None,
    })
}

/// What the words of [`write`] are called, in their order.
const WORDS: [&str; 5] = ["uso", "active", "offloads", "served", "attached"];

/// What the driver chose and the tap was told, in words.
pub(crate) fn write(steering: &Steering, uso: bool) -> String {
    let attached = steering.attached.iter().enumerate();
    let attached = attached.map(|(pair, attached)| u64::from(*attached) << pair);
    let numbers = [
        u64::from(uso),
        steering.active.into(),
        steering.offloads,
        steering.served,
        attached.sum(),
    ];
    let words = WORDS.iter().zip(numbers);
    words
        .map(|(word, number)| format!("{word} {number:x}\n"))
        .collect()
}

/// Reads what [`write`] wrote of a card with so many pairs of queues.
pub(crate) fn read(text: &str, pairs: u16) -> Option<(Steering, bool)> {
    let mut lines = text.lines();
    let mut number = |word: &str| {
        let (name, number) = lines.next()?.split_once(' ')?;
        u64::from_str_radix(number, 16)
            .ok()
            .filter(|_| name == word)
    };
    let [uso, active, offloads, served, attached] = WORDS.map(&mut number);
    let steering = Steering {
        active: u16::try_from(active?).ok()?,
        offloads: offloads?,
        served: served?,
        attached: (0..pairs)
            .map(|pair| attached.is_some_and(|bits| bits >> pair & 1 != 0))
            .collect(),
    };
    let sound = (1..=pairs).contains(&steering.active)
        && steering.served >> (2 * pairs + 1) == 0
        && attached? >> pairs == 0
        && lines.next().is_none();
    sound.then_some((steering, uso? != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        for pairs in [1, 3, 31] {
            let steering = Steering {
                active: pairs,
                offloads: 1 << 56 | 5,
                served: (1 << (2 * pairs + 1)) - 1,
                attached: (0..pairs).map(|pair| pair % 2 == 0).collect(),
            };
            let text = write(&steering, true);
            assert_eq!(read(&text, pairs), Some((steering, true)), "{text}");
            for (from, to) in [
                ("uso 1", "uso -"),
                ("uso 1\n", ""),
                ("active ", "active f"),
                ("offloads", "offload"),
                ("served ", "served f"),
                ("attached", "more 1\nattached"),
            ] {
                let wrong = text.replace(from, to);
                assert_eq!(read(&wrong, pairs), None, "{wrong}");
            }
            assert_eq!(read(&(text + "more 1\n"), pairs), None);
        }
    }
}
