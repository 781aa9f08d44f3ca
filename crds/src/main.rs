//! `holdfast-crds generate DIR` writes the definitions into the chart.

use std::io;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [verb, dir] = &arguments[..] else { return usage() };
    if verb != "generate" {
        return usage();
    }
    match generate(Path::new(dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{dir}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: holdfast-crds generate DIR");
    ExitCode::from(2)
}

fn generate(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    for document in holdfast_crds::documents() {
        std::fs::write(dir.join(&document.file), document.text())?;
    }
    Ok(())
}
