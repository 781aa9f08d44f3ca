//! Who may know whom: the layering of `ARCHITECTURE.md` as a table, held against `cargo metadata`.
//!
//! Dev-dependencies are free: a test may need a neighbour that the crate itself must not name.

use std::collections::BTreeSet;

use crate::workspace::Crates;

/// One crate of the workspace. A row names only crates of earlier rows, so calls go down.
struct Layer {
    name: &'static str,
    /// Crates of the workspace it may depend on.
    knows: &'static [&'static str],
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Pure, and these are all the crates from outside it may name.
    Closed(&'static [&'static str]),
    /// Decides without I/O, clock or randomness: must not reach any of [`IMPURE`], at any depth.
    Pure,
    /// Touches the world.
    Rim,
}

const LAYERS: [Layer; 28] = [
    Layer { name: "holdfast-id", knows: &[], kind: Kind::Closed(&["serde", "thiserror"]) },
    Layer { name: "holdfast-planted", knows: &[], kind: Kind::Closed(&[]) },
    Layer { name: "holdfast-block", knows: &[], kind: Kind::Closed(&["bytes", "thiserror", "twox-hash"]) },
    Layer {
        name: "holdfast-consensus",
        knows: &["holdfast-id", "holdfast-planted"],
        kind: Kind::Closed(&["thiserror"]),
    },
    Layer { name: "holdfast-store", knows: &["holdfast-block", "holdfast-id", "holdfast-planted"], kind: Kind::Rim },
    Layer { name: "holdfast-metadata", knows: &["holdfast-id"], kind: Kind::Pure },
    Layer { name: "holdfast-fuse", knows: &["holdfast-block"], kind: Kind::Pure },
    Layer { name: "holdfast-nbd", knows: &["holdfast-block"], kind: Kind::Pure },
    Layer {
        name: "holdfast-protocol",
        knows: &["holdfast-block", "holdfast-consensus", "holdfast-id"],
        kind: Kind::Pure,
    },
    Layer {
        name: "holdfast-volume",
        knows: &["holdfast-block", "holdfast-id", "holdfast-planted", "holdfast-protocol"],
        kind: Kind::Pure,
    },
    Layer { name: "holdfast-host", knows: &[], kind: Kind::Rim },
    Layer { name: "holdfast-transport", knows: &["holdfast-id"], kind: Kind::Rim },
    Layer {
        name: "holdfast-client",
        knows: &["holdfast-block", "holdfast-consensus", "holdfast-id", "holdfast-protocol"],
        kind: Kind::Pure,
    },
    Layer {
        name: "holdfast-replica",
        knows: &["holdfast-block", "holdfast-consensus", "holdfast-id", "holdfast-planted", "holdfast-store"],
        kind: Kind::Pure,
    },
    Layer {
        name: "holdfast-shard",
        knows: &[
            "holdfast-block",
            "holdfast-consensus",
            "holdfast-id",
            "holdfast-metadata",
            "holdfast-planted",
            "holdfast-protocol",
            "holdfast-replica",
            "holdfast-store",
            "holdfast-volume",
        ],
        kind: Kind::Pure,
    },
    Layer {
        name: "holdfast-sim",
        knows: &[
            "holdfast-block",
            "holdfast-client",
            "holdfast-consensus",
            "holdfast-id",
            "holdfast-metadata",
            "holdfast-planted",
            "holdfast-protocol",
            "holdfast-replica",
            "holdfast-shard",
            "holdfast-store",
            "holdfast-volume",
        ],
        kind: Kind::Rim,
    },
    Layer { name: "holdfast-http", knows: &[], kind: Kind::Rim },
    Layer { name: "holdfast-api", knows: &["holdfast-transport"], kind: Kind::Rim },
    Layer { name: "holdfast-cluster-client", knows: &["holdfast-api", "holdfast-transport"], kind: Kind::Rim },
    Layer {
        name: "holdfast-node",
        knows: &[
            "holdfast-api",
            "holdfast-block",
            "holdfast-consensus",
            "holdfast-http",
            "holdfast-id",
            "holdfast-metadata",
            "holdfast-protocol",
            "holdfast-replica",
            "holdfast-shard",
            "holdfast-store",
            "holdfast-transport",
        ],
        kind: Kind::Rim,
    },
    Layer {
        name: "holdfast-agent",
        knows: &[
            "holdfast-block",
            "holdfast-client",
            "holdfast-consensus",
            "holdfast-fuse",
            "holdfast-id",
            "holdfast-nbd",
            "holdfast-protocol",
            "holdfast-transport",
        ],
        kind: Kind::Rim,
    },
    Layer {
        name: "holdfast-cli",
        knows: &[
            "holdfast-agent",
            "holdfast-api",
            "holdfast-cluster-client",
            "holdfast-host",
            "holdfast-http",
            "holdfast-id",
            "holdfast-node",
            "holdfast-planted",
            "holdfast-store",
            "holdfast-transport",
        ],
        kind: Kind::Rim,
    },
    Layer { name: "holdfast-crds", knows: &[], kind: Kind::Rim },
    Layer {
        name: "holdfast-operator",
        knows: &[
            "holdfast-api",
            "holdfast-cluster-client",
            "holdfast-crds",
            "holdfast-http",
            "holdfast-id",
            "holdfast-transport",
        ],
        kind: Kind::Rim,
    },
    Layer {
        name: "holdfast-csi",
        knows: &[
            "holdfast-agent",
            "holdfast-api",
            "holdfast-cluster-client",
            "holdfast-crds",
            "holdfast-host",
            "holdfast-id",
        ],
        kind: Kind::Rim,
    },
    Layer { name: "holdfast-e2e", knows: &["holdfast-crds"], kind: Kind::Rim },
    Layer { name: "holdfast-bench", knows: &[], kind: Kind::Rim },
    Layer { name: "xtask", knows: &[], kind: Kind::Rim },
];

/// Sockets, runtimes, randomness and TLS, in the crates by which they could come in.
const IMPURE: [&str; 9] = ["getrandom", "hyper", "mio", "rand", "rustls", "socket2", "tokio", "tonic", "rcgen"];

/// The crates whose sources must not name the world either.
pub fn pure_crates() -> impl Iterator<Item = &'static str> {
    LAYERS.iter().filter(|layer| layer.kind != Kind::Rim).map(|layer| layer.name)
}

pub fn check(crates: &Crates) -> Vec<String> {
    check_against(&LAYERS, crates)
}

fn check_against(layers: &[Layer], crates: &Crates) -> Vec<String> {
    let mut violations = Vec::new();
    for member in &crates.members {
        if !layers.iter().any(|layer| layer.name == member) {
            violations.push(format!("{member} has no row in the table of layers (xtask/src/checks/layers.rs)"));
        }
    }
    for layer in layers {
        if crates.members.contains(layer.name) {
            check_layer(layer, crates, &mut violations);
        } else {
            violations.push(format!("the table of layers names {}, which is no crate of the workspace", layer.name));
        }
    }
    violations
}

fn check_layer(layer: &Layer, crates: &Crates, violations: &mut Vec<String>) {
    let name = layer.name;
    let direct: BTreeSet<&String> =
        [&crates.normal, &crates.build].into_iter().filter_map(|m| m.get(name)).flatten().collect();
    for dependency in direct {
        let is_member = crates.members.contains(dependency);
        if is_member && !layer.knows.contains(&dependency.as_str()) {
            violations.push(format!("{name} must not know {dependency}: see the table of layers"));
        }
        if let Kind::Closed(outside) = layer.kind
            && !is_member
            && !outside.contains(&dependency.as_str())
        {
            violations.push(format!("{name} must not depend on {dependency}: its list of outside crates is closed"));
        }
    }
    if layer.kind == Kind::Rim {
        return;
    }
    for impure in IMPURE {
        if let Some(chain) = crates.chain(name, impure) {
            violations.push(format!("{name} is pure, but reaches {impure}: {}", chain.join(" -> ")));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn crates(members: &[&str], normal: &[(&str, &[&str])]) -> Crates {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
        Crates {
            members: owned(members),
            normal: normal.iter().map(|(name, to)| ((*name).to_owned(), owned(to))).collect(),
            build: BTreeMap::new(),
        }
    }

    const LOW: Layer = Layer { name: "low", knows: &[], kind: Kind::Closed(&["bytes"]) };
    const HIGH: Layer = Layer { name: "high", knows: &["low"], kind: Kind::Pure };

    #[test]
    fn rows_name_only_earlier_rows() {
        let mut earlier = BTreeSet::new();
        for layer in &LAYERS {
            for known in layer.knows {
                assert!(earlier.contains(known), "{} names {known}", layer.name);
            }
            assert!(earlier.insert(layer.name), "{} has two rows", layer.name);
        }
    }

    #[test]
    fn a_downward_arrow_is_allowed() {
        let found = crates(&["low", "high"], &[("high", &["low", "bytes"]), ("low", &["bytes"])]);
        assert_eq!(check_against(&[LOW, HIGH], &found), Vec::<String>::new());
    }

    #[test]
    fn an_upward_arrow_is_a_violation() {
        let found = crates(&["low", "high"], &[("low", &["high"])]);
        assert_eq!(check_against(&[LOW, HIGH], &found), ["low must not know high: see the table of layers"]);
    }

    #[test]
    fn an_upward_arrow_from_a_build_script_is_a_violation() {
        let mut found = crates(&["low", "high"], &[]);
        found.build.insert("low".into(), BTreeSet::from(["high".into()]));
        assert_eq!(check_against(&[LOW, HIGH], &found), ["low must not know high: see the table of layers"]);
    }

    #[test]
    fn a_closed_list_is_closed() {
        let found = crates(&["low", "high"], &[("low", &["regex"])]);
        let expected = ["low must not depend on regex: its list of outside crates is closed"];
        assert_eq!(check_against(&[LOW, HIGH], &found), expected);
    }

    #[test]
    fn a_pure_crate_reaches_no_runtime_at_any_depth() {
        let found = crates(&["low", "high"], &[("high", &["http"]), ("http", &["tokio"])]);
        let expected = ["high is pure, but reaches tokio: high -> http -> tokio"];
        assert_eq!(check_against(&[LOW, HIGH], &found), expected);
    }

    #[test]
    fn crates_and_rows_match_one_to_one() {
        let found = crates(&["low", "new"], &[]);
        let expected = [
            "new has no row in the table of layers (xtask/src/checks/layers.rs)",
            "the table of layers names high, which is no crate of the workspace",
        ];
        assert_eq!(check_against(&[LOW, HIGH], &found), expected);
    }
}
