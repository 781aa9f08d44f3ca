//! What the chart installs is what the types say, and every column that kubectl prints shows something.

#![allow(clippy::unwrap_used, reason = "a test's helpers are tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use holdfast_crds::documents;
use jsonpath_rust::JsonPath as _;
use serde_json::{Value, json};

#[test]
fn the_charts_definitions_are_those_of_the_types() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/holdfast/templates/crds");
    let mut files: BTreeMap<String, String> = fs::read_dir(&dir)
        .expect("the chart has a folder of definitions")
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read_to_string(path).unwrap()))
        .collect();
    for document in documents() {
        let found = files.remove(&document.file).unwrap_or_default();
        assert!(
            found == document.text(),
            "{} is not up to date: run `cargo run -p holdfast-crds -- generate charts/holdfast/templates/crds`",
            document.file
        );
    }
    assert_eq!(files.keys().collect::<Vec<_>>(), Vec::<&String>::new(), "files that no type makes");
}

#[test]
fn every_printer_column_shows_something() {
    let samples = [
        ("StorageCluster", include_str!("samples/storagecluster.yaml")),
        ("Volume", include_str!("samples/volume.yaml")),
        ("StorageNode", include_str!("samples/storagenode.yaml")),
        ("StorageDisk", include_str!("samples/storagedisk.yaml")),
    ]
    .map(|(kind, yaml)| (kind, sample(kind, yaml)));
    let samples = BTreeMap::from(samples);
    for document in documents() {
        let kind = &document.definition.spec.names.kind;
        for version in &document.definition.spec.versions {
            let columns = version.additional_printer_columns.iter().flatten();
            let mut names: Vec<&str> = Vec::new();
            for column in columns {
                let found = samples[kind.as_str()].query(&format!("${}", column.json_path)).unwrap();
                let shown = found.iter().any(|value| !matches!(value, Value::Null) && **value != json!(""));
                assert!(shown, "{kind}: the column {} shows nothing: {}", column.name, column.json_path);
                names.push(&column.name);
            }
            assert!(names.contains(&"Age"), "{kind} has no column that tells its age");
        }
    }
}

/// Through the type and back, so that a sample cannot hold a field that the type does not have.
fn sample(kind: &str, yaml: &str) -> Value {
    let written: Value = serde_saphyr::from_str(yaml).unwrap();
    let typed = match kind {
        "StorageCluster" => through::<holdfast_crds::StorageCluster>(&written),
        "Volume" => through::<holdfast_crds::Volume>(&written),
        "StorageNode" => through::<holdfast_crds::StorageNode>(&written),
        _ => through::<holdfast_crds::StorageDisk>(&written),
    };
    for (field, value) in written["status"].as_object().unwrap() {
        assert_eq!(&typed["status"][field], value, "{kind}: status.{field}");
    }
    typed
}

fn through<T: serde::de::DeserializeOwned + serde::Serialize>(value: &Value) -> Value {
    serde_json::to_value(serde_json::from_value::<T>(value.clone()).unwrap()).unwrap()
}
