//! A client that looks at what has come before it takes it, and has the kernel remember how far it has looked (`SO_PEEK_OFF`).

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use mesh_tests::pattern;
use nix::sys::socket::{MsgFlags, recv};
use serde_json::json;

const PIECE: usize = 500;
/// What is looked at at a time.
const LOOK: usize = 100;

/// Exchanges BYTES in turns.
pub fn talk(to: SocketAddr, bytes: u64) -> Result<serde_json::Value> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let from: libc::c_int = 0;
    // SAFETY: a descriptor that lives on, an integer and its size.
    let ret = unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, (&raw const from).cast(), 4) };
    ensure!(ret == 0, "SO_PEEK_OFF: {}", io::Error::last_os_error());
    let (mut done, mut piece) = (0, [0; PIECE]);
    while done < bytes {
        pattern::fill(&mut piece, done);
        stream.write_all(&piece)?;
        let looked = whole(|rest| {
            let rest = &mut rest[..LOOK];
            Ok(recv(stream.as_raw_fd(), rest, MsgFlags::MSG_PEEK)?)
        })?;
        ensure!(looked == piece, "bytes looked at after {done} are wrong");
        ensure!(whole(|rest| stream.read(rest))? == piece, "bytes after {done} are wrong");
        done += PIECE as u64;
    }
    Ok(json!({"read": done}))
}

/// A piece, of as many reads as it takes.
fn whole(mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> Result<[u8; PIECE]> {
    // What is looked at may be more than is missing.
    let (mut buffer, mut got, asked) = ([0; PIECE + LOOK], 0, Instant::now());
    while got < PIECE {
        match read(&mut buffer[got..]) {
            Ok(0) => bail!("ended after {got}"),
            Ok(n) => got += n,
            Err(error) => {
                ensure!(error.kind() == io::ErrorKind::WouldBlock, "{error}");
                ensure!(asked.elapsed() < Duration::from_secs(5), "nothing came after {got}");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    ensure!(got == PIECE, "more than was sent");
    Ok(buffer[..PIECE].try_into()?)
}
