//! The table that people read: for each pod a row, the guest, each process, and below the process
//! what it serves.

use pericarp_api::hello::printable;
use pericarp_pod::record::{DeviceKind, MACHINE};

use super::rates::{PodRates, Rates};
use crate::observe::{Device, Process};

/// Of the columns, the first is on the left and all others are on the right.
const HEADS: [&str; 13] = [
    "POD", "IOPS", "MB/s", "p50", "queue", "backend", "disk", "p99", "queue", "backend", "disk",
    "CPU%", "MEMORY",
];

type Row = [String; HEADS.len()];

/// The table with a line above it.
pub(super) fn table(rates: &Rates) -> String {
    let mut rows = vec![HEADS.map(str::to_owned)];
    for pod in &rates.pods {
        of_pod(rates, pod, &mut rows);
    }
    let widths: [usize; HEADS.len()] = std::array::from_fn(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    });
    let count = rates.pods.len();
    let pods = if count == 1 { "pod" } else { "pods" };
    let mut text = format!(
        "{count} {pods}, in {:.1} s; latencies in us\n",
        rates.seconds
    );
    for row in rows {
        let mut line = format!("{:width$}", row[0], width = widths[0]);
        for (cell, width) in row[1..].iter().zip(&widths[1..]) {
            line += &format!("  {cell:>width$}");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

fn of_pod(rates: &Rates, pod: &PodRates, rows: &mut Vec<Row>) {
    let (mut requests, mut bytes) = (0_u64, 0_u64);
    for volume in pod.volumes() {
        let all = volume.all();
        requests = all.requests.saturating_add(requests);
        bytes = all.bytes.saturating_add(bytes);
    }
    let name = match pod.now.namespace() {
        "" => pod.now.name().to_owned(),
        namespace => format!("{namespace}/{}", pod.now.name()),
    };
    let mut row = empty(&printable(&name));
    traffic(&mut row, requests, bytes, rates.seconds);
    row[11] = percent(pod.all_cpu());
    row[12] = format!("+{}", size(pod.host_memory()));
    rows.push(row);

    let mut row = empty("  guest");
    row[11] = pod.guest_cpu.map_or_else(String::new, percent);
    let given = pod.now.guest.and_then(|guest| guest.resident);
    let given = given.map_or_else(|| "?".to_owned(), size);
    row[12] = format!("{given} of {}", size(pod.now.record.memory));
    rows.push(row);

    let mut shown = vec![false; pod.since.len()];
    for (process, cpu) in pod.now.processes.iter().zip(&pod.cpu) {
        let mut row = empty(&format!("  {}", of_process(process)));
        row[11] = percent(*cpu);
        row[12] = size(process.cost.resident);
        rows.push(row);
        for (device, shown) in pod.since.iter().zip(&mut shown) {
            if !*shown && serves(process, device) {
                *shown = true;
                rows.push(of_device(rates, device));
            }
        }
    }
    for (control, _) in pod.now.controls.iter().filter(|(_, answered)| !answered) {
        rows.push(empty(&format!("  {control}: does not answer")));
    }
}

fn of_process(process: &Process) -> &str {
    match process.role.as_str() {
        MACHINE => "machine, without the guest",
        role => role,
    }
}

fn serves(process: &Process, device: &Device) -> bool {
    let is_server = process.role == device.kind.server();
    is_server && (process.device.is_empty() || process.device == device.id)
}

fn of_device(rates: &Rates, device: &Device) -> Row {
    let all = device.all();
    let name = format!("    {} {}", device.id, device.volume);
    let mut row = empty(&printable(name.trim_end()));
    traffic(&mut row, all.requests, all.bytes, rates.seconds);
    if device.kind == DeviceKind::Card {
        return row;
    }
    let quantiles = [0.5, 0.99];
    let cells = quantiles
        .iter()
        .flat_map(|q| device.times.iter().map(move |time| time.quantile_us(*q)));
    for (cell, us) in row[3..11].iter_mut().zip(cells) {
        *cell = us.map_or_else(|| "-".to_owned(), microseconds);
    }
    row
}

fn empty(name: &str) -> Row {
    let mut row: Row = Default::default();
    row[0] = name.to_owned();
    row
}

fn traffic(row: &mut Row, requests: u64, bytes: u64, seconds: f64) {
    row[1] = format!("{:.0}", requests as f64 / seconds);
    row[2] = format!("{:.1}", bytes as f64 / seconds / 1e6);
}

fn percent(number: f64) -> String {
    format!("{number:.1}")
}

fn microseconds(us: f64) -> String {
    match us < 10.0 {
        true => format!("{us:.1}"),
        false => format!("{us:.0}"),
    }
}

/// Bytes in the largest unit of which there are some.
fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    match mib {
        ..10.0 => format!("{mib:.1}M"),
        ..10_240.0 => format!("{mib:.0}M"),
        _ => format!("{:.1}G", mib / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::top::rates::tests::rates;

    #[test]
    fn a_pod_is_shown_with_its_processes_and_volumes() {
        let shown = table(&rates());
        let lines: Vec<Vec<&str>> = shown
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines[0].join(" "), "1 pod, in 2.0 s; latencies in us");
        assert_eq!(lines[1][..4], ["POD", "IOPS", "MB/s", "p50"]);
        assert_eq!(lines[2], ["default/web", "10", "0.0", "30.0", "+10M"]);
        assert_eq!(lines[3], ["guest", "9.0", "100M", "of", "256M"]);
        assert_eq!(lines[4], ["shim", "10.0", "5.0M"]);
        assert_eq!(lines[5].join(" "), "machine, without the guest 1.0 3.0M");
        assert_eq!(lines[6], ["pericarp-block", "10.0", "2.0M"]);
        let volume = "disk1 data \"x\" 10 0.0 50 - 50 50 50 - 50 50";
        assert_eq!(lines[7].join(" "), volume);
        assert_eq!(lines[8].join(" "), "fs.control: does not answer");
        let ends = |text: &str| {
            let line = shown.lines().find(|line| line.contains(text)).unwrap();
            line.chars().count()
        };
        assert_eq!(ends("POD"), ends("default/web"));
        // What a pod is called moves no cursor.
        assert!(!shown.contains('\x1b'));
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (0, "0.0M"),
            (5 << 20, "5.0M"),
            (300 << 20, "300M"),
            (20 << 30, "20.0G"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
