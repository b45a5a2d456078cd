//! Sockets inside pods: the in-pod listeners, the connections other pods' traffic leaves by, and the connections that
//! impersonate a client towards the application.

use std::{
    io,
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::Range,
    os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd},
    time::Duration,
};

use mesh_common::TRANSPARENT_MARK;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    io::Interest,
    net::{TcpListener, TcpSocket, TcpStream},
};

use super::netns::Netns;

/// Pending connections a listener holds; the kernel bounds it by `net.core.somaxconn` of the pod.
const BACKLOG: i32 = 4096;
/// Keepalive of every connection: a peer that vanished is noticed after 180 s + 9 x 180 s, as ztunnel's.
const KEEPALIVE: Duration = Duration::from_mins(3);
const KEEPALIVE_PROBES: u32 = 9;
/// Bytes a socket of the proxy accepts to send beyond what is under way: what a peer that does not read makes the kernel hold.
const UNSENT: u32 = 128 * 1024;
/// Bytes a socket of the proxy has the kernel receive ahead of it, from a peer on this node, for which that is many round trips. Left to
/// itself the kernel goes to `tcp_rmem`'s most, and all of that stays when the proxy may read no more because its other end does not.
const AHEAD: usize = 128 * 1024;
/// Bytes such a socket keeps of what it sends until the other end has taken it. A peer that opened its window wide and then does not read
/// would have the kernel hold `tcp_wmem`'s most.
const UNTAKEN: usize = 192 * 1024;
/// `IP_BIND_ADDRESS_NO_PORT`: binding an address leaves the choice of port to `connect`, which knows the four-tuple.
const IP_BIND_ADDRESS_NO_PORT: libc::c_int = 24;
/// `IPV6_TRANSPARENT` and `IP_TRANSPARENT`.
const IPV6_TRANSPARENT: libc::c_int = 75;
const IP_TRANSPARENT: libc::c_int = 19;

/// An error once more, for who is told of it as well: errors of the system cannot be cloned.
pub fn same_error(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

/// Listens on `port` of every address of the namespace, both families, or IPv4 alone where the kernel has no IPv6.
///
/// `SO_REUSEPORT` lets a new process listen before the old one has stopped.
pub fn listen(netns: &Netns, port: u16) -> io::Result<TcpListener> {
    TcpListener::from_std(listen_within(netns, port)?.into())
}

/// Listens as [`listen`] does, for programs of the pod itself.
pub fn listen_locally(netns: &Netns, port: u16) -> io::Result<TcpListener> {
    let socket = listen_within(netns, port)?;
    // Before any window is told: connections have it from here.
    bound(&socket)?;
    TcpListener::from_std(socket.into())
}

/// Bounds what the kernel holds of a connection within the node.
fn bound(socket: &Socket) -> io::Result<()> {
    socket.set_recv_buffer_size(AHEAD)?;
    socket.set_send_buffer_size(UNTAKEN)
}

fn listen_within(netns: &Netns, port: u16) -> io::Result<Socket> {
    netns.enter(|| match listening(Domain::IPV6, (Ipv6Addr::UNSPECIFIED, port).into()) {
        Err(error) if is_no_ipv6(&error) => listening(Domain::IPV4, (Ipv4Addr::UNSPECIFIED, port).into()),
        other => other,
    })?
}

fn is_no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn listening(domain: Domain, address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    // Connections it accepts have this from it.
    tune(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Whom a connection comes from, as its other end sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The pod's own address, chosen by the kernel.
    Own,
    /// This address, whoever it belongs to. Needs the pod's transparent routing.
    Client(IpAddr),
    /// The same, of a pod of this node, which may be connected to the same application directly: from a port of [`NEIGHBOUR_PORTS`].
    Neighbour(IpAddr),
    /// The same, of one outside the mesh, whose own connections come to the pod from ports of its choice: from one of [`NEIGHBOUR_PORTS`] too,
    /// as long as there is one. From a port that the client then picks for another connection, that would meet this one.
    Outsider(IpAddr),
}

impl Source {
    /// Whom is impersonated.
    pub fn client(self) -> Option<IpAddr> {
        match self {
            Self::Own => None,
            Self::Client(client) | Self::Neighbour(client) | Self::Outsider(client) => Some(client),
        }
    }
}

/// Ports no pod's own connections come from, unless it changes `net.ipv4.ip_local_port_range`: above the range that new network
/// namespaces begin with. At most so many connections there are through the proxy from one pod to one port of another of its node.
pub const NEIGHBOUR_PORTS: Range<u16> = 61_000..65_535;
/// How many of them are tried; of one outside the mesh, which may have more connections than there are such ports.
const TRIES: usize = 32;
const OUTSIDER_TRIES: usize = 8;

/// Connects from inside a namespace. The timeout is the caller's.
pub async fn connect(netns: &Netns, to: SocketAddr, source: Source) -> io::Result<TcpStream> {
    connect_with(netns, to, source, false).await
}

/// Connects as [`connect`] does, to a program of the pod itself.
pub async fn connect_locally(netns: &Netns, to: SocketAddr, source: Source) -> io::Result<TcpStream> {
    connect_with(netns, to, source, true).await
}

async fn connect_with(netns: &Netns, to: SocketAddr, source: Source, local: bool) -> io::Result<TcpStream> {
    let mut tries = 0;
    loop {
        let connected = connect_once(netns, to, source, local).await;
        tries += 1;
        match (connected, source) {
            (Err(error), Source::Neighbour(_)) if is_taken(&error) && tries < TRIES => {}
            (Err(error), Source::Outsider(_)) if is_taken(&error) && tries < OUTSIDER_TRIES => {}
            // Any port is better than none.
            (Err(error), Source::Outsider(client)) if is_taken(&error) => {
                return connect_once(netns, to, Source::Client(client), local).await;
            }
            (other, _) => return other,
        }
    }
}

/// Whether another port may do.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

async fn connect_once(netns: &Netns, to: SocketAddr, source: Source, local: bool) -> io::Result<TcpStream> {
    let socket = netns.enter(|| connecting(to, source))??;
    if local {
        bound(&socket)?;
        // The connect hook lets it past the pod's steering.
        socket.set_mark(TRANSPARENT_MARK)?;
    }
    // SAFETY: the descriptor is a socket we own and give away.
    let socket = unsafe { TcpSocket::from_raw_fd(socket.into_raw_fd()) };
    tune(&socket)?;
    socket.connect(to).await
}

fn connecting(to: SocketAddr, source: Source) -> io::Result<Socket> {
    let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    // Its own address, or the pod talking to itself through a service: no impersonation.
    let Some(client) = source.client().filter(|client| *client != to.ip()) else { return Ok(socket) };
    socket.set_mark(TRANSPARENT_MARK)?;
    let (level, option) = if to.is_ipv4() { (libc::SOL_IP, IP_TRANSPARENT) } else { (libc::SOL_IPV6, IPV6_TRANSPARENT) };
    set_option(&socket, level, option)?;
    let port = if matches!(source, Source::Neighbour(_) | Source::Outsider(_)) {
        // Many connections share a port, to different places.
        socket.set_reuse_address(true)?;
        fastrand::u16(NEIGHBOUR_PORTS)
    } else {
        set_option(&socket, libc::SOL_IP, IP_BIND_ADDRESS_NO_PORT)?;
        0
    };
    socket.bind(&SocketAddr::new(client, port).into())?;
    Ok(socket)
}

fn set_option(socket: &Socket, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    let len = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or(4);
    // SAFETY: a valid descriptor, and a value of the length given.
    let ret = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), len) };
    if ret == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Settings of every connection of the data path: no Nagle delay on top of the application's own, a bound for what waits to be sent, and
/// keepalive.
fn tune(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(UNSENT)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// Keepalive as configured; what is not given stays as it is.
pub fn keep_alive(stream: &TcpStream, time: Option<Duration>, interval: Option<Duration>, probes: Option<u32>) -> io::Result<()> {
    let keepalive = TcpKeepalive::new().with_time(time.unwrap_or(KEEPALIVE)).with_interval(interval.unwrap_or(KEEPALIVE));
    SockRef::from(stream).set_tcp_keepalive(&keepalive.with_retries(probes.unwrap_or(KEEPALIVE_PROBES)))
}

/// Who is asked what has come in on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// The reactor: costs no system call when it has heard of nothing, and misses what came since it last asked.
    ToReactor,
    ToKernel,
}

/// Whether something has come in, or the other end has closed.
pub fn has_input(stream: &TcpStream, known: Known) -> bool {
    let peek = || SockRef::from(stream).peek(&mut [MaybeUninit::uninit()]);
    let peeked = match known {
        Known::ToReactor => stream.try_io(Interest::READABLE, peek),
        Known::ToKernel => peek(),
    };
    !matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// Makes the close of this connection a reset, whatever is unsent: the other end must not take it for an end of data.
pub fn reset_on_close(stream: &TcpStream) {
    // A socket that is gone already has nothing left to reset.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Makes the close of this connection an end again.
pub fn end_on_close(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(None);
}
