//! Single TCP sockets by way of `sock_diag` netlink: what they have counted, and their end. In the network namespace of the
//! thread.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
/// The kernel's number of the attribute with `struct tcp_info`.
const INET_DIAG_INFO: u16 = 2;
/// Where `struct tcp_info` has what was acknowledged and what has come, bytes.
const ACKED: usize = 120;
const RECEIVED: usize = 128;
const HEADER: usize = 16;
/// Of `struct inet_diag_req_v2`, and of `struct inet_diag_msg`.
const REQUEST: usize = 56;
const MESSAGE: usize = 72;
/// Where the latter has the cookie.
const COOKIE: usize = 44;
const TCP_LISTEN: u8 = 10;

/// Ends a connection; the other end sees a reset. One that is not there is an error of kind `NotFound`.
///
/// Without a cookie it is asked for first: the kernel takes a listener for want of a connection, and would end that.
pub fn destroy(local: SocketAddr, remote: SocketAddr, cookie: Option<u64>) -> io::Result<()> {
    let cookie = match cookie {
        Some(cookie) => Some(cookie),
        None => Some(connection(local, remote)?),
    };
    ask(SOCK_DESTROY, NLM_F_ACK, 0, (local, remote), cookie).map(drop)
}

/// The cookie of a connection, which is no listener.
pub fn connection(local: SocketAddr, remote: SocketAddr) -> io::Result<u64> {
    let answer = ask(SOCK_DIAG_BY_FAMILY, 0, 0, (local, remote), None)?;
    let message = answer.get(HEADER..HEADER + MESSAGE).ok_or(io::ErrorKind::InvalidData)?;
    let (state, port) = (message[1], &message[6..8]);
    if state == TCP_LISTEN || port != remote.port().to_be_bytes() {
        return Err(io::ErrorKind::NotFound.into());
    }
    message[COOKIE..COOKIE + 8].try_into().map(u64::from_ne_bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Bytes acknowledged and received on a connection.
pub fn traffic(local: SocketAddr, remote: SocketAddr, cookie: Option<u64>) -> io::Result<(u64, u64)> {
    let answer = ask(SOCK_DIAG_BY_FAMILY, 0, 1 << (INET_DIAG_INFO - 1), (local, remote), cookie)?;
    let info = attribute(answer.get(HEADER + MESSAGE..).unwrap_or_default(), INET_DIAG_INFO);
    let number = |at: usize| info.and_then(|i| i.get(at..at + 8)?.try_into().ok()).map(u64::from_ne_bytes);
    number(ACKED).zip(number(RECEIVED)).ok_or_else(|| io::Error::other("the kernel did not say what the connection has carried"))
}

fn ask(kind: u16, flags: u16, wanted: u8, (local, remote): (SocketAddr, SocketAddr), cookie: Option<u64>) -> io::Result<Vec<u8>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    let mut message = Vec::with_capacity(HEADER + REQUEST);
    message.extend(u32::try_from(HEADER + REQUEST).unwrap_or_default().to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    message.extend([0; 8]);
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    message.extend([family.to_le_bytes()[0], libc::IPPROTO_TCP.to_le_bytes()[0], wanted, 0]);
    message.extend(u32::MAX.to_ne_bytes());
    message.extend(local.port().to_be_bytes());
    message.extend(remote.port().to_be_bytes());
    message.extend(octets(local.ip()));
    message.extend(octets(remote.ip()));
    message.extend([0; 4]);
    message.extend(cookie.unwrap_or(u64::MAX).to_ne_bytes());
    socket.send(&message, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let number = |at: usize| answer.get(at..at + 4)?.try_into().ok().map(i32::from_ne_bytes);
    if answer.get(4..6) != Some(NLMSG_ERROR.to_ne_bytes().as_slice()) {
        return Ok(answer);
    }
    match number(HEADER) {
        Some(0) => Ok(answer),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// An address as the kernel's tables of sockets have it: of IPv4 the first four bytes.
pub(super) fn octets(ip: IpAddr) -> [u8; 16] {
    let mut bytes = [0; 16];
    match ip {
        IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes = v6.octets(),
    }
    bytes
}

/// The payload of the first attribute of a kind.
fn attribute(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let number = |at: usize| bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes);
        let (length, found) = (usize::from(number(0)?), number(2)?);
        if found == kind {
            return bytes.get(4..length);
        }
        // Each begins at a multiple of four; a length shorter than its own header would never end.
        bytes = bytes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        os::fd::AsRawFd,
    };

    use super::*;

    fn cookie(stream: &TcpStream) -> u64 {
        let (mut cookie, mut length) = (0_u64, 8);
        // SAFETY: a valid descriptor, and a buffer of the length given.
        let ret =
            unsafe { libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_COOKIE, (&raw mut cookie).cast(), &raw mut length) };
        assert_eq!(ret, 0);
        cookie
    }

    #[test]
    fn a_connection_tells_what_it_carried_and_is_ended_but_no_other_with_its_addresses() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).expect("listens");
            let mut client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connects");
            let (mut server, _) = listener.accept().expect("accepts");
            client.write_all(b"hello").expect("sends");
            server.read_exact(&mut [0; 5]).expect("receives");
            let (local, remote) = (client.local_addr().expect("an address"), client.peer_addr().expect("an address"));
            let own = cookie(&client);
            let (acked, received) = traffic(local, remote, Some(own)).expect("there");
            assert_eq!((acked, received), (6, 0), "the SYN counts too");
            let other = destroy(local, remote, Some(own + 1)).expect_err("another socket").kind();
            assert_ne!(other, io::ErrorKind::PermissionDenied);
            client.write_all(b"!").expect("still there");
            destroy(local, remote, Some(own)).expect("ended");
            assert!(client.write_all(b"!").is_err());
            server.read_exact(&mut [0]).ok();
            // The listener is not taken for what is gone.
            assert_eq!(destroy(remote, local, None).expect_err("gone").kind(), io::ErrorKind::NotFound);
            let again = TcpStream::connect(remote).expect("still listening");
            let (mut accepted, _) = listener.accept().expect("still accepting");
            destroy(remote, again.local_addr().expect("an address"), None).expect("found by its addresses");
            assert!(accepted.write_all(b"!").is_err());
            assert_eq!(server.read(&mut [0]).expect_err("reset").kind(), io::ErrorKind::ConnectionReset);
            assert_eq!(traffic(local, remote, Some(own)).expect_err("gone").kind(), io::ErrorKind::NotFound);
        }
    }
}
