//! Members inherit: version, edition, license and lints come from the workspace, and so does every dependency, so
//! that one file says what the project is built from.
//!
//! The feature [`PLANTED`] compiles known bugs in for tests to find. Nothing turns it on but a test, the simulator, or
//! the feature of the same name one layer up, so that a program built without asking for it cannot contain one.

use std::fs;

use anyhow::{Context, Result};
use toml::{Table, Value};

use crate::workspace::Workspace;

/// Keys of `[package]` that every member takes from the workspace.
const INHERITED: [&str; 5] = ["version", "edition", "rust-version", "license", "publish"];
/// What a member may add to a dependency of the workspace.
const DEPENDENCY_KEYS: [&str; 4] = ["workspace", "features", "default-features", "optional"];

/// The feature that compiles planted bugs in.
pub const PLANTED: &str = "planted";
/// The one crate that exists for tests.
const SIMULATOR: &str = "holdfast-sim";

pub fn check(workspace: &Workspace) -> Result<Vec<String>> {
    let mut violations = Vec::new();
    for (name, path) in &workspace.manifests {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let manifest = text.parse::<Table>().with_context(|| path.display().to_string())?;
        violations.extend(check_member(&manifest).into_iter().map(|violation| format!("{name}: {violation}")));
    }
    Ok(violations)
}

fn check_member(manifest: &Table) -> Vec<String> {
    let mut violations = Vec::new();
    let package = manifest.get("package").and_then(Value::as_table);
    for key in INHERITED {
        if !package.is_some_and(|package| is_inherited(package.get(key))) {
            violations.push(format!("package.{key} is not taken from the workspace"));
        }
    }
    let description = package.and_then(|package| package.get("description")).and_then(Value::as_str);
    if description.is_none_or(str::is_empty) {
        violations.push("package.description is missing".to_owned());
    }
    if !is_inherited(manifest.get("lints")) {
        violations.push("lints are not taken from the workspace".to_owned());
    }
    check_planted(manifest, &mut violations);
    check_dependencies(manifest, &mut violations);
    for target in manifest.get("target").and_then(Value::as_table).into_iter().flat_map(Table::values) {
        if let Some(target) = target.as_table() {
            check_dependencies(target, &mut violations);
        }
    }
    violations
}

fn check_dependencies(of: &Table, violations: &mut Vec<String>) {
    for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
        for (name, dependency) in of.get(section).and_then(Value::as_table).into_iter().flatten() {
            if !is_inherited(Some(dependency)) {
                violations.push(format!("{section}.{name} is not taken from the workspace"));
            }
            for key in dependency.as_table().into_iter().flat_map(Table::keys) {
                if !DEPENDENCY_KEYS.contains(&key.as_str()) {
                    violations.push(format!("{section}.{name}.{key} belongs into the workspace manifest"));
                }
            }
        }
    }
}

fn check_planted(manifest: &Table, violations: &mut Vec<String>) {
    let name = manifest.get("package").and_then(|package| package.get("name")).and_then(Value::as_str);
    if name == Some(SIMULATOR) {
        return;
    }
    let is_planted = |feature: &Value| feature.as_str().is_some_and(|f| f.rsplit('/').next() == Some(PLANTED));
    let lists_planted =
        |features: Option<&Value>| features.and_then(Value::as_array).is_some_and(|list| list.iter().any(is_planted));
    for (feature, list) in manifest.get("features").and_then(Value::as_table).into_iter().flatten() {
        if feature != PLANTED && lists_planted(Some(list)) {
            violations.push(format!("the feature {feature} turns on {PLANTED}"));
        }
    }
    for section in ["dependencies", "build-dependencies"] {
        for (dependency, value) in manifest.get(section).and_then(Value::as_table).into_iter().flatten() {
            if lists_planted(value.get("features")) {
                violations.push(format!("{section}.{dependency} turns on {PLANTED}"));
            }
        }
    }
}

fn is_inherited(value: Option<&Value>) -> bool {
    value.and_then(|value| value.get("workspace")).and_then(Value::as_bool) == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        [package]
        name = "x"
        description = "An example"
        version.workspace = true
        edition.workspace = true
        rust-version.workspace = true
        license.workspace = true
        publish.workspace = true
        [lints]
        workspace = true
        [dependencies]
        bytes.workspace = true
        tokio = { workspace = true, features = ["rt"] }
    "#;

    fn violations(text: &str) -> Vec<String> {
        check_member(&text.parse().unwrap())
    }

    #[test]
    fn a_member_that_inherits_everything_passes() {
        assert_eq!(violations(GOOD), Vec::<String>::new());
    }

    #[test]
    fn a_version_in_a_member_is_a_violation() {
        let expected = ["dev-dependencies.regex is not taken from the workspace"];
        assert_eq!(violations(&format!("{GOOD}\n[dev-dependencies]\nregex = \"1\"")), expected);
        let expected = [
            "dependencies.regex is not taken from the workspace",
            "dependencies.regex.git belongs into the workspace manifest",
        ];
        assert_eq!(
            violations(&format!("{GOOD}\n[target.'cfg(unix)'.dependencies]\nregex = {{ git = \"x\" }}")),
            expected
        );
    }

    #[test]
    fn what_is_not_inherited_is_named() {
        assert_eq!(
            violations(&GOOD.replace("license.workspace = true", "license = \"MIT\"")),
            ["package.license is not taken from the workspace"]
        );
        assert_eq!(
            violations(&GOOD.replace("[lints]\n        workspace = true", "")),
            ["lints are not taken from the workspace"]
        );
        assert_eq!(violations(&GOOD.replace("description = \"An example\"", "")), ["package.description is missing"]);
    }

    #[test]
    fn only_tests_and_the_simulator_plant_bugs() {
        let asks = "holdfast-store = { workspace = true, features = [\"planted\"] }\n";
        let normal = GOOD.replace("bytes.workspace = true\n", asks);
        assert_eq!(violations(&normal), ["dependencies.holdfast-store turns on planted"]);
        assert_eq!(violations(&normal.replace("name = \"x\"", "name = \"holdfast-sim\"")), Vec::<String>::new());
        assert_eq!(violations(&format!("{GOOD}\n[dev-dependencies]\n{asks}")), Vec::<String>::new());
        let forwarded = format!("{GOOD}\n[features]\nplanted = [\"holdfast-store/planted\"]\n");
        assert_eq!(violations(&forwarded), Vec::<String>::new());
        let by_default = format!("{forwarded}default = [\"planted\"]\n");
        assert_eq!(violations(&by_default), ["the feature default turns on planted"]);
    }
}
