//! A disk that does not keep what was written to it: reads are right all the same, the node says what it found, and
//! takes what it lost from the others.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::{Cluster, holdfast, wait_for};
use crate::nbd::{self, WRITE};
use crate::workload::read_all;

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;
const SLOT: usize = 64 << 10;
/// More than what makes a checkpoint, and not twice that: the first part is in its slots, the last only in the log.
const WRITTEN: usize = 46 * MIB;
/// Of one request; less than a slot, so that all of it is in the log first.
const CHUNK: usize = 32 << 10;

fn content(block: usize) -> Vec<u8> {
    let mut state = block as u64 + 1;
    let mut words = Vec::with_capacity(BLOCK);
    for _ in 0..BLOCK / 8 {
        words.extend(crate::model::random(&mut state).to_le_bytes());
    }
    words
}

fn contents(blocks: std::ops::Range<usize>) -> Vec<u8> {
    blocks.flat_map(content).collect()
}

fn write_all(socket: &Path) {
    let (mut sender, mut receiver) = nbd::connect(socket).expect("the device is there");
    for offset in (0..WRITTEN).step_by(CHUNK) {
        let data = contents(offset / BLOCK..(offset + CHUNK) / BLOCK);
        sender.send(WRITE, 0, offset as u64, offset as u64, CHUNK as u32, &data).expect("the device takes it");
        assert_eq!(receiver.reply().expect("the device answers").error, 0);
    }
}

#[track_caller]
fn check_all(socket: &Path) {
    let read = read_all(socket, WRITTEN / BLOCK);
    for (block, data) in read.chunks(BLOCK).enumerate() {
        assert!(data == content(block), "block {block} reads wrong");
    }
}

fn disk(cluster: &Cluster, node: &str) -> PathBuf {
    cluster.dir().join(node).join("disk")
}

/// What `disk describe` says after a word, as a range.
fn region(description: &str, word: &str) -> (u64, u64) {
    let line = description.lines().find(|line| line.starts_with(word)).expect("the region is described");
    let range = line.split_once('[').and_then(|(_, rest)| rest.split_once(')')).expect("a range").0;
    let (start, end) = range.split_once(", ").expect("two ends");
    (start.parse().expect("a number"), end.parse().expect("a number"))
}

fn describe(disk: &Path) -> String {
    let output = holdfast().args(["disk", "describe"]).arg(disk).output().expect("holdfast runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// `chunks_start` and `chunks_end` of the superblock: `disk describe` leaves a disk alone that a node has open.
fn chunks(file: &File) -> (u64, u64) {
    let mut fields = [0; 16];
    file.read_exact_at(&mut fields, 136).expect("the superblock");
    let number = |at: usize| u64::from_le_bytes(fields[at..at + 8].try_into().expect("eight bytes"));
    (number(0), number(8))
}

/// Where the disk has the slot that begins with a block of this content.
fn find_slot(disk: &Path, block: usize) -> Option<u64> {
    let file = File::open(disk).expect("the disk is a file");
    let (start, end) = chunks(&file);
    let wanted = content(block);
    let mut data = vec![0; BLOCK];
    (start..end.min(file.metadata().expect("a size").len()))
        .step_by(BLOCK)
        .find(|offset| file.read_exact_at(&mut data, *offset).is_ok() && data == wanted)
}

fn garbage(disk: &Path, offset: u64) {
    let mut state = 99;
    let bytes: Vec<u8> = (0..SLOT / 8).flat_map(|_| crate::model::random(&mut state).to_le_bytes()).collect();
    let file = OpenOptions::new().write(true).open(disk).expect("the disk is a file");
    file.write_all_at(&bytes, offset).expect("the file takes it");
    file.sync_all().expect("and keeps it");
}

fn health(cluster: &Cluster, node: &str) -> Value {
    let nodes = cluster.json(&["node", "list", "--json"]);
    let nodes = nodes.as_array().expect("nodes");
    let found = nodes.iter().find(|found| found["name"] == node).expect("a node of this cluster");
    found["disks"][0]["health"].clone()
}

fn dev(cluster: &Cluster, verb: &str, node: &str) {
    let output = holdfast().args(["dev", "node", verb, node, "--dir"]).arg(cluster.dir()).output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn garbage_in_the_data_and_in_the_log_is_repaired_from_the_other_copies() {
    let cluster = Cluster::start(&[]);
    cluster.must(&["volume", "create", "v", "--size", "64Mi"]);
    let socket = cluster.attach("v", "local", &[]);
    write_all(&socket);

    // In the middle of what the leader holds, while it runs: reads of it go there.
    let leader = cluster.leader("v");
    let file = disk(&cluster, &leader);
    let slot = 16 * MIB / SLOT;
    let offset = wait_for("the checkpoint", || find_slot(&file, slot * SLOT / BLOCK));
    garbage(&file, offset);
    check_all(&socket);
    let found =
        wait_for("the repair is told", || Some(health(&cluster, &leader)).filter(|h| h["repairedBlocks"] == 16));
    assert!(found["corruptBlocks"].as_u64() >= Some(16), "{found}");
    let volume = cluster.volume("v");
    let replica = volume["replicas"].as_array().expect("copies").iter().find(|r| r["node"] == leader.as_str());
    let repair = &replica.expect("the leader's copy")["repair"];
    assert_eq!((&repair["corruptSlots"], &repair["repairedBlocks"]), (&1.into(), &16.into()), "{repair}");
    assert_eq!((&repair["lostSlots"], &repair["mismatches"]), (&0.into(), &0.into()), "{repair}");
    let explained = cluster.must(&["explain", "volume", "v"]);
    assert!(explained.contains("Repaired") && explained.contains("16 blocks repaired"), "{explained}");
    let explained = cluster.must(&["explain", "node", &leader]);
    assert!(explained.contains("DiskCorrupt"), "{explained}");
    // It is on the disk, in another slot, and stays there.
    wait_for("the repair is durable", || find_slot(&file, slot * SLOT / BLOCK).filter(|at| *at != offset));
    check_all(&socket);
    assert_eq!(health(&cluster, &leader)["repairedBlocks"], 16, "nothing was repaired again");

    // In the log of a node that is down, below what it had told to be flushed and above its checkpoint.
    let node = cluster.follower("v");
    cluster.wait_healthy("v", &node);
    dev(&cluster, "stop", &node);
    let file = disk(&cluster, &node);
    let described = describe(&file);
    let (start, _) = region(&described, "WAL");
    let number = |text: &str, after: &str| -> u64 {
        let rest = text.split_once(after).expect("described").1.trim_start();
        rest.split(|c: char| !c.is_ascii_digit()).next().expect("a number").parse().expect("a number")
    };
    let segment = number(&described, "segments of");
    let last = described.lines().rfind(|line| line.trim_start().starts_with("generation")).expect("a generation");
    let (generation, bytes) = (number(last, "generation"), number(last.rsplit_once(',').expect("bytes").1, ""));
    let segments = (region(&described, "WAL").1 - start) / segment;
    assert!(bytes > 2 * MIB as u64, "{described}");
    garbage(&file, start + generation % segments * segment + (bytes - MIB as u64) / 4096 * 4096);

    // Alone it must not vote, whatever it remembers, and says why it waits.
    let others: Vec<String> = cluster.nodes().into_iter().filter(|other| *other != node).collect();
    others.iter().for_each(|other| dev(&cluster, "stop", other));
    dev(&cluster, "start", &node);
    let explained = wait_for("the node says what it found", || {
        let output = cluster.run(&["explain", "node", &node]);
        Some(String::from_utf8_lossy(&output.stdout).into_owned()).filter(|said| said.contains("LogDamaged"))
    });
    assert!(explained.contains("do not vote"), "{explained}");
    others.iter().for_each(|other| dev(&cluster, "start", other));
    cluster.wait_healthy("v", &node);
    let healed = |health: &Value| health["logFollowingGroups"] == 0 && health["logDamagedGroups"].as_u64() >= Some(1);
    wait_for("the log is whole again", || Some(health(&cluster, &node)).filter(healed));
    let explained = cluster.must(&["explain", "node", &node]);
    assert!(explained.contains("LogRepaired") && explained.contains("whole again"), "{explained}");
    check_all(&socket);
}
