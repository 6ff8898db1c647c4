//! Turns `proto/agent.proto` into Rust: the messages, the client and the server's trait.

use std::{fs, path::Path};

use ttrpc_codegen::{Codegen, Customize};

fn main() {
    println!("cargo::rerun-if-changed=proto");
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    Codegen::new()
        .out_dir(&out)
        .include("proto")
        .input("proto/agent.proto")
        .rust_protobuf()
        .customize(Customize::default())
        .run()
        .expect("proto/agent.proto is well formed");
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        without_inner_attributes(&Path::new(&out).join(name));
    }
}

/// The generators write files for `mod`; `include!` takes neither inner attributes nor inner
/// documentation.
fn without_inner_attributes(file: &Path) {
    let text = fs::read_to_string(file).expect("the generator wrote this file");
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    fs::write(file, kept.join("\n")).expect("OUT_DIR is writable");
}
