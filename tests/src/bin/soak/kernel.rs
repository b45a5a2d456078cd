//! Programs that ask more of the kernel: urgent data, sending without copying, a flood that nobody reads.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use anyhow::Result;
use mesh_tests::pattern;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send};
use serde_json::json;

use super::{OWN_BUFFER, STALL};

pub fn urgent(to: SocketAddr, bytes: u64) -> Result<serde_json::Value> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let (mut done, mut piece, mut buffer) = (0, [0; 500], [0; 500]);
    while done < bytes {
        if done >= bytes / 2 {
            send(stream.as_raw_fd(), b"!", MsgFlags::MSG_OOB)?;
        }
        pattern::fill(&mut piece, done);
        stream.write_all(&piece)?;
        let (mut got, started) = (0, Instant::now());
        while got < piece.len() {
            match stream.read(&mut buffer[got..]) {
                Ok(0) => anyhow::bail!("ended at {done}"),
                Ok(n) => got += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && started.elapsed() < STALL => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error.into()),
            }
        }
        anyhow::ensure!(buffer == piece, "bytes after {done} are wrong");
        done += got as u64;
    }
    Ok(json!({"read": done}))
}

fn allow_zerocopy(stream: &TcpStream) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: a descriptor that lives on, an integer and its size.
    let ret = unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, (&raw const on).cast(), 4) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub fn zerocopy(to: SocketAddr, bytes: u64, late: bool) -> Result<serde_json::Value> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let (mut done, mut sent, mut piece, mut buffer) = (0, None, [0; 500], [0; 500]);
    while done < bytes {
        if sent.is_none() && (!late || done >= bytes / 2) {
            allow_zerocopy(&stream)?;
            sent = Some(0_u64);
        }
        pattern::fill(&mut piece, done);
        let flags = if sent.is_some() { MsgFlags::from_bits_retain(libc::MSG_ZEROCOPY) } else { MsgFlags::empty() };
        anyhow::ensure!(send(stream.as_raw_fd(), &piece, flags)? == piece.len(), "no room for {} bytes", piece.len());
        sent = sent.map(|n| n + 1);
        let mut got = 0;
        while got < piece.len() {
            match stream.read(&mut buffer[got..]) {
                Ok(0) => anyhow::bail!("ended at {done}"),
                Ok(n) => got += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(1)),
                Err(error) => return Err(error.into()),
            }
        }
        anyhow::ensure!(buffer == piece, "bytes after {done} are wrong");
        done += got as u64;
    }
    let (mut told, patience) = (0, Instant::now() + Duration::from_secs(2));
    while sent.is_some_and(|sent| told < sent) && Instant::now() < patience {
        let mut control = nix::cmsg_space!([u8; 64]);
        match recvmsg::<()>(stream.as_raw_fd(), &mut [], Some(&mut control), MsgFlags::MSG_ERRQUEUE) {
            Ok(message) => {
                for one in message.cmsgs()? {
                    if let ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) = one {
                        // From one send to another.
                        told += u64::from(error.ee_data - error.ee_info) + 1;
                    }
                }
            }
            Err(nix::Error::EAGAIN) => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(json!({"read": done, "sent": sent, "told": told}))
}

pub fn flood(to: SocketAddr, after: u64) -> Result<serde_json::Value> {
    let mut stream = TcpStream::connect(to)?;
    // Left to itself it would be what the kernel grows it to: megabytes, and not of the way to the server.
    socket2::SockRef::from(&stream).set_send_buffer_size(OWN_BUFFER)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let (mut written, mut read, mut piece, mut buffer) = (0_u64, 0_u64, [0; 512], [0; 4096]);
    let mut turns = || -> Result<()> {
        while read < after {
            if written == read {
                pattern::fill(&mut piece, written);
                written += stream.write(&piece)? as u64;
            }
            match stream.read(&mut buffer) {
                Ok(n) => read += n as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(1)),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    };
    turns()?;
    let (mut last, started) = (Instant::now(), written);
    while last.elapsed() < Duration::from_secs(1) {
        pattern::fill(&mut piece, written);
        match stream.write(&piece) {
            Ok(n) => (written, last) = (written + n as u64, Instant::now()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(error.into()),
        }
    }
    let taken = written - started;
    stream.shutdown(Shutdown::Write)?;
    loop {
        let n = match stream.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            other => other?,
        };
        if n == 0 {
            return Ok(json!({"taken": taken, "written": written, "read": read}));
        }
        if let Some(wrong) = pattern::first_error(&buffer[..n], read) {
            anyhow::bail!("byte {wrong} is wrong");
        }
        read += n as u64;
    }
}
