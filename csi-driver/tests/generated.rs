//! The checked-in Rust is what `proto/` generates. With `HOLDFAST_REGENERATE=1` it is written instead of compared.

use std::path::{Path, PathBuf};

const FILES: [&str; 2] = ["csi.proto", "pluginregistration.proto"];
const GENERATED: [&str; 2] = ["csi.v1.rs", "pluginregistration.rs"];

fn generate(root: &Path, out: &Path) {
    let descriptors = protox::compile(FILES, [root.join("proto")]).expect("the proto files compile");
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .btree_map(".")
        // The specification's words stay in the specification's file.
        .disable_comments(["."])
        .emit_rerun_if_changed(false)
        .out_dir(out)
        .compile_fds(descriptors)
        .expect("code is generated");
}

#[test]
fn checked_in_code_is_what_the_proto_files_generate() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().expect("a directory for the output");
    generate(&root, out.path());
    for name in GENERATED {
        let generated = std::fs::read_to_string(out.path().join(name)).expect("the package was generated");
        let path = root.join("src/generated").join(name);
        if std::env::var_os("HOLDFAST_REGENERATE").is_some() {
            std::fs::write(&path, &generated).expect("the checked-in file can be written");
            continue;
        }
        let checked_in = std::fs::read_to_string(&path).expect("the checked-in file is there");
        assert!(
            checked_in == generated,
            "{} differs from proto/; run HOLDFAST_REGENERATE=1 cargo test -p holdfast-csi --test generated",
            path.display()
        );
    }
}
