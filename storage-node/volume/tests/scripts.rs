//! Scripts with expected output for apply and for admission; `REWRITE=1 cargo test` writes the output anew.

#![allow(clippy::unwrap_used, reason = "a test's helpers are tests")]

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use bytes::Bytes;
use holdfast_block::{Error, Geometry, Operation};
use holdfast_id::VolumeId;
use holdfast_protocol::session::{Epoch, Formatted, Instance, Session, Stamp};
use holdfast_volume::{Admission, Applied, Command, Mutation, Name, Step, Volume, VolumeSpec};

struct Args<'a>(&'a HashMap<String, Vec<String>>);

impl Args<'_> {
    fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    fn list(&self, key: &str) -> Vec<u64> {
        self.0[key].iter().map(|text| text.parse().unwrap()).collect()
    }

    fn number(&self, key: &str) -> u64 {
        self.list(key)[0]
    }

    fn number_or(&self, key: &str, default: u64) -> u64 {
        if self.has(key) { self.number(key) } else { default }
    }

    fn text(&self, key: &str) -> &str {
        &self.0[key][0]
    }

    fn fill(&self) -> u8 {
        u8::from_str_radix(self.text("fill"), 16).unwrap()
    }
}

fn volume(args: &Args<'_>) -> Volume {
    Volume::new(VolumeSpec {
        id: VolumeId::from_bytes([1; 16]).unwrap(),
        name: Name::new("data").unwrap(),
        geometry: Geometry::new(args.number_or("size", 65536), 512).unwrap(),
    })
}

fn stamp(args: &Args<'_>) -> Stamp {
    let [epoch, session, sequence, oldest] = args.list("stamp")[..] else { panic!("a stamp has four numbers") };
    Stamp { epoch: Epoch(epoch), session: Session(session), sequence, oldest }
}

/// Runs of equal bytes.
fn runs(bytes: &[u8]) -> String {
    bytes.chunk_by(|a, b| a == b).map(|run| format!("{:02x}*{}", run[0], run.len())).collect::<Vec<_>>().join(" ")
}

fn show_applied(applied: &Applied) -> String {
    let mut out = format!("{:?}\n", applied.outcome);
    for mutation in &applied.mutations {
        match mutation {
            Mutation::Write { first_block, data, checksums } => {
                assert_eq!(data.chunks(4096).map(holdfast_block::checksum).collect::<Vec<_>>(), checksums.to_vec());
                writeln!(out, "  write at {first_block}: {}", runs(data)).unwrap();
            }
            Mutation::Zero { first_block, count, discard } => {
                let word = if *discard { "discard" } else { "zero" };
                writeln!(out, "  {word} [{first_block}, {})", first_block + count).unwrap();
            }
        }
    }
    out
}

fn show_state(volume: &Volume) -> String {
    let mut out = format!(
        "applied {} size {} {:?} epoch {} session {}",
        volume.applied(),
        volume.geometry().size_bytes,
        volume.formatted(),
        volume.epoch().0,
        volume.session().0
    );
    if let Some(attachment) = volume.attachment() {
        let window = &attachment.window;
        write!(out, " held by {} instance {:x}", attachment.holder, attachment.instance.0).unwrap();
        write!(out, " oldest {}", window.oldest()).unwrap();
    }
    out.push('\n');
    out
}

fn session_command(directive: &str, args: &Args<'_>) -> Option<Command> {
    let epoch = || Epoch(args.number("epoch"));
    let instance = || Instance(u128::from(args.number("instance")));
    Some(match directive {
        "attach" => Command::Attach {
            holder: Name::new(args.text("holder")).unwrap(),
            instance: instance(),
            take_over: args.has("take-over"),
        },
        "open-session" => Command::OpenSession { epoch: epoch(), instance: instance() },
        "detach" => Command::Detach { epoch: epoch() },
        "resize" => Command::Resize { size_bytes: args.number("size") },
        "set-formatted" => {
            let formatted = match args.text("state") {
                "none" => Formatted::None,
                "formatting" => Formatted::Formatting,
                "formatted" => Formatted::Formatted,
                other => panic!("{other}"),
            };
            Command::SetFormatted { epoch: epoch(), formatted }
        }
        _ => return None,
    })
}

#[test]
fn apply_scripts() {
    datadriven::walk("tests/testdata/apply", |file| {
        let mut current: Option<Volume> = None;
        file.run(|case| {
            let args = Args(&case.args);
            if case.directive == "new" {
                let volume = current.insert(volume(&args));
                return show_state(volume);
            }
            let volume = current.as_mut().expect("a script begins with new");
            let (command, payload) = match case.directive.as_str() {
                "state" => return show_state(volume),
                "restart" => {
                    let bytes = volume.encode_state();
                    *volume = Volume::decode_state(&bytes).unwrap();
                    assert_eq!(volume.encode_state(), bytes);
                    return show_state(volume);
                }
                "raw" => {
                    let header: Vec<u8> =
                        case.input.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
                    let before = volume.clone();
                    let error = volume.apply(volume.applied() + 1, &header, &Bytes::new()).unwrap_err();
                    assert_eq!(*volume, before, "an error changes nothing");
                    return format!("{error}\n");
                }
                "write" => {
                    let blocks = args.number_or("blocks", 1) as usize;
                    let payload = Bytes::from(vec![args.fill(); blocks * 4096]);
                    let checksums = payload.chunks(4096).map(holdfast_block::checksum).collect();
                    let payload = payload.slice(..args.number_or("payload", payload.len() as u64) as usize);
                    (Command::Write { stamp: stamp(&args), first_block: args.number("block"), checksums }, payload)
                }
                "zero" => {
                    let edges: Vec<Option<u8>> = ["head", "tail"]
                        .map(|key| args.has(key).then(|| u8::from_str_radix(args.text(key), 16).unwrap()))
                        .into();
                    let blocks: Vec<_> = edges.iter().map(|fill| fill.map(|fill| vec![fill; 4096])).collect();
                    let checksum = |at: usize| blocks[at].as_ref().map(|block| holdfast_block::checksum(block));
                    let command = Command::Zero {
                        stamp: stamp(&args),
                        first_block: args.number("block"),
                        count: args.number_or("blocks", 1),
                        discard: args.has("discard"),
                        head: checksum(0),
                        tail: checksum(1),
                    };
                    (command, Bytes::from(blocks.into_iter().flatten().flatten().collect::<Vec<_>>()))
                }
                other => (session_command(other, &args).expect("a known directive"), Bytes::new()),
            };
            let index = args.number_or("index", volume.applied() + 1);
            match volume.apply(index, &command.encode(), &payload) {
                Ok(applied) => show_applied(&applied),
                Err(error) => format!("the replica stops: {error}\n"),
            }
        });
    });
}

struct Leader {
    volume: Volume,
    admission: Admission,
    proposals: BTreeMap<u64, (Bytes, Bytes)>,
}

impl Leader {
    fn show(&mut self, steps: Vec<Step>) -> String {
        let mut out = String::new();
        for step in steps {
            match step {
                Step::Propose { ticket, header, payload } => {
                    let what = match Command::decode(&header).unwrap() {
                        Command::Write { first_block, checksums, .. } => {
                            format!("write [{first_block}, {})", first_block + checksums.len() as u64)
                        }
                        Command::Zero { first_block, count, discard, head, tail, .. } => format!(
                            "{} [{first_block}, {}){}{}",
                            if discard { "discard" } else { "zero" },
                            first_block + count,
                            if head.is_some() { " head" } else { "" },
                            if tail.is_some() { " tail" } else { "" }
                        ),
                        other => panic!("{other:?}"),
                    };
                    writeln!(out, "propose {ticket}: {what} {}", runs(&payload)).unwrap();
                    self.proposals.insert(ticket, (header, payload));
                }
                Step::Read { read, first_block, count } => {
                    writeln!(out, "read {read}: [{first_block}, {})", first_block + u64::from(count)).unwrap();
                }
                Step::Complete { ticket, result } => writeln!(out, "complete {ticket}: {result:?}").unwrap(),
            }
        }
        if out.is_empty() { "nothing\n".to_owned() } else { out.replace(" \n", "\n") }
    }
}

#[test]
fn admission_scripts() {
    datadriven::walk("tests/testdata/admission", |file| {
        let mut current: Option<Leader> = None;
        file.run(|case| {
            let args = Args(&case.args);
            if case.directive == "new" {
                let mut volume = volume(&args);
                let attach =
                    Command::Attach { holder: Name::new("a").unwrap(), instance: Instance(1), take_over: false };
                let applied = volume.apply(1, &attach.encode(), &Bytes::new()).unwrap();
                current = Some(Leader { volume, admission: Admission::new(), proposals: BTreeMap::new() });
                return show_applied(&applied);
            }
            let leader = current.as_mut().expect("a script begins with new");
            let steps = match case.directive.as_str() {
                "admit" => {
                    let stamp = if args.has("stamp") {
                        stamp(&args)
                    } else {
                        let sequence = args.number("seq");
                        Stamp { epoch: Epoch(1), session: Session(1), sequence, oldest: args.number_or("oldest", 1) }
                    };
                    let range = |key: &str| (args.list(key)[0], args.list(key)[1]);
                    let operation = if args.has("write") {
                        let (offset, length) = range("write");
                        Operation::Write { offset, data: Bytes::from(vec![args.fill(); length as usize]) }
                    } else if args.has("zeroes") {
                        let (offset, length) = range("zeroes");
                        Operation::WriteZeroes { offset, length }
                    } else if args.has("discard") {
                        let (offset, length) = range("discard");
                        Operation::Discard { offset, length }
                    } else {
                        Operation::Flush
                    };
                    match leader.admission.admit(&leader.volume, args.number("ticket"), stamp, operation) {
                        Ok(steps) => steps,
                        Err(error) => return format!("refused: {error}\n"),
                    }
                }
                "read" => {
                    let data = if args.has("error") {
                        Err(Error::Corrupt)
                    } else {
                        Ok(Bytes::from(vec![args.fill(); args.number_or("blocks", 1) as usize * 4096]))
                    };
                    leader.admission.on_read(args.number("id"), data)
                }
                "applied" => {
                    let ticket = args.number("ticket");
                    let (header, payload) = &leader.proposals[&ticket];
                    let applied = leader.volume.apply(leader.volume.applied() + 1, header, payload).unwrap();
                    let steps = leader.admission.on_applied(ticket, &applied.outcome);
                    return show_applied(&applied) + &leader.show(steps);
                }
                "refused" => leader.admission.on_refused(args.number("ticket"), Error::NoSpace),
                "clear" => {
                    leader.admission.clear();
                    return format!("{} requests\n", leader.admission.len());
                }
                "len" => return format!("{} requests\n", leader.admission.len()),
                other => {
                    let command = session_command(other, &args).expect("a known directive");
                    let index = leader.volume.applied() + 1;
                    let applied = leader.volume.apply(index, &command.encode(), &Bytes::new()).unwrap();
                    return show_applied(&applied);
                }
            };
            leader.show(steps)
        });
    });
}
