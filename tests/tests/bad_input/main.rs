//! Command lines that cannot work. Each must end with exit code 2 and one line
//! on stderr that names the option and the value, nothing on stdout, and nothing
//! created or changed. One file for each program.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod block;
mod fs;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::parts::Part;

/// One command line: arguments, and what the one line must name.
struct Bad {
    name: &'static str,
    args: &'static [&'static str],
    names: &'static [&'static str],
}

const fn bad(
    name: &'static str,
    args: &'static [&'static str],
    names: &'static [&'static str],
) -> Bad {
    Bad { name, args, names }
}

/// Name, size and content of everything in `dir`.
fn picture(dir: &Path) -> BTreeMap<String, (u64, Vec<u8>)> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let content = std::fs::read(entry.path()).unwrap_or_default();
            let len = entry.metadata().unwrap().len();
            (
                entry.file_name().to_string_lossy().into_owned(),
                (len, content),
            )
        })
        .collect()
}

/// Runs it with `args`; says what is wrong with how it refuses.
fn fault(program: Part, dir: &Path, args: &[String], names: &[String]) -> Option<String> {
    let before = picture(dir);
    // Descriptor 9 is open, and no socket.
    let mut child = Command::new("sh")
        .args(["-c", "exec \"$0\" \"$@\" 9</dev/null"])
        .arg(program.find().unwrap())
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    if poll(Duration::from_secs(20), || child.try_wait().unwrap()).is_none() {
        child.kill().unwrap();
        child.wait().unwrap();
        return Some("it was accepted and runs".into());
    }
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let mut wrong = Vec::new();
    if output.status.code() != Some(2) {
        wrong.push(format!("{} instead of code 2", output.status));
    }
    if !output.stdout.is_empty() {
        wrong.push(format!(
            "stdout has {:?}",
            String::from_utf8_lossy(&output.stdout)
        ));
    }
    if stderr.lines().count() != 1 || !stderr.ends_with('\n') {
        wrong.push("stderr is not one line".into());
    }
    for name in names {
        if !stderr.contains(name) {
            wrong.push(format!("{name} is not named"));
        }
    }
    if picture(dir) != before {
        wrong.push("something was created or changed".into());
    }
    (!wrong.is_empty()).then(|| format!("{}: {}", wrong.join(", "), stderr.trim_end()))
}

/// Runs a program with every command line of a table, in whose arguments `@`
/// stands for `dir`; says what is wrong with how each is refused.
fn faults(program: Part, dir: &Path, table: &[Bad]) -> Vec<String> {
    let name = dir.to_str().unwrap();
    let filled = |words: &[&str]| -> Vec<String> {
        words.iter().map(|word| word.replace('@', name)).collect()
    };
    table
        .iter()
        .filter_map(|case| {
            let fault = fault(program, dir, &filled(case.args), &filled(case.names))?;
            Some(format!("{}: {fault}", case.name))
        })
        .collect()
}

fn assert_refused(faults: &[String], total: usize) {
    let (count, faults) = (faults.len(), faults.join("\n  "));
    assert!(count == 0, "{count} of {total} cases:\n  {faults}");
}
