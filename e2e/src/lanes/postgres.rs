//! PostgreSQL on a volume, under pgbench, while the storage node that leads the volume is killed again and again: no
//! transaction fails, and afterwards every page and index is as it should be.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::Api;
use kube::api::PostParams;
use tokio::time::sleep;

use crate::command::{kubectl, run as command};
use crate::environment::{Environment, LATE, SOON};
use crate::lanes::{Cases, faults};
use crate::objects::{self, Mode, WORK};
use crate::wait::{Seen, until};

const CLAIM: &str = "postgres";
const POD: &str = "postgres-0";
/// A hundred thousand accounts each, about 15 MiB.
const SCALE: &str = "20";
const LOAD: Duration = Duration::from_secs(300);
const KILL_EVERY: Duration = Duration::from_secs(20);

pub async fn run(cases: &mut Cases<'_>) {
    let environment = cases.environment;
    cases.case("postgres leader killed every 20 s", async || under_load(environment).await).await;
}

async fn under_load(environment: &Environment<'_>) -> Result<()> {
    let image = environment.run.postgres_image.as_deref().context("--postgres-image")?;
    environment.create_claim(CLAIM, Mode::Ext4, "2Gi").await?;
    let sets: Api<StatefulSet> = environment.work();
    sets.create(&PostParams::default(), &objects::postgres(CLAIM, image)?).await?;
    environment.writer_runs(CLAIM).await?;
    until("PostgreSQL answers", LATE, async || Ok(Seen::Done(in_pod(&["pg_isready"], SOON).await?))).await?;
    in_pod(&["pgbench", "--initialize", "--quiet", "--scale", SCALE, "postgres"], LATE).await?;

    let seconds = LOAD.as_secs().to_string();
    let load = ["pgbench", "--client=4", "--jobs=2", "--time", &seconds, "--progress=20", "postgres"];
    // It ends by itself; what it waits for is in the limit.
    let (report, kills) = tokio::join!(in_pod(&load, LATE), kill_leaders(environment));
    let report = report?;
    println!("{}", report.trim());
    println!("{kills} times the storage node that led was killed");
    ensure!(kills > 0, "no storage node was killed");
    ensure!(report.contains("number of failed transactions: 0 "), "transactions failed");

    environment.whole(CLAIM).await?;
    checked().await?;
    // A start on another node reads all of it from the volume.
    kubectl(&["delete", "pod", "--namespace", WORK, POD]).await?;
    environment.writer_runs(CLAIM).await?;
    until("PostgreSQL answers", LATE, async || Ok(Seen::Done(in_pod(&["pg_isready"], SOON).await?))).await?;
    checked().await?;
    environment.stop_writer(CLAIM).await?;
    environment.delete_claims(&[CLAIM]).await
}

/// Every table against its indexes, and the sums that pgbench keeps equal.
async fn checked() -> Result<()> {
    in_pod(&["pg_amcheck", "--install-missing", "--heapallindexed", "--parent-check", "postgres"], LATE).await?;
    let sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(bbalance) from pgbench_branches) \
                and (select sum(tbalance) from pgbench_tellers) = (select coalesce(sum(delta), 0) from pgbench_history) \
                and (select sum(tbalance) from pgbench_tellers) = (select sum(bbalance) from pgbench_branches)";
    let equal = in_pod(&["psql", "--tuples-only", "--no-align", "--command", sums, "postgres"], LATE).await?;
    ensure!(equal.trim() == "t", "the sums of accounts, tellers, branches and history differ: {equal}");
    Ok(())
}

async fn kill_leaders(environment: &Environment<'_>) -> u32 {
    let started = Instant::now();
    let mut kills = 0;
    while started.elapsed() + KILL_EVERY < LOAD {
        sleep(KILL_EVERY).await;
        // Kubernetes starts what was killed often later and later: nobody may lead for a while, and requests wait.
        let Ok(Some(leader)) = environment.leader(CLAIM).await else { continue };
        match faults::kill_storage_node_named(environment, &leader).await {
            Ok(()) => kills += 1,
            Err(error) => println!("not killed: {error:#}"),
        }
    }
    kills
}

async fn in_pod(words: &[&str], limit: Duration) -> Result<String> {
    let exec = ["exec", "--namespace", WORK, POD, "--"];
    command("kubectl", &[&exec[..], words].concat(), limit).await
}
