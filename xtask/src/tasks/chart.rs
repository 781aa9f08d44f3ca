//! The chart, held against its schema and helm's own rules. Left out and named where helm is not installed.

use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use crate::run::{Step, path_with_tools};
use crate::workspace::Workspace;

const CHART: &str = "charts/holdfast";
/// Values that the schema must refuse: a typo at each depth, a wrong type, and a wrong word.
const REFUSED: [&str; 4] = ["imagee.tag=x", "operator.replica=3", "operator.replicas=many", "image.pullPolicy=Maybe"];

pub fn check(workspace: &Workspace) -> Result<()> {
    if Command::new("helm").arg("version").env("PATH", path_with_tools(workspace)).output().is_err() {
        eprintln!("== skipped: chart: helm is not installed");
        return Ok(());
    }
    Step::program(workspace, "chart", "helm", &["lint", "--strict", "--quiet", CHART]).run()?;
    for value in REFUSED {
        let status = Command::new("helm")
            .args(["template", CHART, "--set", value])
            .current_dir(&workspace.root)
            .env("PATH", path_with_tools(workspace))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        ensure!(!status.success(), "the chart's values.schema.json lets {value} pass");
    }
    Ok(())
}
