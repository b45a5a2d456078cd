//! A client that takes what comes through a pipe, as proxies do that only pass it on.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd,
    ptr::null_mut,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use mesh_tests::pattern;
use serde_json::json;

const PIECE: usize = 500;

/// Exchanges BYTES in turns.
pub fn talk(to: SocketAddr, bytes: u64) -> Result<serde_json::Value> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let (mut out, into) = io::pipe()?;
    let (mut done, mut piece, mut buffer) = (0, [0; PIECE], [0; PIECE]);
    while done < bytes {
        pattern::fill(&mut piece, done);
        stream.write_all(&piece)?;
        let (mut got, asked) = (0, Instant::now());
        while got < PIECE {
            let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
            // SAFETY: two open descriptors, and no offsets.
            let n = unsafe { libc::splice(stream.as_raw_fd(), null_mut(), into.as_raw_fd(), null_mut(), PIECE - got, flags) };
            match usize::try_from(n) {
                Ok(0) => bail!("ended at {done}"),
                Ok(n) => {
                    out.read_exact(&mut buffer[got..got + n])?;
                    got += n;
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    ensure!(error.kind() == io::ErrorKind::WouldBlock, "{error}");
                    ensure!(asked.elapsed() < Duration::from_secs(5), "nothing came after {done}");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        ensure!(buffer == piece, "bytes after {done} are wrong");
        done += got as u64;
    }
    Ok(json!({"read": done}))
}
