//! `cargo xtask verify`: everything that must hold before a change lands.
//!
//! It writes nothing into the source tree: every cargo command runs with `--locked`, formatting is only compared.
//! The cheap rules come first and report all their violations together; the tests come last, so that the test
//! runner's summary is the last thing printed.

use anyhow::{Result, bail};

use crate::checks;
use crate::checks::layers;
use crate::run::Step;
use crate::tasks::{chart, test, tools};
use crate::workspace::Workspace;

pub fn run(workspace: &Workspace, skip_tests: bool) -> Result<()> {
    tools::require(workspace)?;
    rules(workspace)?;
    chart::check(workspace)?;
    Step::cargo(workspace, "format", &["fmt", "--all", "--check"]).run()?;
    Step::cargo(
        workspace,
        "clippy",
        &["clippy", "--workspace", "--all-targets", "--all-features", "--locked", "--", "-D", "warnings"],
    )
    .run()?;
    pure_crates(workspace)?;
    Step::cargo(
        workspace,
        "dependencies: bans, licenses, sources",
        &["deny", "--locked", "--workspace", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"],
    )
    .run()?;
    Step::cargo(
        workspace,
        "documentation",
        &["doc", "--workspace", "--no-deps", "--document-private-items", "--locked"],
    )
    .env("RUSTDOCFLAGS", "-D warnings")
    .run()?;
    if skip_tests {
        return Ok(());
    }
    test::run(workspace, &[])
}

/// The rules of the workspace itself; all violations are listed before it fails.
fn rules(workspace: &Workspace) -> Result<()> {
    eprintln!("== rules: layers, manifests, links");
    let mut violations = checks::layers::check(&workspace.crates);
    violations.extend(checks::manifests::check(workspace)?);
    violations.extend(checks::links::check(workspace)?);
    for violation in &violations {
        eprintln!("error: {violation}");
    }
    match violations.len() {
        0 => Ok(()),
        count => bail!("{count} violations of the rules of the workspace, listed above"),
    }
}

/// Pure crates once more, with the names of clocks, files, sockets, threads and unordered maps disallowed. Their tests
/// may use them, so only the libraries are looked at.
fn pure_crates(workspace: &Workspace) -> Result<()> {
    let mut arguments = vec!["clippy", "--lib", "--no-deps", "--locked"];
    for name in layers::pure_crates() {
        arguments.extend(["-p", name]);
    }
    arguments.extend(["--", "-D", "warnings"]);
    Step::cargo(workspace, "clippy for pure crates", &arguments)
        .env("CLIPPY_CONF_DIR", workspace.root.join(".config/pure"))
        .run()
}
