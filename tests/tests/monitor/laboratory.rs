//! Runs tests of this suite in laboratories, one after the other and each in a process of
//! its own. For the two tests in `main`.
//!
//! A laboratory is an emulated machine, and its own kind of trouble: on some hosts the clock of
//! every guest in it stands from some moment on, whoever its monitor is. So after a test
//! that failed a witness is asked, a guest of QEMU's in the same laboratory that
//! sleeps three times. What it says is printed with what the laboratory's kernel has to say of its
//! clocks, and the tests go on, from the one that failed, in a new laboratory:
//! - where the witness slept well, once: a test that fails in two laboratories failed;
//! - where it did not, twice. If then it did in none, nothing was learned of the
//!   monitor, and the rest is skipped, as loudly as can be.

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use pericarp_tests::guest::{Assets, initramfs};
use pericarp_tests::lab::{Lab, OUT, quoted};
use pericarp_tests::parts::{Part, absent, skip};
use pericarp_tests::scratch::Scratch;

use crate::rig;

/// Half the tests in a laboratory, whose CPU is emulated and whose guests' CPUs are emulated
/// twice: minutes. After this long it hangs.
const LIMIT: Duration = Duration::from_secs(1200);
/// How many laboratories there are for one half, at most.
const MOST: usize = 3;

/// Held by the only laboratory there may be where memory is short.
static ALONE: Mutex<()> = Mutex::new(());

/// What the script in the laboratory ends with.
mod code {
    /// A test failed, and a guest of QEMU's slept well.
    pub(super) const FAILED: i32 = 10;
    /// A test failed, and no guest of QEMU's has a clock either.
    pub(super) const NO_CLOCK: i32 = 11;
}

/// Runs the tests there whose names begin with one of these.
pub(crate) fn passes(test: &str, modules: &[&str]) {
    if Lab::is_here() {
        return;
    }
    if let Some(why) = Lab::lacks() {
        skip(test, &why);
        return;
    }
    let short_of_memory = available_mib() < 3 * Lab::MEMORY_MIB;
    let _alone = short_of_memory.then(|| ALONE.lock());
    let mut left = chosen(modules);
    assert!(!left.is_empty(), "no test is to be run in the laboratory");
    let (mut failed, mut no_clock) = (0, 0);
    loop {
        let round = Round::of(&left);
        left.drain(..round.passed);
        if round.ended_well() {
            assert!(left.is_empty(), "these did not run: {left:?}");
            return;
        }
        let name = left.first().map_or("the end", String::as_str);
        eprintln!(
            "lab: {name} did not pass; the laboratory {}; it counted {} s, we {:.1} s",
            round.verdict(),
            round.uptime(),
            round.took.as_secs_f64()
        );
        match round.code {
            Some(code::NO_CLOCK) => no_clock += 1,
            _ => failed += 1,
        }
        if failed == 2 || (failed == 1 && failed + no_clock == MOST) {
            panic!(
                "{name} failed in the laboratory:\n{}",
                failures(&round.said)
            );
        }
        if no_clock == MOST {
            let why = "guests stand still in every laboratory here, QEMU's as well";
            absent(test, &format!("from {name} on: {why}"));
            return;
        }
    }
}

/// The names of the tests that begin so, or of those that were asked for by name.
fn chosen(modules: &[&str]) -> Vec<String> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    // Whoever asked for these tests alone asked for all of them there.
    let asked = words
        .iter()
        .filter(|word| !word.starts_with('-') && !word.starts_with("all_"));
    let asked: Vec<&str> = asked.map(String::as_str).collect();
    let list = Command::new(std::env::current_exe().unwrap())
        .args(["--list", "--format", "terse"])
        .output()
        .unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    let wanted = |name: &&str| {
        let here = modules.iter().any(|module| name.starts_with(module));
        here && (asked.is_empty() || asked.iter().any(|word| name.contains(word)))
    };
    names.filter(wanted).map(str::to_owned).collect()
}

/// One laboratory, and what became of it.
struct Round {
    /// So many of the tests passed, in order.
    passed: usize,
    /// What its script ended with, if it came to its end.
    code: Option<i32>,
    said: String,
    took: Duration,
}

impl Round {
    fn of(names: &[String]) -> Self {
        let scratch = Scratch::new();
        let out = scratch.path("out");
        std::fs::create_dir_all(&out).unwrap();
        let assets = Assets::find().unwrap();
        let mut lab = Lab::new(&script(names, &assets));
        let witness = "for i in 1 2 3; do sleep 1; echo slept; done";
        let image = initramfs(&scratch, &assets, &[], witness).unwrap();
        std::fs::copy(image, out.join("witness")).unwrap();
        lab.out = Some(out);
        lab.limit = LIMIT + rig::life();
        lab.live = true;
        for name in [
            "PERICARP_ASSETS",
            "PERICARP_REQUIRE_ALL",
            "PERICARP_POKE_SECONDS",
            "RUST_BACKTRACE",
        ] {
            if let Ok(value) = std::env::var(name) {
                lab.variables.push((name.to_owned(), value));
            }
        }
        let start = Instant::now();
        let (code, said) = match lab.run() {
            Ok(report) => (Some(report.code), report.output),
            Err(error) => (None, error.to_string()),
        };
        let done = |line: &&str| line.starts_with("lab: passed ");
        Self {
            passed: said.lines().filter(done).count(),
            code,
            took: start.elapsed(),
            said,
        }
    }

    fn ended_well(&self) -> bool {
        self.code == Some(0)
    }

    fn verdict(&self) -> String {
        match self.code {
            Some(code::FAILED) => "lets a guest of QEMU's sleep".into(),
            Some(code::NO_CLOCK) => "lets no guest of QEMU's sleep either".into(),
            Some(code) => format!("ended with {code}"),
            None => format!("did not come to its end: {}", self.said),
        }
    }

    /// How long it was up, as it saw it.
    fn uptime(&self) -> &str {
        let line = self.said.lines().rev();
        let mut line = line.filter_map(|line| line.strip_prefix("lab: up "));
        line.next().unwrap_or("nobody knows how many")
    }
}

/// What the laboratory's shell does. The lines of the harness that count tests are left
/// as they are where a test passed, and where none did are made such that none is counted.
fn script(names: &[String], assets: &Assets) -> String {
    let program = std::env::current_exe().unwrap();
    let program = quoted(&program.to_string_lossy());
    let qemu = Part::QemuSystem.find().unwrap();
    let mut script = format!(
        "passes() {{\n\
             echo \"lab: $1\"\n\
             if {program} \"$1\" --exact --test-threads=1 --nocapture >/tmp/said 2>&1; then\n\
                 cat /tmp/said; echo \"lab: passed $1\"; return\n\
             fi\n\
             sed 's/^test result: /it said: /; s/^failures:/failed:/' /tmp/said\n\
             {facts}\n\
             if timeout -k 5 90 {qemu} -machine q35 -accel kvm -cpu host -m 256M -nodefaults \\\n\
                 -no-reboot -display none -serial stdio -kernel {kernel} -initrd {OUT}/witness \\\n\
                 -append 'console=ttyS0 quiet panic=-1' >/tmp/witness </dev/null 2>&1 &&\n\
                 [ $(grep -c slept /tmp/witness) = 3 ]\n\
             then exit {failed}; fi\n\
             tail -n 20 /tmp/witness; {facts}; exit {no_clock}\n\
         }}\n",
        qemu = quoted(&qemu.to_string_lossy()),
        kernel = quoted(&assets.kernel().to_string_lossy()),
        facts = FACTS,
        failed = code::FAILED,
        no_clock = code::NO_CLOCK,
    );
    for name in names {
        script += &format!("passes {}\n", quoted(name));
    }
    script
}

/// What may say why a guest's clock stands.
const FACTS: &str = "\
    echo \"lab: up $(cut -d ' ' -f 1 /proc/uptime)\"; \
    cat /sys/devices/system/clocksource/clocksource0/current_clocksource; \
    dmesg | grep -i -e tsc -e clocksource -e timekeeping -e 'rcu.*stall' | tail -n 12; \
    grep -e LOC -e timer /proc/interrupts";

/// What this machine could give without taking it from others.
fn available_mib() -> u32 {
    let memory = std::fs::read_to_string(Path::new("/proc/meminfo")).unwrap();
    let line = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u32 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib / 1024
}

/// Each panic and the lines that follow it, without the frames: all else was
/// printed while it came.
fn failures(output: &str) -> String {
    let mut why = String::new();
    let mut room = 0;
    for line in output.lines() {
        if line.contains(" panicked at ") {
            room = 40;
        }
        if line == "failed:" || line.starts_with("it said: ") {
            room = 0;
        }
        let frame = line.trim_start();
        let frame = frame.starts_with("at ") || frame.contains(": core::");
        if room > 0 && !frame {
            room -= 1;
            why = why + line + "\n";
        }
    }
    why
}
