//! The second half of the demo: one fio job on one file, from a container, from
//! a virtual machine, and through Linux's own virtio driver at native speed.
//!
//! Called by the demo. Every row reads the same file with the same job. The rows
//! take turns for several rounds, because the machine may be busy with other
//! things; the table has medians. fio's own reports are kept in
//! `target/demo/raw`.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::image::{DATA_IN_TREE, Disks};
use super::pericarp::{Root, in_container, in_machine};
use super::table::{self, Align};
use crate::command::{Failure, capture};
use crate::fio::{self, Reads};
use crate::janitor::Janitor;
use crate::project::Project;

/// The job, relative to the source tree.
const JOB: &str = "fio-profiles/randread-4k-qd32.fio";
const ROUNDS: usize = 3;
/// Length of one run.
const SECONDS: u32 = 4;

/// One row: where the job ran and what it reached in each round.
struct Row {
    name: String,
    rounds: Vec<Reads>,
}

/// The places the job runs in; the first is what the others are compared with.
const PLACES: [Place; 4] = [
    Place::Container,
    Place::Native("pericarp-block"),
    Place::Native("qemu-storage-daemon"),
    Place::Machine,
];

#[derive(Clone, Copy)]
enum Place {
    /// A container that reads the file.
    Container,
    /// User-mode Linux, with this program serving the file as its disk.
    Native(&'static str),
    /// A virtual machine that has the file as its disk.
    Machine,
}

/// What is the same for all rows.
struct Bench<'a> {
    project: &'a Project,
    disks: &'a Disks,
    raw: &'a Path,
    /// A directory with a short name, since that of a socket may not be long.
    sockets: &'a Path,
    job: String,
}

/// Runs all rows and returns the table with what to make of it.
pub(crate) fn compare(
    project: &Project,
    dir: &Path,
    disks: &Disks,
    janitor: &mut Janitor,
) -> Result<String, Failure> {
    let raw = dir.join("raw");
    fs::create_dir_all(&raw).map_err(|e| format!("cannot create {}: {e}", raw.display()))?;
    let sockets = Path::new("/var/tmp").join(format!("pericarp-demo-{}", std::process::id()));
    janitor.directory(&sockets)?;
    let job = project.root.join(JOB);
    let job = fs::read_to_string(&job)
        .map_err(|e| format!("cannot read the job {}: {e}", job.display()))?;
    let bench = Bench {
        project,
        disks,
        raw: &raw,
        sockets: &sockets,
        job,
    };
    let mut rows: Vec<Row> = Vec::new();
    for round in 1..=ROUNDS {
        for (index, place) in PLACES.into_iter().enumerate() {
            let (name, reads) = bench.measure(place, round, janitor)?;
            println!(
                "      round {round} of {ROUNDS}: {name}: {:.0} IOPS",
                reads.iops
            );
            match rows.get_mut(index) {
                Some(row) => row.rounds.push(reads),
                None => rows.push(Row {
                    name,
                    rounds: vec![reads],
                }),
            }
        }
    }
    Ok(report(&rows, &file_system(dir), &raw))
}

impl Bench<'_> {
    /// Runs the job once and keeps fio's report.
    fn measure(
        &self,
        place: Place,
        round: usize,
        janitor: &mut Janitor,
    ) -> Result<(String, Reads), Failure> {
        let output = janitor.run_well(&mut self.command(place))?;
        let name = match place {
            Place::Container => "runc".to_owned(),
            Place::Native(program) => format!("UML, {program}"),
            Place::Machine if output.stderr.contains("emulated CPU") => {
                "VM, emulated CPU".to_owned()
            }
            Place::Machine => "VM".to_owned(),
        };
        let (reads, report) = fio::reads(&output.stdout).map_err(|e| format!("{name}: {e}"))?;
        let file = self.raw.join(format!("{}-{round}.json", file_stem(&name)));
        fs::write(&file, report).map_err(|e| format!("cannot write {}: {e}", file.display()))?;
        Ok((name, reads))
    }

    fn command(&self, place: Place) -> Command {
        match place {
            Place::Container => {
                let mut command = in_container(self.project, Root::Tree(&self.disks.tree));
                command.args(["sh", "-c", &self.script(DATA_IN_TREE)]);
                command
            }
            Place::Native(program) => {
                // It is many processes that ignore each other's end, so they get a
                // process namespace: the kernel ends them with its first one.
                let mut command = Command::new("unshare");
                command
                    .args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"])
                    .arg(self.project.release_program("pericarp-uml"))
                    .arg(program)
                    .arg(&self.disks.data)
                    .arg(self.script("/dev/vda"))
                    .env("PERICARP_TEST_DIR", self.sockets);
                command
            }
            Place::Machine => {
                let mut command = in_machine(
                    self.project,
                    Root::Oci(&self.disks.archive),
                    Some(&self.disks.data),
                );
                command.args(["sh", "-c", &self.script("/dev/pericarp/disk1")]);
                command
            }
        }
    }

    /// Hands fio the job itself rather than a file name, which would have to
    /// exist inside.
    fn script(&self, disk: &str) -> String {
        format!(
            "printf %s '{}' | FIO_FILE={disk} FIO_SECONDS={SECONDS} fio --output-format=json --readonly -",
            self.job.replace('\'', r"'\''")
        )
    }
}

/// The name of a row as a file name.
fn file_stem(name: &str) -> String {
    let words: Vec<&str> = name
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    words.join("-").to_lowercase()
}

/// The type of the file system the data file is on: it decides what direct
/// I/O means.
fn file_system(dir: &Path) -> String {
    capture(Command::new("df").arg("--output=fstype").arg(dir))
        .ok()
        .and_then(|table| table.lines().nth(1).map(|name| name.trim().to_owned()))
        .unwrap_or_else(|| "unknown file system".to_owned())
}

/// The middle of some numbers, the lower of the two middles of an even count.
fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers
        .get(numbers.len().saturating_sub(1) / 2)
        .copied()
        .unwrap_or(f64::NAN)
}

impl Row {
    fn median(&self, number: fn(&Reads) -> f64) -> f64 {
        median(self.rounds.iter().map(number).collect())
    }

    /// The slowest and the fastest round.
    fn span(&self) -> String {
        let iops = |best: fn(f64, f64) -> f64| {
            self.rounds
                .iter()
                .map(|reads| reads.iops)
                .reduce(best)
                .unwrap_or(f64::NAN)
        };
        format!("{:.0}..{:.0}", iops(f64::min), iops(f64::max))
    }
}

fn report(rows: &[Row], file_system: &str, raw: &Path) -> String {
    let heading = [
        "4 KiB random read, direct, depth 32",
        "IOPS",
        "of runc",
        "slowest..fastest",
        "p50 us",
        "p99 us",
    ];
    let mut cells = vec![heading.map(str::to_owned).to_vec()];
    let base = rows.first().map_or(f64::NAN, |row| row.median(|r| r.iops));
    for row in rows {
        let iops = row.median(|reads| reads.iops);
        cells.push(vec![
            row.name.clone(),
            format!("{iops:.0}"),
            format!("{:.2}", iops / base),
            row.span(),
            format!("{:.0}", row.median(|reads| reads.p50_us)),
            format!("{:.0}", row.median(|reads| reads.p99_us)),
        ]);
    }
    let mut text = table::set(&cells, Align::Right);
    text += &format!(
        "  Medians of {ROUNDS} rounds in turn; every row reads the same 256 MiB file (on {file_system}).\n  \
         The row to quote is UML with pericarp-block: Linux's own virtio driver, no emulated CPU.\n"
    );
    if rows.iter().any(|row| row.name.contains("emulated")) {
        text += "  This machine has no hardware virtualization, so the VM's CPU is emulated: its ratio\n  \
                 tells how fast the emulator is and means little for the disk.\n";
    }
    text += &format!("  fio's own reports: {}\n", raw.display());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_file_names() {
        assert_eq!(file_stem("UML, pericarp-block"), "uml-pericarp-block");
        assert_eq!(file_stem("VM, emulated CPU"), "vm-emulated-cpu");
    }

    #[test]
    fn the_median_is_not_moved_by_one_bad_round() {
        assert_eq!(median(vec![50.0, 1.0, 52.0]), 50.0);
        assert_eq!(median(vec![2.0, 1.0]), 1.0);
        assert!(median(vec![]).is_nan());
    }

    #[test]
    fn ratios_are_to_the_first_row() {
        let row = |name: &str, iops: [f64; 3]| Row {
            name: name.to_owned(),
            rounds: iops
                .map(|iops| Reads {
                    iops,
                    p50_us: 600.4,
                    p99_us: 1200.6,
                })
                .to_vec(),
        };
        let text = report(
            &[
                row("runc", [40_000.0, 50_000.0, 90_000.0]),
                row("VM, emulated CPU", [4_000.0, 4_000.0, 5_000.0]),
            ],
            "ext4",
            Path::new("raw"),
        );
        let line = |start: &str| {
            text.lines()
                .find(|line| line.trim_start().starts_with(start))
                .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
                .unwrap()
        };
        assert_eq!(line("runc"), "runc 50000 1.00 40000..90000 600 1201");
        assert_eq!(
            line("VM,"),
            "VM, emulated CPU 4000 0.08 4000..5000 600 1201"
        );
        assert!(text.contains("means little"));
    }
}
