//! The second half of the demo: one fio job on one file, from a container, from
//! a virtual machine, and through Linux's own virtio driver at native speed.
//!
//! Called by the demo. Every row reads the same file with the same job; the
//! whole JSON report of each is kept in `target/demo/raw`.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::pericarp::{Runtime, pericarp_run};
use super::table::{self, Align};
use crate::command::{Failure, capture};
use crate::fio::{self, Reads};
use crate::janitor::Janitor;
use crate::project::Project;

/// The job, relative to the source tree.
const JOB: &str = "fio-profiles/randread-4k-qd32.fio";

/// One row: where the job ran and what it reached.
struct Row {
    name: &'static str,
    reads: Reads,
}

/// What is the same for all rows.
struct Bench<'a> {
    project: &'a Project,
    root: &'a Path,
    data: &'a Path,
    raw: &'a Path,
    job: String,
}

/// Runs all rows and returns the table with what to make of it.
pub(crate) fn compare(
    project: &Project,
    dir: &Path,
    root: &Path,
    data: &Path,
    janitor: &mut Janitor,
) -> Result<String, Failure> {
    let raw = dir.join("raw");
    fs::create_dir_all(&raw).map_err(|e| format!("cannot create {}: {e}", raw.display()))?;
    let job = project.root.join(JOB);
    let job = fs::read_to_string(&job)
        .map_err(|e| format!("cannot read the job {}: {e}", job.display()))?;
    let bench = Bench {
        project,
        root,
        data,
        raw: &raw,
        job,
    };
    let rows = [
        bench.row("runc", &mut bench.inside(Runtime::Runc), janitor)?,
        bench.row(
            "UML, pericarp-block",
            &mut bench.native("pericarp"),
            janitor,
        )?,
        bench.row(
            "UML, qemu-storage-daemon",
            &mut bench.native("qemu"),
            janitor,
        )?,
        bench.row(vm_name(), &mut bench.inside(Runtime::Vm), janitor)?,
    ];
    Ok(report(&rows, &file_system(dir), &raw))
}

impl Bench<'_> {
    /// `pericarp run` with the job in a container or in a virtual machine.
    fn inside(&self, runtime: Runtime) -> Command {
        let mut command = pericarp_run(self.project, runtime, self.root, Some(self.data));
        command.args(["sh", "-c", &self.script("/dev/pericarp/disk1")]);
        command
    }

    /// The job in User-mode Linux, with the named program serving the disk.
    fn native(&self, backend: &str) -> Command {
        let mut command = Command::new(self.project.release_program("pericarp-uml-run"));
        command
            .args(["--backend", backend, "--blk-file"])
            .arg(self.data)
            .args(["--", "sh", "-c", &self.script("/dev/vda")]);
        command
    }

    /// Hands fio the job itself rather than a file name, which would have to
    /// exist inside.
    fn script(&self, disk: &str) -> String {
        format!(
            "printf %s '{}' | FIO_FILE={disk} fio --output-format=json --readonly -",
            self.job.replace('\'', r"'\''")
        )
    }

    fn row(
        &self,
        name: &'static str,
        command: &mut Command,
        janitor: &mut Janitor,
    ) -> Result<Row, Failure> {
        println!("      {name}");
        let printed = janitor.run_well(command)?;
        let (reads, report) = fio::reads(&printed).map_err(|e| format!("{name}: {e}"))?;
        let file = self.raw.join(format!("{}.json", file_stem(name)));
        fs::write(&file, report).map_err(|e| format!("cannot write {}: {e}", file.display()))?;
        Ok(Row { name, reads })
    }
}

/// The virtual machine's row says when its CPU is emulated.
fn vm_name() -> &'static str {
    if hardware_virtualisation() {
        "VM"
    } else {
        "VM (emulated CPU)"
    }
}

/// Whether KVM can be backed by this machine's hardware; the same two signs
/// `pericarp run` goes by.
fn hardware_virtualisation() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = flags
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or("");
    Path::new("/dev/kvm").exists() && flags.split(' ').any(|flag| flag == "vmx" || flag == "svm")
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
    capture(Command::new("stat").args(["-f", "-c", "%T"]).arg(dir))
        .map_or_else(|_| "unknown".to_owned(), |name| name.trim().to_owned())
}

fn report(rows: &[Row], file_system: &str, raw: &Path) -> String {
    let mut cells = vec![
        [
            "4 KiB random read, direct, depth 32",
            "IOPS",
            "p50 us",
            "p99 us",
            "of runc",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    let base = rows.first().map_or(f64::NAN, |row| row.reads.iops);
    for Row { name, reads } in rows {
        cells.push(vec![
            (*name).to_owned(),
            format!("{:.0}", reads.iops),
            format!("{:.0}", reads.p50_us),
            format!("{:.0}", reads.p99_us),
            format!("{:.2}", reads.iops / base),
        ]);
    }
    let mut text = table::set(&cells, Align::Right);
    text += &format!(
        "  All rows read the same 256 MiB file (file system: {file_system}), once, for five seconds.\n  \
         The row to quote is UML with pericarp-block: Linux's own virtio driver at the CPU's own speed.\n"
    );
    if rows.iter().any(|row| row.name.contains("emulated")) {
        text += "  The VM's CPU is emulated here, as this machine offers no hardware virtualisation: its\n  \
                 ratio says how fast the emulator is, not how fast the disk is.\n";
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
        assert_eq!(file_stem("VM (emulated CPU)"), "vm-emulated-cpu");
    }

    #[test]
    fn ratios_are_to_the_first_row() {
        let row = |name, iops| Row {
            name,
            reads: Reads {
                iops,
                p50_us: 600.4,
                p99_us: 1200.6,
            },
        };
        let text = report(
            &[row("runc", 50_000.0), row("VM (emulated CPU)", 4_000.0)],
            "ext2/ext3",
            Path::new("raw"),
        );
        let line = |start: &str| {
            text.lines()
                .find(|line| line.trim_start().starts_with(start))
                .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
                .unwrap()
        };
        assert_eq!(line("runc"), "runc 50000 600 1201 1.00");
        assert_eq!(line("VM (emu"), "VM (emulated CPU) 4000 600 1201 0.08");
        assert!(text.contains("how fast the emulator is"));
    }
}
