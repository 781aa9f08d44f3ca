//! The chart, held against its schema, helm's own rules and what it came to last time. Left out and named where helm is
//! not there.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::run::{Step, path_with_programs};
use crate::workspace::Workspace;

const CHART: &str = "charts/holdfast";
/// Values that the schema must refuse: a typo at each depth, a wrong type, and a wrong word.
const REFUSED: [&str; 5] = [
    "imagee.tag=x",
    "operator.replica=3",
    "operator.replicas=many",
    "image.pullPolicy=Maybe",
    "monitoring.rules.enable=true",
];
/// What the chart comes to, and the values that it does so with.
const GOLDEN: [(&str, Option<&str>); 2] = [
    ("xtask/testdata/chart/default.yaml", None),
    ("xtask/testdata/chart/everything.yaml", Some("xtask/testdata/chart/everything.values.yaml")),
];
/// Their own golden files are the chart's templates.
const DEFINITION: &str = "kind: CustomResourceDefinition";

pub fn check(workspace: &Workspace) -> Result<()> {
    let path = path_with_programs(workspace);
    if helm(workspace, &path, &["version"]).is_err() {
        eprintln!("== skipped: chart: helm is not there");
        return Ok(());
    }
    Step::program(workspace, "chart", "helm", &["lint", "--strict", "--quiet", CHART]).env("PATH", &path).run()?;
    for value in REFUSED {
        let rendered = helm(workspace, &path, &["template", CHART, "--set", value]);
        ensure!(rendered.is_err(), "the chart's values.schema.json lets {value} pass");
    }
    for (golden, values) in GOLDEN {
        compare(workspace, &path, golden, values)?;
    }
    Ok(())
}

/// The reviewer reads a difference of what is installed.
fn compare(workspace: &Workspace, path: &OsStr, golden: &str, values: Option<&str>) -> Result<()> {
    let mut arguments = vec!["template", "holdfast", CHART, "--namespace", "holdfast-system"];
    arguments.extend(values.iter().flat_map(|values| ["--values", values]));
    let rendered = helm(workspace, path, &arguments)?;
    let objects: Vec<&str> = rendered.split("---\n").filter(|object| !object.contains(DEFINITION)).collect();
    let rendered = objects.join("---\n");
    let file = workspace.root.join(golden);
    if env::var_os("BLESS").is_some() {
        return fs::write(&file, rendered).with_context(|| golden.to_owned());
    }
    let expected = fs::read_to_string(&file).with_context(|| golden.to_owned())?;
    ensure!(
        expected == rendered,
        "{golden} is not what the chart comes to; write it anew with BLESS=1 and read the difference"
    );
    Ok(())
}

fn helm(workspace: &Workspace, path: &OsStr, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program(path, "helm"))
        .args(arguments)
        .current_dir(&workspace.root)
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()?;
    ensure!(output.status.success(), "helm: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// In the given path, not in that of this process.
fn program(path: &OsStr, name: &str) -> OsString {
    let found = env::split_paths(path).map(|folder| folder.join(name)).find(|file| file.is_file());
    found.map_or_else(|| name.into(), Into::into)
}
