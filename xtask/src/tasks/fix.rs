//! `cargo xtask fix`: rewrites generated code, what clippy can correct, and the formatting, in this order, because
//! each may disturb what the next puts right.

use anyhow::Result;

use crate::run::Step;
use crate::workspace::Workspace;

pub fn run(workspace: &Workspace) -> Result<()> {
    Step::cargo(workspace, "generated code of the API", &["test", "--quiet", "-p", "holdfast-api"])
        .env("HOLDFAST_REGENERATE", "1")
        .run()?;
    Step::cargo(
        workspace,
        "clippy",
        &["clippy", "--fix", "--workspace", "--all-targets", "--allow-dirty", "--allow-staged"],
    )
    .run()?;
    Step::cargo(workspace, "format", &["fmt", "--all"]).run()
}
