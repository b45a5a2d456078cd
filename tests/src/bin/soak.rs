//! An echo server and its clients, written as careful event-driven programs are: non-blocking sockets, edge-triggered epoll, and
//! a read that returns less than asked for taken for the end of what there is. Message sizes and pauses are random on both sides;
//! every byte is checked. The client prints one JSON object.

use std::{
    io::{self, Read, Write},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use mesh_tests::pattern;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use serde_json::json;

#[path = "soak/kernel.rs"]
mod kernel;
#[path = "soak/peek.rs"]
mod peek;
#[path = "soak/splice.rs"]
mod splice;
#[path = "soak/uring.rs"]
mod uring;

#[derive(Parser)]
#[command(about = "Random messages with random pauses, every byte checked")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Echo on PORT.
    Serve {
        port: u16,
        /// Read no more from a connection after so many bytes, for some seconds.
        #[arg(long)]
        stall_after: Option<u64>,
        /// Share the port with other servers (`SO_REUSEPORT`).
        #[arg(long)]
        shared: bool,
    },
    /// Exchange AFTER bytes in turns with a server that then reads no more, and send as long as that is taken; print how much was.
    /// Then wait for the server to read on, and check that all of it comes back.
    Flood { to: SocketAddr, after: u64 },
    /// Exchange BYTES in turns, the first half of them without blocking and the rest with a socket that was made blocking; print how
    /// much came back.
    Flip { to: SocketAddr, bytes: u64 },
    /// Exchange BYTES in turns, sending without a copy (`MSG_ZEROCOPY`), the first half only if not --late; print how many of those
    /// sends were made, and of how many the kernel has said that they are done.
    Zerocopy {
        to: SocketAddr,
        bytes: u64,
        #[arg(long)]
        late: bool,
    },
    /// Exchange BYTES in turns, reading with `splice` alone; print how much came back.
    Splice { to: SocketAddr, bytes: u64 },
    /// Exchange BYTES in turns, looking at all of them before they are read (`SO_PEEK_OFF`); print how much came back.
    Peek { to: SocketAddr, bytes: u64 },
    /// Exchange BYTES in turns, of the second half each behind a byte of urgent data, which is not part of the stream; print how much came
    /// back.
    Urgent { to: SocketAddr, bytes: u64 },
    /// Exchange BYTES in turns through `io_uring`, every other of them sent without a copy; print how much came back.
    Uring {
        to: SocketAddr,
        bytes: u64,
        /// With a socket that blocks.
        #[arg(long)]
        blocking: bool,
    },
    /// Send BYTES on each of CONNECTIONS and check what comes back; with --turns no message before the last one came back. Then end, or
    /// with --stay not before so many seconds have passed.
    Run {
        to: SocketAddr,
        connections: usize,
        bytes: u64,
        #[arg(long)]
        turns: bool,
        #[arg(long, default_value_t = 0.0)]
        stay: f64,
    },
}

/// What an echoing connection keeps at most.
const ROOM: usize = 256 * 1024;
/// What a flood has its own socket keep.
const OWN_BUFFER: usize = 64 * 1024;
/// How long a server stalls.
const STALLED: Duration = Duration::from_secs(6);
/// A connection without any progress for so long has lost something.
const STALL: Duration = Duration::from_secs(20);

fn main() -> Result<()> {
    let report = match Arguments::parse().command {
        Command::Serve { port, stall_after, shared } => return serve(port, stall_after.unwrap_or(u64::MAX), shared),
        Command::Run { to, connections, bytes, turns, stay } => {
            let talk = Talk { bytes, turns, stay: Duration::from_secs_f64(stay) };
            println!("{}", run(to, connections, &talk)?);
            return Ok(());
        }
        Command::Flood { to, after } => kernel::flood(to, after),
        Command::Flip { to, bytes } => flip(to, bytes),
        Command::Zerocopy { to, bytes, late } => kernel::zerocopy(to, bytes, late),
        Command::Splice { to, bytes } => splice::talk(to, bytes),
        Command::Peek { to, bytes } => peek::talk(to, bytes),
        Command::Urgent { to, bytes } => kernel::urgent(to, bytes),
        Command::Uring { to, bytes, blocking } => uring::talk(to, bytes, blocking),
    };
    println!("{}", report.unwrap_or_else(|error| json!({"error": format!("{error:#}")})));
    Ok(())
}

/// What a client says on a connection.
struct Talk {
    bytes: u64,
    /// No message before the last one came back.
    turns: bool,
    /// Between the last byte and the end.
    stay: Duration,
}

/// One end of a connection.
struct Conn {
    stream: TcpStream,
    readable: bool,
    writable: bool,
    /// The other end will say no more: a short read is not the end.
    hung_up: bool,
    ended: bool,
    shut: bool,
    paused: Option<Instant>,
    read: u64,
    written: u64,
    /// To be echoed.
    waiting: Vec<u8>,
    stalled: Option<Instant>,
    last: Instant,
}

impl Conn {
    fn new(stream: TcpStream, epoll: &Epoll, token: usize) -> Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        epoll.add(stream.as_fd(), EpollEvent::new(flags, token as u64))?;
        let (readable, writable, hung_up, ended, shut) = (false, false, false, false, false);
        Ok(Self {
            stream,
            readable,
            writable,
            hung_up,
            ended,
            shut,
            paused: None,
            read: 0,
            written: 0,
            waiting: Vec::new(),
            stalled: None,
            last: Instant::now(),
        })
    }

    fn wake(&mut self, events: EpollFlags) {
        self.readable |= events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR | EpollFlags::EPOLLRDHUP);
        self.writable |= events.intersects(EpollFlags::EPOLLOUT | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        self.hung_up |= events.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP);
    }

    /// Whether it rests now.
    fn rests(&mut self) -> bool {
        if fastrand::u32(..400) == 0 {
            let pause = if fastrand::u32(..20) == 0 { 150 } else { fastrand::u64(1..8) };
            self.paused = Some(Instant::now() + Duration::from_millis(pause));
        }
        self.paused.is_some_and(|until| until > Instant::now())
    }

    /// One read; the bytes, or nothing when there are none now.
    fn take(&mut self, most: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; fastrand::usize(1..=most)];
        match self.stream.read(&mut buffer) {
            Ok(0) => {
                (self.ended, self.readable) = (true, false);
                Ok(Vec::new())
            }
            Ok(n) => {
                if n < buffer.len() && !self.hung_up {
                    self.readable = false;
                }
                (self.read, self.last) = (self.read + n as u64, Instant::now());
                buffer.truncate(n);
                Ok(buffer)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(Vec::new())
            }
            Err(error) => Err(error),
        }
    }

    fn give(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.stream.write(bytes) {
            Ok(n) => {
                (self.written, self.last) = (self.written + n as u64, Instant::now());
                Ok(n)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.writable = false;
                Ok(0)
            }
            Err(error) => Err(error),
        }
    }

    /// Echoes a little; whether there may be more to do at once.
    fn echo(&mut self, stall_after: u64) -> io::Result<bool> {
        if self.read >= stall_after && self.stalled.is_none() {
            self.stalled = Some(Instant::now());
        }
        let stalled = self.stalled.is_some_and(|since| since.elapsed() < STALLED);
        if self.readable && !stalled && self.waiting.len() < ROOM {
            let got = self.take(32 * 1024)?;
            self.waiting.extend(got);
        }
        if self.writable && !self.waiting.is_empty() {
            let piece = size(false).min(self.waiting.len());
            let n = self.stream.write(&self.waiting[..piece]);
            match n {
                Ok(n) => drop(self.waiting.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) => return Err(error),
            }
        }
        if self.ended && self.waiting.is_empty() && !self.shut {
            self.stream.shutdown(Shutdown::Write)?;
            self.shut = true;
        }
        Ok((self.readable && (stalled || self.waiting.len() < ROOM)) || (self.writable && !self.waiting.is_empty()))
    }

    /// Sends and checks a little.
    fn converse(&mut self, talk: &Talk) -> Result<bool> {
        let &Talk { bytes: total, turns, stay } = talk;
        if self.readable {
            let at = self.read;
            let got = self.take(if turns { 4096 } else { 64 * 1024 })?;
            if let Some(wrong) = pattern::first_error(&got, at) {
                anyhow::bail!("byte {wrong} is wrong");
            }
        }
        if self.writable && self.written < total && !(turns && self.read < self.written) {
            let n = size(turns).min(usize::try_from(total - self.written).unwrap_or(usize::MAX));
            let mut piece = vec![0; n];
            pattern::fill(&mut piece, self.written);
            self.give(&piece)?;
        }
        if self.written == total && !self.shut && self.last.elapsed() >= stay {
            self.stream.shutdown(Shutdown::Write)?;
            self.shut = true;
        }
        Ok(self.readable || (self.writable && self.written < total && !(turns && self.read < self.written)))
    }
}

/// Mostly messages, sometimes a piece of bulk.
fn size(turns: bool) -> usize {
    match fastrand::u32(..100) {
        0..70 => fastrand::usize(1..2048),
        70..95 => fastrand::usize(1..8192),
        _ if turns => fastrand::usize(1..8192),
        _ => fastrand::usize(1..100_000),
    }
}

fn serve(port: u16, stall_after: u64, shared: bool) -> Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(1024)?;
    let listener = TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX))?;
    let mut all: Vec<Option<Conn>> = Vec::new();
    let mut busy = false;
    loop {
        for (token, events) in wait(&epoll, busy)? {
            if token == u64::MAX {
                while let Ok((stream, _)) = listener.accept() {
                    let token = all.len();
                    all.push(Some(Conn::new(stream, &epoll, token)?));
                }
            } else if let Some(Some(conn)) = all.get_mut(usize::try_from(token)?) {
                conn.wake(events);
            }
        }
        busy = false;
        for slot in &mut all {
            let Some(conn) = slot else { continue };
            if conn.rests() {
                busy = true;
                continue;
            }
            match conn.echo(stall_after) {
                Ok(more) => busy |= more,
                Err(_) => *slot = None,
            }
            if slot.as_ref().is_some_and(|c| c.shut) {
                *slot = None;
            }
        }
    }
}

fn run(to: SocketAddr, connections: usize, talk: &Talk) -> Result<serde_json::Value> {
    let bytes = talk.bytes;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    let mut all = Vec::new();
    for token in 0..connections {
        let domain = if to.is_ipv4() { socket2::Domain::IPV4 } else { socket2::Domain::IPV6 };
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
        // Blocking while it connects: only what it is like afterwards counts.
        socket.connect(&to.into()).context("connect")?;
        all.push(Some(Conn::new(socket.into(), &epoll, token)?));
    }
    let (mut busy, mut errors, mut done, mut echoed) = (false, Vec::new(), 0, 0_u64);
    while all.iter().any(Option::is_some) {
        for (token, events) in wait(&epoll, busy)? {
            if let Some(Some(conn)) = all.get_mut(usize::try_from(token)?) {
                conn.wake(events);
            }
        }
        busy = false;
        for (i, slot) in all.iter_mut().enumerate() {
            let Some(conn) = slot else { continue };
            if conn.rests() {
                busy = true;
                continue;
            }
            let outcome = conn.converse(talk);
            let (read, written) = (conn.read, conn.written);
            match outcome {
                Err(error) => errors.push(format!("{i}: {error:#} (read {read}, written {written})")),
                Ok(_) if conn.ended && read == bytes => done += 1,
                Ok(_) if conn.ended => errors.push(format!("{i}: ended at {read} of {bytes}")),
                Ok(_) if conn.last.elapsed() > STALL => errors.push(format!("{i}: stalled (read {read}, written {written} of {bytes})")),
                Ok(more) => {
                    busy |= more;
                    continue;
                }
            }
            echoed += read;
            *slot = None;
        }
    }
    Ok(json!({"done": done, "echoed": echoed, "errors": errors}))
}

fn flip(to: SocketAddr, bytes: u64) -> Result<serde_json::Value> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let (mut done, mut blocking, mut piece, mut buffer) = (0, false, [0; 500], [0; 500]);
    while done < bytes {
        if !blocking && done >= bytes / 2 {
            stream.set_nonblocking(false)?;
            blocking = true;
        }
        pattern::fill(&mut piece, done);
        stream.write_all(&piece)?;
        let mut got = 0;
        while got < piece.len() {
            match stream.read(&mut buffer[got..]) {
                Ok(0) => anyhow::bail!("ended at {done}"),
                Ok(n) => got += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !blocking => std::thread::sleep(Duration::from_millis(1)),
                Err(error) => return Err(error.into()),
            }
        }
        anyhow::ensure!(buffer == piece, "bytes after {done} are wrong");
        done += got as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    anyhow::ensure!(stream.read(&mut buffer)? == 0, "more than was sent");
    Ok(json!({"read": done}))
}

fn wait(epoll: &Epoll, busy: bool) -> Result<Vec<(u64, EpollFlags)>> {
    let mut events = [EpollEvent::empty(); 256];
    match epoll.wait(&mut events, if busy { 0_u8 } else { 100 }) {
        Ok(n) => Ok(events[..n].iter().map(|e| (e.data(), e.events())).collect()),
        Err(nix::errno::Errno::EINTR) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}
