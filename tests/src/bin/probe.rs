//! A server and clients that show what an application sees of its connections. Plain sockets of the standard library.
//!
//! The server does what the first line a client sends asks for; see [`serve_one`]. A second port speaks first. Clients
//! print one JSON object.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use mesh_tests::pattern;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use socket2::SockRef;

#[derive(Parser)]
#[command(about = "Shows what an application sees of its connections")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve on PORT, and on PORT+1 as a server that speaks first.
    Serve { port: u16 },
    /// Send a line, print what comes back until the end, and both names of the connection.
    Ask { to: String, line: String },
    /// Ask who the server thinks we are, over a socket of the family of the address; `mapped` dials IPv4 as `::ffff:a.b.c.d`.
    Names {
        to: String,
        #[arg(long)]
        mapped: bool,
    },
    /// Send N patterned bytes, end the sending direction, and print what the server counted.
    Upload { to: String, bytes: u64 },
    /// Send and receive N patterned bytes at the same time.
    Exchange {
        to: String,
        bytes: u64,
        #[arg(long)]
        nonblocking: bool,
    },
    /// Have the server end its direction first, go on sending, and say whether that was taken.
    FinishFirst { to: String },
    /// Wait for the banner of a server that speaks first, then talk.
    Banner { to: String },
    /// Ask the server to reset the connection and report how reading ends.
    Reset { to: String },
    /// Open a connection, reset it ourselves, and ask the server how many resets it has seen.
    ResetSelf { to: String },
    /// Connect, send to a server that does not read, for some seconds; print how much was taken.
    Stall { to: String, seconds: u64 },
    /// Connections one after the other, each with one question and answer.
    Churn { to: String, count: u32, threads: u32 },
    /// Hold N idle connections for some seconds after printing a line; then check that all still answer.
    Hold { to: String, count: u32, seconds: u64 },
    /// One question and answer on the same connection every 10 ms for some seconds.
    Steady { to: String, seconds: u64 },
    /// One connection, question and answer after the other for some seconds: how many worked and failed.
    Attempts {
        to: String,
        seconds: u64,
        #[arg(default_value_t = 20)]
        pause_millis: u64,
    },
}

fn main() -> Result<()> {
    let report = match Arguments::parse().command {
        Command::Serve { port } => return serve(port),
        Command::Ask { to, line } => ask(&to, &line),
        Command::Names { to, mapped } => names(&to, mapped),
        Command::Upload { to, bytes } => upload(&to, bytes),
        Command::Exchange { to, bytes, nonblocking: false } => exchange(&to, bytes),
        Command::Exchange { to, bytes, nonblocking: true } => exchange_nonblocking(&to, bytes),
        Command::FinishFirst { to } => finish_first(&to),
        Command::Banner { to } => banner(&to),
        Command::Reset { to } => reset(&to),
        Command::ResetSelf { to } => reset_self(&to),
        Command::Stall { to, seconds } => stall(&to, seconds),
        Command::Churn { to, count, threads } => churn(&to, count, threads),
        Command::Hold { to, count, seconds } => hold(&to, count, seconds),
        Command::Steady { to, seconds } => steady(&to, seconds),
        Command::Attempts { to, seconds, pause_millis } => attempts(&to, seconds, Duration::from_millis(pause_millis)),
    };
    println!("{}", report.unwrap_or_else(|error| json!({"error": format!("{error:#}")})));
    Ok(())
}

static RESETS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

fn serve(port: u16) -> Result<()> {
    let first = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port + 1))?;
    thread::spawn(move || {
        for stream in first.incoming().flatten() {
            thread::spawn(move || speak_first(stream));
        }
    });
    let listener = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
    listener.set_only_v6(false)?;
    listener.set_reuse_address(true)?;
    listener.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    listener.listen(4096)?;
    for stream in TcpListener::from(listener).incoming().flatten() {
        // Small stacks: thousands of idle connections are one of the tests.
        let _ = thread::Builder::new().stack_size(64 * 1024).spawn(move || {
            if let Err(error) = serve_one(stream)
                && error.kind() == io::ErrorKind::ConnectionReset
            {
                RESETS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        });
    }
    Ok(())
}

fn speak_first(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(b"220 hello\n")?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    stream.write_all(format!("you said {line}").as_bytes())
}

/// Reads a line byte by byte, so that nothing after it is taken.
fn read_line(stream: &mut TcpStream) -> io::Result<String> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

fn serve_one(mut stream: TcpStream) -> io::Result<()> {
    loop {
        let line = read_line(&mut stream)?;
        let mut words = line.split(' ');
        let command = words.next().unwrap_or_default();
        let number = words.next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        match command {
            "" => return Ok(()),
            "ping" => stream.write_all(b"pong\n")?,
            "who" => {
                let names = json!({"peer": canonical(stream.peer_addr()?), "local": canonical(stream.local_addr()?)});
                return stream.write_all(format!("{names}\n").as_bytes());
            }
            "resets" => {
                let seen = RESETS.load(std::sync::atomic::Ordering::Relaxed);
                stream.write_all(format!("{seen}\n").as_bytes())?;
            }
            // Counts until the client ends its direction, then answers: half-close.
            "upload" => {
                let (count, error) = receive(&mut stream)?;
                return stream.write_all(format!("{}\n", json!({"received": count, "firstError": error})).as_bytes());
            }
            // Sends while it receives, and tells at the end what it received.
            "exchange" => {
                let mut sending = stream.try_clone()?;
                let sender = thread::spawn(move || send(&mut sending, number));
                let (count, error) = receive(&mut stream)?;
                sender.join().map_err(|_| io::Error::other("sender"))??;
                return stream.write_all(format!("{}\n", json!({"received": count, "firstError": error})).as_bytes());
            }
            // Sends everything, ends its direction, and goes on reading.
            "finish-first" => {
                stream.write_all(b"bye\n")?;
                stream.shutdown(Shutdown::Write)?;
                let mut rest = Vec::new();
                stream.read_to_end(&mut rest)?;
                return Ok(());
            }
            "reset" => {
                SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                return Ok(());
            }
            "stall" => {
                stream.write_all(b"ok\n")?;
                thread::sleep(Duration::from_secs(number));
                return Ok(());
            }
            other => return stream.write_all(format!("no such command: {other}\n").as_bytes()),
        }
    }
}

fn canonical(address: SocketAddr) -> String {
    SocketAddr::new(address.ip().to_canonical(), address.port()).to_string()
}

/// Reads patterned bytes to the end: how many, and where the first wrong one is.
fn receive(stream: &mut TcpStream) -> io::Result<(u64, Option<u64>)> {
    let (mut buffer, mut count, mut error) = (vec![0; 32 * 1024], 0, None);
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok((count, error));
        }
        error = error.or_else(|| pattern::first_error(&buffer[..n], count));
        count += n as u64;
    }
}

fn send(stream: &mut TcpStream, bytes: u64) -> io::Result<()> {
    let (mut buffer, mut at) = (vec![0; 32 * 1024], 0);
    while at < bytes {
        let n = usize::try_from(bytes - at).unwrap_or(usize::MAX).min(buffer.len());
        pattern::fill(&mut buffer[..n], at);
        stream.write_all(&buffer[..n])?;
        at += n as u64;
    }
    Ok(())
}

fn connect(to: &str) -> Result<TcpStream> {
    let address = to.to_socket_addrs()?.next().context("an address")?;
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(15)).with_context(|| format!("connect {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    Ok(stream)
}

fn ask(to: &str, line: &str) -> Result<Value> {
    let mut stream = connect(to)?;
    let names = json!({"peername": stream.peer_addr()?.to_string(), "sockname": stream.local_addr()?.to_string()});
    stream.write_all(format!("{line}\n").as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(json!({"names": names, "answer": answer.trim()}))
}

fn names(to: &str, mapped: bool) -> Result<Value> {
    let address: SocketAddr = to.parse()?;
    let dialled = match address {
        SocketAddr::V4(v4) if mapped => SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port())),
        other => other,
    };
    let socket = socket2::Socket::new(socket2::Domain::for_address(dialled), socket2::Type::STREAM, None)?;
    socket.connect(&dialled.into())?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let (peername, sockname) = (stream.peer_addr()?, stream.local_addr()?);
    stream.write_all(b"who\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let server: Value = serde_json::from_str(&answer)?;
    Ok(json!({"dialled": dialled.to_string(), "peername": peername.to_string(), "sockname": canonical(sockname), "server": server}))
}

fn upload(to: &str, bytes: u64) -> Result<Value> {
    let mut stream = connect(to)?;
    stream.write_all(b"upload\n")?;
    send(&mut stream, bytes)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

fn exchange(to: &str, bytes: u64) -> Result<Value> {
    let mut stream = connect(to)?;
    stream.write_all(format!("exchange {bytes}\n").as_bytes())?;
    let mut sending = stream.try_clone()?;
    let sender = thread::spawn(move || send(&mut sending, bytes).and_then(|()| sending.shutdown(Shutdown::Write)));
    let mut all = Tally::default();
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        all.take(&buffer[..n], bytes);
    }
    sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    all.report()
}

/// What came back: `bytes` patterned bytes, then a line.
#[derive(Default)]
struct Tally {
    count: u64,
    error: Option<u64>,
    line: Vec<u8>,
}

impl Tally {
    fn take(&mut self, piece: &[u8], bytes: u64) {
        let patterned = usize::try_from(bytes - self.count).unwrap_or(usize::MAX).min(piece.len());
        self.error = self.error.or_else(|| pattern::first_error(&piece[..patterned], self.count));
        self.count += patterned as u64;
        self.line.extend_from_slice(&piece[patterned..]);
    }

    fn report(self) -> Result<Value> {
        let server: Value = serde_json::from_slice(&self.line).with_context(|| format!("after {} bytes", self.count))?;
        Ok(json!({"received": self.count, "firstError": self.error, "server": server}))
    }
}

fn exchange_nonblocking(to: &str, bytes: u64) -> Result<Value> {
    let mut stream = connect(to)?;
    stream.write_all(format!("exchange {bytes}\n").as_bytes())?;
    stream.set_nonblocking(true)?;
    let (mut all, mut sent, mut finished) = (Tally::default(), 0, false);
    let (mut out, mut buffer) = (vec![0; 16 * 1024], vec![0; 16 * 1024]);
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        ensure!(Instant::now() < deadline, "no progress: sent {sent}, received {}", all.count);
        let wanted = if finished { PollFlags::POLLIN } else { PollFlags::POLLIN | PollFlags::POLLOUT };
        poll(&mut [PollFd::new(stream.as_fd(), wanted)], PollTimeout::from(1000_u16))?;
        if sent < bytes {
            let n = usize::try_from(bytes - sent).unwrap_or(usize::MAX).min(out.len());
            pattern::fill(&mut out[..n], sent);
            match stream.write(&out[..n]) {
                Ok(n) => sent += n as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        } else if !finished {
            stream.shutdown(Shutdown::Write)?;
            finished = true;
        }
        match stream.read(&mut buffer) {
            Ok(0) => return all.report(),
            Ok(n) => all.take(&buffer[..n], bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn finish_first(to: &str) -> Result<Value> {
    let mut stream = connect(to)?;
    stream.write_all(b"finish-first\n")?;
    let mut heard = String::new();
    stream.read_to_string(&mut heard)?;
    // The server has ended; our direction must still work, for a while and for more than one write.
    for _ in 0..20 {
        stream.write_all(&[7; 1000])?;
        thread::sleep(Duration::from_millis(5));
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(json!({"heard": heard.trim(), "afterEnd": "taken"}))
}

fn banner(to: &str) -> Result<Value> {
    let started = Instant::now();
    let mut stream = connect(to)?;
    let banner = read_line(&mut stream)?;
    let waited = started.elapsed();
    stream.write_all(b"thanks\n")?;
    let answer = read_line(&mut stream)?;
    Ok(json!({"banner": banner, "answer": answer, "milliseconds": waited.as_millis() as u64}))
}

fn reset(to: &str) -> Result<Value> {
    let mut stream = connect(to)?;
    stream.write_all(b"reset\n")?;
    let mut rest = Vec::new();
    let end = match stream.read_to_end(&mut rest) {
        Ok(_) => "end of data".to_owned(),
        Err(error) => format!("{:?}", error.kind()),
    };
    Ok(json!({"end": end}))
}

fn reset_self(to: &str) -> Result<Value> {
    let count = || -> Result<u64> {
        let mut stream = connect(to)?;
        stream.write_all(b"resets\n")?;
        Ok(read_line(&mut stream)?.parse()?)
    };
    let before = count()?;
    let mut stream = connect(to)?;
    stream.write_all(b"ping\n")?;
    read_line(&mut stream)?;
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    drop(stream);
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        if count()? > before {
            return Ok(json!({"seen": true}));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(json!({"seen": false}))
}

fn stall(to: &str, seconds: u64) -> Result<Value> {
    let mut stream = connect(to)?;
    stream.write_all(format!("stall {}\n", seconds + 5).as_bytes())?;
    read_line(&mut stream)?;
    stream.set_nonblocking(true)?;
    let (buffer, mut taken) = (vec![0; 64 * 1024], 0);
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < deadline {
        match stream.write(&buffer) {
            Ok(n) => taken += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(json!({"taken": taken}))
}

fn question(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"ping\n")?;
    let answer = read_line(stream)?;
    ensure!(answer == "pong", "the answer was {answer:?}");
    Ok(())
}

fn churn(to: &str, count: u32, threads: u32) -> Result<Value> {
    let workers = (0..threads).map(|_| {
        let to = to.to_owned();
        thread::spawn(move || (0..count / threads).filter(|_| connect(&to).and_then(|mut s| question(&mut s)).is_err()).count())
    });
    let workers = workers.collect::<Vec<_>>();
    let failed: usize = workers.into_iter().map(|w| w.join().unwrap_or(usize::MAX)).sum();
    Ok(json!({"failed": failed}))
}

fn hold(to: &str, count: u32, seconds: u64) -> Result<Value> {
    let mut streams = Vec::new();
    for _ in 0..count {
        let mut stream = connect(to)?;
        question(&mut stream)?;
        streams.push(stream);
    }
    eprintln!("held");
    thread::sleep(Duration::from_secs(seconds));
    let failed = streams.iter_mut().filter_map(|s| question(s).err()).count();
    Ok(json!({"held": streams.len(), "failed": failed}))
}

fn steady(to: &str, seconds: u64) -> Result<Value> {
    let mut stream = connect(to)?;
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let (mut answers, mut longest) = (0_u64, Duration::ZERO);
    while Instant::now() < deadline {
        let asked = Instant::now();
        if let Err(error) = question(&mut stream) {
            return Ok(
                json!({"answers": answers, "error": format!("{error:#}"), "afterMilliseconds": (seconds * 1000).saturating_sub((deadline - Instant::now()).as_millis() as u64)}),
            );
        }
        longest = longest.max(asked.elapsed());
        answers += 1;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(json!({"answers": answers, "longestMilliseconds": longest.as_millis() as u64}))
}

fn attempts(to: &str, seconds: u64, pause: Duration) -> Result<Value> {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let (mut worked, mut failures) = (0_u64, Vec::new());
    while Instant::now() < deadline {
        match connect(to).and_then(|mut s| question(&mut s)) {
            Ok(()) => worked += 1,
            Err(error) => failures.push(format!("{error:#}")),
        }
        thread::sleep(pause);
    }
    let (failed, last) = (failures.len(), failures.last().cloned());
    Ok(json!({"worked": worked, "failed": failed, "lastFailure": last}))
}
