//! Turns `proto/cri.proto` into Rust: the messages, and no client, which `src/cri/client.rs` is.

use protobuf_codegen::{Codegen, Customize};

fn main() {
    println!("cargo::rerun-if-changed=proto");
    Codegen::new()
        .pure()
        .include("proto")
        .input("proto/cri.proto")
        // Nothing here looks at messages without knowing what they are.
        .customize(Customize::default().lite_runtime(true))
        .cargo_out_dir("cri")
        .run()
        .expect("proto/cri.proto is well formed");
}
