//! The checked-in Rust is what `proto/` generates. With `HOLDFAST_REGENERATE=1` it is written instead of compared.

use std::path::{Path, PathBuf};

const FILES: [&str; 4] =
    ["holdfast/v1/common.proto", "holdfast/v1/node.proto", "holdfast/v1/cluster.proto", "holdfast/v1/enrollment.proto"];
const GENERATED: &str = "holdfast.v1.rs";

fn generate(root: &Path, out: &Path) -> String {
    let descriptors = protox::compile(FILES, [root.join("proto")]).expect("the proto files compile");
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .emit_rerun_if_changed(false)
        .out_dir(out)
        .compile_fds(descriptors)
        .expect("code is generated");
    std::fs::read_to_string(out.join(GENERATED)).expect("the package was generated")
}

#[test]
fn checked_in_code_is_what_the_proto_files_generate() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().expect("a directory for the output");
    let generated = generate(&root, out.path());
    let path = root.join("src/generated").join(GENERATED);
    if std::env::var_os("HOLDFAST_REGENERATE").is_some() {
        std::fs::write(&path, &generated).expect("the checked-in file can be written");
        return;
    }
    let checked_in = std::fs::read_to_string(&path).expect("the checked-in file is there");
    let differs = checked_in.lines().zip(generated.lines()).position(|(old, new)| old != new);
    assert!(
        checked_in == generated,
        "{} differs from proto/ at line {}; run HOLDFAST_REGENERATE=1 cargo test -p holdfast-api --test generated",
        path.display(),
        differs.unwrap_or_else(|| checked_in.lines().count().min(generated.lines().count())) + 1,
    );
}

/// The proto files are the reference manual of the API: units, and what zero or absence means, stand there.
#[test]
fn every_declaration_is_documented() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    for file in FILES {
        let text = std::fs::read_to_string(root.join("proto").join(file)).expect("the file is there");
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let declares = |line: &str| {
            let block = ["service ", "rpc ", "enum ", "message "].iter().any(|word| line.starts_with(word));
            let field = !line.starts_with("//") && line.contains(" = ") && !line.starts_with("syntax");
            block || field
        };
        assert!(lines.iter().any(|line| declares(line)), "{file} declares nothing");
        for (number, line) in lines.iter().enumerate().skip(1) {
            assert!(!declares(line) || lines[number - 1].starts_with("//"), "{file}:{}: {line}", number + 1);
        }
    }
}
