//! How a storage cluster comes to be, once: who founds it, who joins it, and when it is found instead of founded.
//!
//! Pure: what is recorded and what the members say in, what to do next out. The record is a ConfigMap; it is written
//! before any member is told, and what a member answered is written before anything follows from it. So a crash at any
//! line is followed by the same step again, with the same identifiers.
//!
//! What holds:
//! 1. An identifier of a cluster is minted only while *every* expected member answers with an empty disk.
//! 2. A founding member is told to found once its answer is recorded never again: a disk that comes back empty later has
//!    forgotten what it voted for, and joins.
//! 3. A disk that holds anything that is not of this cluster is never touched.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Members of the metadata plane at its founding: as many as tolerate the loss of one or two, never an even number.
fn founders(members: usize) -> usize {
    match members {
        0..=2 => 1,
        3..=4 => 3,
        _ => 5,
    }
}

/// What is recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub cluster_id: String,
    /// Empty where the cluster was found, not founded.
    #[serde(default)]
    pub founders: Vec<Founder>,
    /// Disks of the founders that have answered that they are founded, by name.
    #[serde(default)]
    pub founded: BTreeMap<String, String>,
}

/// One founding member: every field is part of the request that all of them get alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Founder {
    pub name: String,
    pub node_id: String,
    pub replica_id: String,
    pub zone: String,
}

impl Record {
    /// Everybody who was to found has done it.
    pub fn is_founded(&self) -> bool {
        self.founders.iter().all(|founder| self.founded.contains_key(&founder.name))
    }
}

/// What a member says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    Nothing {
        why: String,
    },
    Empty {
        node_id: String,
    },
    /// Its disk is formatted for this cluster.
    Formatted {
        node_id: String,
        cluster_id: String,
        disk_id: String,
    },
    /// Its disk cannot be used.
    Unusable {
        why: String,
    },
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Record a new cluster with these founders, in this order.
    Mint { founders: Vec<(String, String)> },
    /// Record the cluster that the members are of.
    Adopt { cluster_id: String },
    /// Record that these founders are founded, with their disks.
    RecordFounded { disks: BTreeMap<String, String> },
    /// Have these found the recorded cluster.
    Found { names: Vec<String> },
    /// Have these join the recorded cluster; the others are members.
    Join { names: Vec<String> },
    /// Nothing: every member that answers belongs to the cluster.
    Settled { silent: Vec<String> },
    /// Nothing, until those answer.
    Wait { silent: Vec<String>, why: String },
    /// Nothing, until a person has helped.
    Stuck { reason: &'static str, message: String },
}

/// `expected` in the order in which they found; `said` of each of them.
pub fn next(expected: &[String], said: &BTreeMap<String, Said>, record: Option<&Record>) -> Step {
    if let Some(stuck) = stuck(said, record) {
        return stuck;
    }
    let silent: Vec<String> =
        expected.iter().filter(|name| matches!(said.get(*name), None | Some(Said::Nothing { .. }))).cloned().collect();
    let why = silent.first().map(|name| match said.get(name) {
        Some(Said::Nothing { why }) => format!("{name}: {why}"),
        _ => format!("{name} was not asked yet"),
    });
    let Some(record) = record else {
        return unrecorded(expected, said, silent, why);
    };
    let disks: BTreeMap<String, String> = record
        .founders
        .iter()
        .filter(|founder| !record.founded.contains_key(&founder.name))
        .filter_map(|founder| match said.get(&founder.name) {
            Some(Said::Formatted { disk_id, .. }) => Some((founder.name.clone(), disk_id.clone())),
            _ => None,
        })
        .collect();
    if !disks.is_empty() {
        return Step::RecordFounded { disks };
    }
    let empty = |name: &String| matches!(said.get(name), Some(Said::Empty { .. }));
    let to_found: Vec<String> = record
        .founders
        .iter()
        .filter(|founder| !record.founded.contains_key(&founder.name))
        .map(|founder| founder.name.clone())
        .collect();
    if !to_found.is_empty() {
        let names: Vec<String> = to_found.iter().filter(|name| empty(name)).cloned().collect();
        if names.is_empty() {
            let why = why.unwrap_or_else(|| "its founding members".to_owned());
            return Step::Wait { silent, why };
        }
        return Step::Found { names };
    }
    let names: Vec<String> = expected.iter().filter(|name| empty(name)).cloned().collect();
    if names.is_empty() { Step::Settled { silent } } else { Step::Join { names } }
}

fn unrecorded(expected: &[String], said: &BTreeMap<String, Said>, silent: Vec<String>, why: Option<String>) -> Step {
    let found = said.values().find_map(|said| match said {
        Said::Formatted { cluster_id, .. } => Some(cluster_id.clone()),
        _ => None,
    });
    if let Some(cluster_id) = found {
        return Step::Adopt { cluster_id };
    }
    if let Some(why) = why {
        return Step::Wait { silent, why };
    }
    let empty = expected.iter().filter_map(|name| match said.get(name) {
        Some(Said::Empty { node_id }) => Some((name.clone(), node_id.clone())),
        _ => None,
    });
    Step::Mint { founders: empty.take(founders(expected.len())).collect() }
}

fn stuck(said: &BTreeMap<String, Said>, record: Option<&Record>) -> Option<Step> {
    let mut clusters: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut ids: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, said) in said {
        let node_id = match said {
            Said::Formatted { node_id, cluster_id, .. } => {
                clusters.entry(cluster_id).or_default().push(name);
                node_id
            }
            Said::Empty { node_id } => node_id,
            Said::Nothing { .. } | Said::Unusable { .. } => continue,
        };
        if let Some(other) = ids.insert(node_id, name) {
            let message = format!(
                "{other} and {name} answer with the same identity {node_id}: look for a storage node \
                                   outside this cluster that was given its certificate"
            );
            return Some(Step::Stuck { reason: "SameIdentity", message });
        }
    }
    let expected = record.map(|record| record.cluster_id.as_str());
    let foreign: Vec<String> = clusters
        .iter()
        .filter(|(cluster, _)| expected.is_some_and(|expected| expected != **cluster))
        .map(|(cluster, names)| format!("{} of {cluster}", names.join(", ")))
        .collect();
    if !foreign.is_empty() {
        let message = format!(
            "disks of another storage cluster: {}; this one is {}. Give those members empty disks, or restore the \
             ConfigMap of the founding",
            foreign.join("; "),
            expected.unwrap_or_default()
        );
        return Some(Step::Stuck { reason: "ForeignCluster", message });
    }
    if clusters.len() > 1 {
        let list: Vec<String> =
            clusters.iter().map(|(cluster, names)| format!("{} of {cluster}", names.join(", "))).collect();
        let message = format!(
            "members of different storage clusters: {}. Give those of the wrong one empty disks",
            list.join("; ")
        );
        return Some(Step::Stuck { reason: "DifferentClusters", message });
    }
    // One bad disk does not stop a cluster that runs; it is told of as that member's state.
    if record.is_none() {
        let bad: Vec<String> = said
            .iter()
            .filter_map(|(name, said)| match said {
                Said::Unusable { why } => Some(format!("{name}: {why}")),
                _ => None,
            })
            .collect();
        if !bad.is_empty() && clusters.is_empty() {
            return Some(Step::Stuck { reason: "DiskUnusable", message: bad.join("; ") });
        }
    }
    None
}

/// Names that are in the record and not expected any more: they stay founders, and are asked as long as they are there.
pub fn asked(expected: &[String], record: Option<&Record>) -> Vec<String> {
    let mut names: Vec<String> = expected.to_vec();
    let known: BTreeSet<&String> = expected.iter().collect();
    let missing = record.iter().flat_map(|record| &record.founders).filter(|f| !known.contains(&f.name));
    names.extend(missing.map(|founder| founder.name.clone()));
    names
}

#[cfg(test)]
mod tests;
