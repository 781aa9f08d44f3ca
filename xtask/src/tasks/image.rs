//! `cargo xtask image`: the programs as they ship, and the image made of them.
//!
//! Cargo builds outside of docker, where it reaches its registry and keeps what it has built; the Dockerfile's default
//! target builds inside, for those who have docker alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::run::Step;
use crate::workspace::Workspace;

/// The profile of Cargo.toml that programs in images are built with.
const PROFILE: &str = "image";
/// Packages and the program of each.
const PROGRAMS: [(&str, &str); 3] =
    [("holdfast-cli", "holdfast"), ("holdfast-operator", "holdfast-operator"), ("holdfast-csi", "holdfast-csi")];
/// What the lanes of tests run on the host and in pods.
pub const TESTS: &str = "holdfast-e2e";

/// Builds the image and returns its name.
pub fn run(workspace: &Workspace) -> Result<String> {
    build(workspace, &PROGRAMS)?;
    docker(workspace, &PROGRAMS, "Dockerfile", &name(workspace)?)
}

/// Builds the image and one with the tests' own program above it; returns both names.
pub fn run_with_tests(workspace: &Workspace) -> Result<[String; 2]> {
    let tests = [(TESTS, TESTS)];
    build(workspace, &[&PROGRAMS[..], &tests].concat())?;
    let name = name(workspace)?;
    let image = docker(workspace, &PROGRAMS, "Dockerfile", &name)?;
    // One name for the base, so that its Dockerfile needs no argument.
    let base = ["tag", &image, "holdfast:under-test"];
    Step::program(workspace, "name the image under test", "docker", &base).run()?;
    let tests = docker(workspace, &tests, "e2e/Dockerfile", &name.replacen("holdfast:", "holdfast-e2e:", 1))?;
    Ok([image, tests])
}

/// Builds an image of `e2e/<name>/Dockerfile`, which takes nothing from this workspace; returns its name.
pub fn run_foreign(workspace: &Workspace, name: &str) -> Result<String> {
    let tag = format!("holdfast-e2e-{name}:1");
    docker(workspace, &[], &format!("e2e/{name}/Dockerfile"), &tag)
}

/// `holdfast:<commit>`, with `-dirty` where the tree differs from it.
pub fn name(workspace: &Workspace) -> Result<String> {
    let git = |arguments: &[&str]| -> Result<String> {
        let output = Command::new("git")
            .args(arguments)
            .current_dir(&workspace.root)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("cannot start git")?;
        ensure!(output.status.success(), "git {}: {}", arguments.join(" "), output.status);
        Ok(String::from_utf8(output.stdout).context("git")?.trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=10", "HEAD"])?;
    let dirty = if git(&["status", "--porcelain"])?.is_empty() { "" } else { "-dirty" };
    Ok(format!("holdfast:{commit}{dirty}"))
}

/// Where a program is after `build`.
pub fn program(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.target.join(PROFILE).join(name)
}

fn build(workspace: &Workspace, programs: &[(&str, &str)]) -> Result<()> {
    let mut arguments = vec!["build", "--quiet", "--locked", "--profile", PROFILE];
    for (package, _) in programs {
        arguments.extend(["-p", package]);
    }
    Step::cargo(workspace, "build the programs for the image", &arguments).run()
}

/// Builds the target `prebuilt` of a Dockerfile from a folder with nothing but the programs.
fn docker(workspace: &Workspace, programs: &[(&str, &str)], dockerfile: &str, tag: &str) -> Result<String> {
    let context = workspace.target.join(PROFILE).join("context");
    if context.exists() {
        fs::remove_dir_all(&context).with_context(|| context.display().to_string())?;
    }
    fs::create_dir_all(&context).with_context(|| context.display().to_string())?;
    for (_, name) in programs {
        let from = program(workspace, name);
        // A link, because programs are large and the folder lives as long as one build.
        fs::hard_link(&from, context.join(name)).with_context(|| from.display().to_string())?;
    }
    let file = workspace.root.join(dockerfile);
    let words = ["build", "--quiet", "--target", "prebuilt", "--tag", tag, "--file"];
    let arguments: Vec<_> = words.iter().map(Path::new).chain([file.as_path(), context.as_path()]).collect();
    Step::program(workspace, &format!("image {tag}"), "docker", &arguments).stdout_to_stderr().run()?;
    Ok(tag.to_owned())
}
