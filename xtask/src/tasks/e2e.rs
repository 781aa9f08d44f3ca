//! `cargo xtask e2e`: makes the cluster and the images where they are not there, and runs lanes of tests on them.

use anyhow::Result;

use crate::tasks::cluster::{Cluster, Options};
use crate::tasks::image;
use crate::workspace::Workspace;

/// The lane with an image of its own, and the folder of its Dockerfile.
const POSTGRES: &str = "postgres";

#[derive(clap::Args)]
pub struct Arguments {
    /// Lanes to run, such as `smoke`; all of them where absent
    #[arg(long)]
    lane: Vec<String>,
    /// Further arguments of `holdfast-e2e`
    #[arg(last = true)]
    further: Vec<String>,
}

pub fn run(workspace: &Workspace, options: &Options, arguments: &Arguments) -> Result<()> {
    let [image, tests] = &image::run_with_tests(workspace)?;
    let cluster = Cluster::find(workspace, options)?;
    cluster.up()?;
    let wants = |lane: &str| arguments.lane.is_empty() || arguments.lane.iter().any(|wanted| wanted == lane);
    let postgres = wants(POSTGRES).then(|| image::run_foreign(workspace, POSTGRES)).transpose()?;
    let images: Vec<String> = [image, tests].into_iter().chain(&postgres).cloned().collect();
    cluster.load(&images)?;
    let chart = workspace.root.join("charts/holdfast").display().to_string();
    let values = workspace.root.join("e2e/values.yaml").display().to_string();
    let artifacts = workspace.target.join("e2e").display().to_string();
    let mut words = vec![
        "run",
        "--image",
        image,
        "--tests-image",
        tests,
        "--chart",
        &chart,
        "--values",
        &values,
        "--artifacts",
        &artifacts,
    ];
    words.extend(postgres.iter().flat_map(|image| ["--postgres-image", image]));
    words.extend(arguments.lane.iter().flat_map(|lane| ["--lane", lane]));
    words.extend(arguments.further.iter().map(String::as_str));
    cluster.step("lanes", image::program(workspace, image::TESTS), &words).run()
}
