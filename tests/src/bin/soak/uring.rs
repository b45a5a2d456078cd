//! A client that asks the kernel through `io_uring` alone.

use std::{
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd,
};

use anyhow::{Result, bail, ensure};
use io_uring::{IoUring, cqueue, opcode, squeue, types::Fd};
use mesh_tests::pattern;
use serde_json::json;

const PIECE: usize = 500;

/// Asks for one thing and waits for what comes of it.
fn ask(ring: &mut IoUring, entry: &squeue::Entry) -> Result<i32> {
    // SAFETY: what it points to lives until it is done, which is waited for.
    unsafe { ring.submission().push(entry)? };
    loop {
        ring.submit_and_wait(1)?;
        if let Some(done) = ring.completion().next() {
            return Ok(done.result());
        }
    }
}

/// Sends without a copy, and waits until the kernel no longer needs what was sent.
fn send_without_copy(ring: &mut IoUring, fd: Fd, piece: &[u8]) -> Result<i32> {
    let entry = opcode::SendZc::new(fd, piece.as_ptr(), u32::try_from(piece.len())?).build();
    // SAFETY: as above; what it points to lives until the last word about it.
    unsafe { ring.submission().push(&entry)? };
    let mut sent = None;
    loop {
        ring.submit_and_wait(1)?;
        for done in ring.completion() {
            let result = *sent.get_or_insert(done.result());
            if !cqueue::more(done.flags()) {
                return Ok(result);
            }
        }
    }
}

/// Exchanges BYTES in turns, every other of them sent without a copy.
pub fn talk(to: SocketAddr, bytes: u64, blocking: bool) -> Result<serde_json::Value> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(!blocking)?;
    let fd = Fd(stream.as_raw_fd());
    let (mut ring, mut done) = (IoUring::new(8)?, 0);
    let (mut piece, mut buffer) = ([0_u8; PIECE], [0_u8; PIECE]);
    while done < bytes {
        pattern::fill(&mut piece, done);
        let result = if (done / PIECE as u64).is_multiple_of(2) {
            send_without_copy(&mut ring, fd, &piece)?
        } else {
            ask(&mut ring, &opcode::Send::new(fd, piece.as_ptr(), u32::try_from(PIECE)?).build())?
        };
        ensure!(usize::try_from(result) == Ok(PIECE), "a send came to {result}");
        let mut got = 0;
        while got < PIECE {
            let rest = &mut buffer[got..];
            let result = ask(&mut ring, &opcode::Recv::new(fd, rest.as_mut_ptr(), u32::try_from(rest.len())?).build())?;
            match result {
                0 => bail!("ended at {done}"),
                n if n > 0 => got += usize::try_from(n)?,
                n if n == -libc::EAGAIN && !blocking => {
                    let result = ask(&mut ring, &opcode::PollAdd::new(fd, u32::try_from(libc::POLLIN)?).build())?;
                    ensure!(result > 0, "waiting came to {result}");
                }
                n => bail!("a read came to {n}"),
            }
        }
        ensure!(buffer == piece, "bytes after {done} are wrong");
        done += got as u64;
    }
    Ok(json!({"read": done}))
}
