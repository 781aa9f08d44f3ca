//! What helps to understand a failure, gathered into one folder while it is still there.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::command::{SHORT, kubectl, on_node, run};
use crate::environment::Environment;
use crate::objects::{CLUSTER, SYSTEM, WORK};

/// Lines of each container's log.
const TAIL: &str = "--tail=4000";

/// Fills `artifacts/<name>` and returns it. What cannot be had is replaced by the reason.
pub async fn collect(environment: &Environment<'_>, name: &str) -> Result<PathBuf> {
    let folder = environment.run.artifacts.join(name.replace([' ', '/'], "-"));
    fs::create_dir_all(&folder)?;
    let questions: [(&str, &[&str]); 7] = [
        (
            "objects.txt",
            &["get", "stc,volumes,storagenodes,storagedisks,pods,pvc,pv,volumeattachments,nodes", "-A", "-o", "wide"],
        ),
        ("holdfast.yaml", &["get", "stc,volumes,storagenodes,storagedisks", "-A", "-o", "yaml"]),
        ("claims.yaml", &["get", "pvc,pv,volumeattachments,csinodes", "-A", "-o", "yaml"]),
        ("events.txt", &["get", "events", "-A", "--sort-by=.lastTimestamp"]),
        ("pods.txt", &["describe", "pods", "-n", SYSTEM]),
        ("workload.txt", &["describe", "pods,pvc", "-n", WORK]),
        ("leases.txt", &["get", "leases", "-A", "-o", "wide"]),
    ];
    for (file, arguments) in questions {
        write(&folder, file, kubectl(arguments).await)?;
    }
    for namespace in [SYSTEM, WORK] {
        let pods = kubectl(&["get", "pods", "-n", namespace, "-o", "name"]).await.unwrap_or_default();
        for pod in pods.lines() {
            for (suffix, previous) in [("log", "--previous=false"), ("previous.log", "--previous=true")] {
                let log =
                    kubectl(&["logs", "-n", namespace, pod, "--all-containers", "--prefix", TAIL, previous]).await;
                if !(previous.ends_with("true") && log.is_err()) {
                    write(&folder, &format!("{}.{suffix}", pod.replace('/', "-")), log)?;
                }
            }
        }
    }
    // The controller has the cluster's certificates, so the command line works in its container.
    let controller = format!("deploy/{CLUSTER}-csi-controller");
    for verb in ["status", "explain"] {
        let answer = kubectl(&["exec", "-n", SYSTEM, &controller, "-c", "driver", "--", "holdfast", verb]).await;
        write(&folder, &format!("{verb}.txt"), answer)?;
    }
    for node in environment.workers().await.unwrap_or_default() {
        let host = "losetup --list; findmnt; journalctl --unit=kubelet --lines=1000 --no-pager; dmesg | tail -n 300";
        write(&folder, &format!("{node}.txt"), on_node(&node, host).await)?;
    }
    let cpu = run("sh", &["-c", "uptime; free -m; df -h /"], SHORT).await;
    write(&folder, "machine.txt", cpu)?;
    Ok(folder)
}

fn write(folder: &Path, file: &str, content: Result<String>) -> Result<()> {
    let content = content.unwrap_or_else(|error| format!("{error:#}"));
    Ok(fs::write(folder.join(file), content)?)
}
