//! Makes the private modules that the bench `inside` measures: their source
//! files without their tests, which only build in their own crates, and without
//! what may only stand at the top of a file.

use std::path::Path;
use std::{env, fs, io};

const FILES: [&str; 4] = [
    "ring/src/memory.rs",
    "ring/src/sigbus.rs",
    "vhost/src/limiter.rs",
    "vhost/src/mailbox.rs",
];

fn main() -> io::Result<()> {
    let out = env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?;
    for name in FILES {
        let source = Path::new("../backends").join(name);
        println!("cargo::rerun-if-changed={}", source.display());
        let text = fs::read_to_string(&source)?;
        let code = text.split("\n#[cfg(test)]\n").next().unwrap_or_default();
        let top = |line: &&str| line.starts_with("//!") || line.starts_with("#![");
        let lines: Vec<&str> = code.lines().filter(|line| !top(line)).collect();
        let file = source.file_name().ok_or(io::ErrorKind::NotFound)?;
        fs::write(Path::new(&out).join(file), lines.join("\n"))?;
    }
    Ok(())
}
