//! The workspace as `cargo metadata` tells it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::run;

pub struct Workspace {
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    pub crates: Crates,
    /// Manifests of the members, by name.
    pub manifests: BTreeMap<String, PathBuf>,
    /// Features of the members, by name.
    pub features: BTreeMap<String, BTreeSet<String>>,
}

/// Who depends on whom. A name stands for every version of it.
#[derive(Default)]
pub struct Crates {
    pub members: BTreeSet<String>,
    /// Normal dependencies, of members and of their dependencies: what ends up in the program.
    pub normal: BTreeMap<String, BTreeSet<String>>,
    /// Build dependencies of members.
    pub build: BTreeMap<String, BTreeSet<String>>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: BTreeSet<String>,
    resolve: Resolve,
    workspace_root: PathBuf,
    target_directory: PathBuf,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    manifest_path: PathBuf,
    features: BTreeMap<String, Vec<String>>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Deserialize)]
struct DependencyKind {
    /// Absent for a normal dependency, else `build` or `dev`.
    kind: Option<String>,
}

impl Workspace {
    pub fn load() -> Result<Workspace> {
        let output = Command::new(run::cargo())
            .args(["metadata", "--format-version", "1", "--locked"])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("cannot start cargo metadata")?;
        ensure!(output.status.success(), "cargo metadata: {}", output.status);
        let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
        Ok(Workspace::from_metadata(metadata))
    }

    fn from_metadata(metadata: Metadata) -> Workspace {
        let names: BTreeMap<&str, &str> = metadata.packages.iter().map(|p| (p.id.as_str(), p.name.as_str())).collect();
        let mut crates = Crates::default();
        for node in &metadata.resolve.nodes {
            let name = names[node.id.as_str()].to_owned();
            let of_kind = |kind: Option<&str>| -> BTreeSet<String> {
                let is_of_kind = |d: &&Dependency| d.dep_kinds.iter().any(|k| k.kind.as_deref() == kind);
                node.deps.iter().filter(is_of_kind).map(|d| names[d.pkg.as_str()].to_owned()).collect()
            };
            if metadata.workspace_members.contains(&node.id) {
                crates.members.insert(name.clone());
                crates.build.insert(name.clone(), of_kind(Some("build")));
            }
            crates.normal.entry(name).or_default().extend(of_kind(None));
        }
        let members: Vec<&Package> =
            metadata.packages.iter().filter(|package| metadata.workspace_members.contains(&package.id)).collect();
        Workspace {
            root: metadata.workspace_root,
            target: metadata.target_directory,
            crates,
            manifests: members.iter().map(|package| (package.name.clone(), package.manifest_path.clone())).collect(),
            features: members.iter().map(|p| (p.name.clone(), p.features.keys().cloned().collect())).collect(),
        }
    }
}

impl Crates {
    /// The shortest chain of normal dependencies from one crate to another, both included.
    pub fn chain(&self, from: &str, to: &str) -> Option<Vec<String>> {
        let mut queue = std::collections::VecDeque::from([vec![from.to_owned()]]);
        let mut seen = BTreeSet::from([from.to_owned()]);
        while let Some(chain) = queue.pop_front() {
            let last = chain.last().expect("a chain starts with one crate");
            if last == to {
                return Some(chain);
            }
            for next in self.normal.get(last).into_iter().flatten() {
                if seen.insert(next.clone()) {
                    let mut longer = chain.clone();
                    longer.push(next.clone());
                    queue.push_back(longer);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METADATA: &str = r#"{
        "packages": [
            {"id": "a 1", "name": "a", "manifest_path": "/w/a/Cargo.toml", "features": {"f": []}},
            {"id": "b 1", "name": "b", "manifest_path": "/r/b/Cargo.toml", "features": {}},
            {"id": "c 1", "name": "c", "manifest_path": "/r/c/Cargo.toml", "features": {}},
            {"id": "d 1", "name": "d", "manifest_path": "/r/d/Cargo.toml", "features": {}}
        ],
        "workspace_members": ["a 1"],
        "resolve": {"nodes": [
            {"id": "a 1", "deps": [
                {"pkg": "b 1", "dep_kinds": [{"kind": null}, {"kind": "dev"}]},
                {"pkg": "d 1", "dep_kinds": [{"kind": "dev"}]},
                {"pkg": "c 1", "dep_kinds": [{"kind": "build"}]}
            ]},
            {"id": "b 1", "deps": [{"pkg": "c 1", "dep_kinds": [{"kind": null}]}]},
            {"id": "c 1", "deps": []},
            {"id": "d 1", "deps": []}
        ]},
        "workspace_root": "/w",
        "target_directory": "/w/target"
    }"#;

    #[test]
    fn dependencies_are_told_apart_by_kind() {
        let workspace = Workspace::from_metadata(serde_json::from_str(METADATA).unwrap());
        let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
        assert_eq!(workspace.crates.members, set(&["a"]));
        assert_eq!(workspace.crates.normal["a"], set(&["b"]));
        assert_eq!(workspace.crates.build["a"], set(&["c"]));
        assert_eq!(workspace.manifests["a"], PathBuf::from("/w/a/Cargo.toml"));
        assert_eq!(workspace.manifests.len(), 1);
        assert_eq!(workspace.features, BTreeMap::from([("a".to_owned(), set(&["f"]))]));
    }

    #[test]
    fn a_chain_follows_normal_dependencies_only() {
        let workspace = Workspace::from_metadata(serde_json::from_str(METADATA).unwrap());
        assert_eq!(workspace.crates.chain("a", "c"), Some(vec!["a".into(), "b".into(), "c".into()]));
        assert_eq!(workspace.crates.chain("a", "d"), None);
    }
}
