//! The agent from its users' side: real sockets, real TLS, a device spoken to over NBD, and a model of the volume.
#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

mod support;

use std::os::unix::net::UnixListener;
use std::time::Instant;

use holdfast_agent::{Agent, AgentError, RecordError, SocketError, VolumeState};
use holdfast_protocol::socket_name;
use serde_json::json;
use support::cluster::{Cluster, SIZE, volume};
use support::{HANG, Host};

const EIO: u32 = 5;

#[test]
fn a_volume_is_attached_used_and_detached() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, false);
    let mut control = host.control();
    assert_eq!(control.status(), []);
    let status = control.attach(host.spec(&cluster, "attach")).unwrap();
    assert_eq!((status.state, status.epoch, status.session), (VolumeState::Attached, Some(1), Some(1)));
    assert_eq!(status.size_bytes, Some(SIZE));
    assert_eq!(status.leader, Some(cluster.nodes[0].node));
    assert_eq!(control.attach(host.spec(&cluster, "attach")).unwrap().session, Some(1), "once more is no more");

    let mut nbd = host.nbd();
    assert_eq!(nbd.size, SIZE);
    let data: Vec<u8> = (0..(3 << 20) + 512).map(|at: u32| (at / 512) as u8).collect();
    assert_eq!(nbd.write(512, &data), 0);
    assert_eq!(nbd.read(512, data.len() as u32), Ok(data.clone()));
    assert_eq!(cluster.model.lock().unwrap().data[512..][..data.len()], data);

    let (code, message) = control.detach(false).unwrap_err();
    assert_eq!(code, "in-use", "{message}");
    nbd.disconnect();
    control.wait_for(VolumeState::Attached);
    control.detach(false).unwrap();
    assert_eq!(cluster.model.lock().unwrap().holder, None);
    assert_eq!(control.status(), []);
    assert!(!host.path("nbd.sock").exists());
    assert_eq!(control.detach(false).unwrap_err().0, "not-found");
    host.stop();
    assert!(!host.path("control.sock").exists());
}

#[test]
fn a_restart_resumes_the_epoch_with_a_new_session_and_the_end_does_not_detach() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, true);
    assert_eq!(host.nbd().write(4096, &[7; 4096]), 0);
    host.stop();
    assert_eq!(cluster.model.lock().unwrap().holder.as_deref(), Some("host-a"));
    host.start(&cluster, true);
    assert_eq!(host.nbd().read(4096, 4096), Ok(vec![7; 4096]));
    let status = host.control().wait_for(VolumeState::Attached);
    assert_eq!((status.epoch, status.session), (Some(1), Some(2)));
}

#[test]
fn requests_survive_the_death_of_the_leader() {
    let (mut cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, true);
    let mut nbd = host.nbd();
    assert_eq!(nbd.write(0, &[1; 512]), 0);
    cluster.lead(None, false);
    cluster.kill(0);
    for cookie in 0..64 {
        nbd.send(1, cookie, cookie * 512, 512, &[cookie as u8 + 2; 512]);
    }
    // One that is not announced: the agent has to find it.
    cluster.lead(Some(2), false);
    let mut answered: Vec<u64> = (0..64)
        .map(|_| nbd.receive())
        .map(|(error, cookie)| {
            assert_eq!(error, 0);
            cookie
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, (0..64).collect::<Vec<_>>());
    {
        let model = cluster.model.lock().unwrap();
        assert_eq!(model.applied, 65);
        assert!((0..64).all(|block| model.data[block * 512] == block as u8 + 2));
    }
    cluster.lead(Some(1), true);
    assert_eq!(nbd.read(63 * 512, 512), Ok(vec![65; 512]));
    let status = host.control().wait_for(VolumeState::Attached);
    assert_eq!((status.leader, status.term), (Some(cluster.nodes[1].node), 8));
    let connected: Vec<bool> = status.nodes.iter().map(|node| node.connected).collect();
    assert_eq!(connected, [false, true, true]);
    assert!(status.nodes[0].reason.is_some(), "who is missing has a reason");
}

#[test]
fn a_node_of_this_machine_is_used_by_its_socket_as_soon_as_that_answers() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    let sockets = host.path("sockets");
    std::fs::create_dir(&sockets).unwrap();
    // What a dead process has left.
    drop(UnixListener::bind(sockets.join(socket_name(cluster.nodes[0].node))).unwrap());
    host.start(&cluster, true);
    let mut nbd = host.nbd();
    assert_eq!(nbd.write(0, &[1; 512]), 0);
    assert_eq!(cluster.model.lock().unwrap().users_gone, 0);
    cluster.listen_at_socket(0, &sockets);
    let start = Instant::now();
    for block in 1.. {
        // Requests that were under way over the address are sent again by the socket.
        assert_eq!(nbd.write(block % 64 * 512, &[block as u8; 512]), 0);
        let model = cluster.model.lock().unwrap();
        assert_eq!(model.applied, block + 1, "once each");
        if model.users_gone == 1 {
            break;
        }
        assert!(start.elapsed() < HANG, "the address is still used");
    }
    assert_eq!(nbd.read(0, 512).map(|data| data.len()), Ok(512));
}

#[test]
fn a_fenced_device_fails_and_stays_fenced_across_a_restart_until_it_is_detached() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, true);
    let mut nbd = host.nbd();
    assert_eq!(nbd.write(0, &[1; 512]), 0);
    cluster.model.lock().unwrap().take_over("host-b");
    assert_eq!(nbd.write(0, &[2; 512]), EIO);
    assert_eq!(nbd.read(0, 512), Err(EIO));
    assert_eq!(cluster.model.lock().unwrap().data[0], 1, "what a fenced holder writes lands nowhere");
    let status = host.control().wait_for(VolumeState::Fenced);
    assert!(status.reason.is_some());
    assert!(!host.path("nbd.sock").exists(), "no new user of a dead device");
    host.stop();

    cluster.model.lock().unwrap().holder = None;
    host.start(&cluster, true);
    let mut control = host.control();
    assert_eq!(control.status()[0].state, VolumeState::Fenced, "not even though the volume is free by now");
    assert_eq!(control.attach(host.spec(&cluster, "take-over")).unwrap_err().0, "exists");
    control.detach(false).unwrap();
    let status = control.attach(host.spec(&cluster, "attach")).unwrap();
    assert_eq!((status.state, status.epoch), (VolumeState::Attached, Some(3)));
}

/// As when others attach for this machine: it hears the epoch with the command.
#[test]
fn a_later_epoch_takes_the_place_of_a_fenced_one_and_an_earlier_one_is_over() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, true);
    let mut nbd = host.nbd();
    cluster.model.lock().unwrap().take_over("host-b");
    let mut control = host.control();
    let resume = |epoch: u64| {
        let mut spec = host.spec(&cluster, "attach");
        spec["mode"] = serde_json::json!({ "resume": { "epoch": epoch } });
        spec
    };
    assert_eq!(control.attach(resume(3)).unwrap_err().0, "exists", "not before it is known to be over");
    assert_eq!(nbd.write(0, &[2; 512]), EIO);
    control.wait_for(VolumeState::Fenced);
    cluster.model.lock().unwrap().take_over("host-a");
    let status = control.attach(resume(3)).unwrap();
    assert_eq!((status.state, status.epoch), (VolumeState::Attached, Some(3)));
    assert_eq!(control.attach(resume(1)).unwrap_err().0, "fenced");
    let mut nbd = host.nbd();
    assert_eq!(nbd.write(0, &[3; 512]), 0);
}

#[test]
fn an_epoch_that_was_lost_while_the_agent_was_away_is_not_taken_back() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, true);
    host.control().wait_for(VolumeState::Attached);
    host.stop();
    cluster.model.lock().unwrap().take_over("host-b");
    host.start(&cluster, true);
    let status = host.control().wait_for(VolumeState::Fenced);
    assert_eq!(status.epoch, Some(1));
    assert_eq!(cluster.model.lock().unwrap().epoch, 2);
}

#[test]
fn a_live_holder_is_told_and_only_a_take_over_gets_past_it() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    cluster.model.lock().unwrap().take_over("host-b");
    host.start(&cluster, false);
    let mut control = host.control();
    let (code, message) = control.attach(host.spec(&cluster, "attach")).unwrap_err();
    assert_eq!(code, "refused");
    assert!(message.contains("host-b"), "{message}");
    assert_eq!(control.status()[0].state, VolumeState::Refused);
    let status = control.attach(host.spec(&cluster, "take-over")).unwrap();
    assert_eq!((status.state, status.epoch), (VolumeState::Attached, Some(2)));
}

#[test]
fn a_command_that_is_not_through_says_so_and_why_and_the_agent_still_ends() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    cluster.lead(None, false);
    host.start(&cluster, false);
    let mut control = host.control();
    let spec = host.spec(&cluster, "attach");
    let (code, message) = control.command(json!({ "command": "attach", "volume": spec, "wait_ms": 0 })).unwrap_err();
    assert_eq!(code, "pending");
    assert!(message.contains("no"), "{message}");
    assert_eq!(control.status()[0].state, VolumeState::Attaching);
    control.command(json!({ "command": "shutdown" })).unwrap();
    host.join().unwrap();
}

#[test]
fn the_end_does_not_wait_for_a_volume_without_a_leader() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, true);
    let mut nbd = host.nbd();
    cluster.lead(None, false);
    nbd.send(1, 9, 0, 512, &[1; 512]);
    host.control().wait_for(VolumeState::Attached);
    host.stop();
    assert!(nbd.at_end());
    assert_eq!(cluster.model.lock().unwrap().holder.as_deref(), Some("host-a"));
}

#[test]
fn a_forced_detach_answers_what_was_asked_before_and_fails_what_comes_after() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, true);
    let mut nbd = host.nbd();
    assert_eq!(nbd.write(0, &[1; 512]), 0);
    host.control().detach(true).unwrap();
    assert_eq!(cluster.model.lock().unwrap().holder, None);
    assert!(nbd.at_end(), "the device is gone");
}

#[test]
fn sockets_and_state_of_a_live_agent_are_respected() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, true);
    host.control().wait_for(VolumeState::Attached);
    let run = |config| Agent::run(config, std::os::unix::net::UnixStream::pair().unwrap().0).unwrap_err();
    let same_state = host.config(&cluster);
    assert!(matches!(run(same_state), AgentError::Record(RecordError::Locked(_))));
    let mut same_control = host.config(&cluster);
    same_control.state_directory = host.path("other-state");
    assert!(matches!(run(same_control), AgentError::Socket(SocketError::InUse(_))));
    let mut same_device = host.config(&cluster);
    same_device.state_directory = host.path("other-state");
    same_device.control_socket = host.path("other.sock");
    same_device.volumes.push(serde_json::from_value(host.spec(&cluster, "attach")).unwrap());
    assert!(matches!(run(same_device), AgentError::Socket(SocketError::InUse(_))));
    assert_eq!(cluster.model.lock().unwrap().epoch, 1, "nobody else attached");
}

#[test]
fn a_socket_left_by_a_dead_agent_is_replaced() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    drop(UnixListener::bind(host.path("nbd.sock")).unwrap());
    drop(UnixListener::bind(host.path("control.sock")).unwrap());
    host.start(&cluster, true);
    host.control().wait_for(VolumeState::Attached);
    assert_eq!(host.nbd().write(0, &[1; 512]), 0);
}

#[test]
fn what_is_no_command_is_answered_and_what_never_ends_is_cut_off() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, false);
    let mut control = host.control();
    control.send("hello\n{\"version\":1,\"command\":\"status\"}\n");
    assert_eq!(control.receive()["error"]["code"], "malformed");
    assert_eq!(control.receive()["result"]["holder"], "host-a", "the next line is understood");
    let spec = json!({ "volume": volume(), "nodes": [], "nbd_socket": "/x" });
    assert_eq!(control.attach(spec).unwrap_err().0, "failed");
    let mut endless = host.control();
    endless.send(&"x".repeat((64 << 10) + 1));
    assert_eq!(endless.receive()["error"]["code"], "malformed");
    assert!(endless.at_end());
}

#[test]
fn commands_sent_ahead_are_answered_in_order() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, false);
    let mut control = host.control();
    let attach = json!({ "version": 1, "command": "attach", "volume": host.spec(&cluster, "attach") });
    let detach = json!({ "version": 1, "command": "detach", "volume": volume() });
    let status = json!({ "version": 1, "command": "status" });
    control.send(&format!("{attach}\n{status}\n{detach}\n{status}\n"));
    assert_eq!(control.receive()["result"]["state"], "attached");
    assert_eq!(control.receive()["result"]["volumes"][0]["state"], "attached");
    assert_eq!(control.receive()["result"], json!(null));
    assert_eq!(control.receive()["result"]["volumes"], json!([]));
}

#[test]
fn several_connections_share_the_device() {
    let (cluster, mut host) = (Cluster::start(), Host::new());
    host.start(&cluster, true);
    let mut clients: Vec<_> = (0..8).map(|_| host.nbd()).collect();
    for round in 0..32_u64 {
        for (number, client) in clients.iter_mut().enumerate() {
            client.send(1, round, (round * 8 + number as u64) * 512, 512, &[round as u8; 512]);
        }
    }
    for client in &mut clients {
        let mut cookies: Vec<u64> = (0..32).map(|_| client.receive().1).collect();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..32).collect::<Vec<_>>());
    }
    assert_eq!(clients[0].read(31 * 8 * 512, 4096), Ok(vec![31; 4096]), "one sees what another wrote");
    assert_eq!(host.control().status()[0].connections, 8);
}
