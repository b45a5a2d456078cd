//! A kernel is trusted with acceleration after it was seen to do what acceleration rests on: two sockets of this process are
//! accelerated, and their behaviour is looked at. Kernels differ: in some, redirected bytes are not counted as unread, or an
//! application that asks how much there is to read is told nothing of them.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_common::accelerate::{MAX_MESSAGE, MAX_QUEUED};

use super::{Kernel, Pair, Place};
use crate::io::netns::Netns;

/// More than is redirected to a reader that does not read.
const FLOOD: u64 = 8 * MAX_QUEUED as u64;
const CHUNK: usize = 4096;
/// How long bytes may be on their way from one socket to the other.
const PROOF_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether this kernel can be trusted; if not, why.
pub fn prove(kernel: &Kernel, id: u64) -> Result<(), String> {
    let failed = |what: &str| format!("this kernel cannot accelerate safely: {what}");
    let problem = |e: io::Error| failed(&e.to_string());
    let (mut writer, mut reader, pair) = sockets().map_err(problem)?;
    if !kernel.join(id, &pair).map_err(problem)? {
        return Err(failed("there is no room for sockets"));
    }
    let mut sent = 0;
    for size in [1000, MAX_MESSAGE as usize + 1] {
        let before = kernel.look(&pair.one).map_err(problem)?.messages;
        writer.write_all(&vec![7; size]).map_err(problem)?;
        if kernel.look(&pair.one).map_err(problem)?.messages == before {
            return Err(failed("messages are not redirected"));
        }
        if unread(&reader).map_err(problem)? != size {
            return Err(failed("redirected bytes are not told to who asks how much there is to read"));
        }
        reader.read_exact(&mut vec![0; size]).map_err(problem)?;
        sent += size as u64;
        if kernel.look(&pair.other).map_err(problem)?.received != sent {
            return Err(failed("what is received cannot be counted"));
        }
    }
    let mut written = 0;
    loop {
        match writer.write(&pattern(written)) {
            Ok(n) if written < FLOOD => written += n as u64,
            Ok(n) => {
                written += n as u64;
                break;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(problem(error)),
        }
    }
    let redirected = kernel.look(&pair.one).map_err(problem)?.bytes - sent;
    if redirected > u64::from(MAX_QUEUED + MAX_MESSAGE) {
        return Err(failed(&format!("{redirected} bytes were redirected to a reader that does not read")));
    }
    let (mut read, started) = (0, Instant::now());
    let mut buffer = [0; CHUNK];
    while read < written {
        let n = match reader.read(&mut buffer) {
            Ok(n) if n > 0 => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && started.elapsed() < PROOF_TIMEOUT => {
                std::thread::yield_now();
                continue;
            }
            other => return Err(failed(&format!("{read} of {written} bytes arrived: {other:?}"))),
        };
        if !buffer[..n].iter().enumerate().all(|(i, b)| *b == byte(read + i as u64)) {
            return Err(failed("bytes arrive in another order"));
        }
        read += n as u64;
    }
    // That one went by TCP, so the pair is to leave; what comes then is told again.
    [id * 2, id * 2 + 1].into_iter().for_each(|key| kernel.remove(key));
    writer.write_all(&[7; 2]).map_err(problem)?;
    if unread(&reader).map_err(problem)? != 2 {
        return Err(failed("bytes that come to a socket that was taken out are not told to who asks how much there is to read"));
    }
    Ok(())
}

/// A connection of this process with itself, and its two ends.
fn sockets() -> io::Result<(TcpStream, TcpStream, Pair)> {
    let netns = Arc::new(Netns::open(Path::new("/proc/self/ns/net"))?);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let writer = TcpStream::connect(listener.local_addr()?)?;
    let local = writer.local_addr()?;
    let reader = loop {
        let (stream, from) = listener.accept()?;
        if from == local {
            break stream;
        }
    };
    writer.set_nonblocking(true)?;
    reader.set_nonblocking(true)?;
    let place = |local, remote| Place { netns: netns.clone(), local, remote };
    let (one, other) = (place(local, writer.peer_addr()?), place(writer.peer_addr()?, local));
    Ok((writer, reader, Pair { one, other, flow: 0 }))
}

/// `FIONREAD`.
fn unread(stream: &TcpStream) -> io::Result<usize> {
    let mut n: libc::c_int = 0;
    // SAFETY: a valid descriptor, and an integer to be filled in.
    let ret = unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &raw mut n) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { usize::try_from(n).map_err(io::Error::other) }
}

fn byte(at: u64) -> u8 {
    (at % 251) as u8
}

fn pattern(from: u64) -> [u8; CHUNK] {
    std::array::from_fn(|i| byte(from + i as u64))
}
