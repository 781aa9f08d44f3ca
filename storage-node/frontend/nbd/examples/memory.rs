//! Serves memory over NBD on a Unix socket, to try real clients against the session:
//! `cargo run -p holdfast-nbd --example memory -- /tmp/memory.sock 64`, the size in MiB.

use std::io::{IoSlice, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use holdfast_block::{Completion, Geometry, Operation};
use holdfast_nbd::{Export, Session};

const SLICES: usize = 64;
const READ_BYTES: usize = 256 << 10;

type Memory = Arc<Mutex<Vec<u8>>>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: memory <socket> <MiB>")?;
    let size = arguments.next().ok_or("usage: memory <socket> <MiB>")?.parse::<usize>()? << 20;
    let geometry = Geometry::new(size as u64, 512).ok_or("the size is 1 MiB or more")?;
    let export = Export::new("memory".into(), geometry).ok_or("the name is short")?;
    let memory: Memory = Arc::new(Mutex::new(vec![0; size]));
    let listener = UnixListener::bind(&path)?;
    for stream in listener.incoming() {
        let (stream, export, memory) = (stream?, export.clone(), Arc::clone(&memory));
        std::thread::spawn(move || {
            if let Err(error) = serve(stream, export, &memory) {
                eprintln!("connection: {error}");
            }
        });
    }
    Ok(())
}

fn serve(mut stream: UnixStream, export: Export, memory: &Memory) -> std::io::Result<()> {
    let mut session = Session::new(export);
    let mut buffer = vec![0; READ_BYTES];
    loop {
        while session.has_output() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let filled = session.output(&mut slices);
            let sent = stream.write_vectored(&slices[..filled])?;
            session.on_sent(sent);
        }
        if let Some(end) = session.end() {
            eprintln!("session: {end:?}");
            return Ok(());
        }
        if session.wants_input() {
            match stream.read(&mut buffer)? {
                0 => session.on_end_of_input(),
                length => session.receive(&buffer[..length]),
            }
        }
        let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(request) = session.poll_request() {
            let data = apply(&mut memory, request.operation);
            session.on_completion(Completion { id: request.id, result: Ok(data) });
        }
    }
}

fn apply(memory: &mut [u8], operation: Operation) -> Bytes {
    match operation {
        Operation::Read { offset, length } => {
            return Bytes::copy_from_slice(&memory[offset as usize..][..length as usize]);
        }
        Operation::Write { offset, data } => memory[offset as usize..][..data.len()].copy_from_slice(&data),
        Operation::WriteZeroes { offset, length } | Operation::Discard { offset, length } => {
            memory[offset as usize..][..length as usize].fill(0);
        }
        Operation::Flush => {}
    }
    Bytes::new()
}
