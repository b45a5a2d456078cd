//! Routing inside a pod's network namespace that lets the proxy speak with the client's address.
//!
//! Replies of the application to an impersonated client carry the mark of the proxy's socket
//! (`net.ipv4.tcp_fwmark_accept`, both families in spite of its name), and so do the answers of the pod's kernel where no application
//! listens (`fwmark_reflect` of both families), without which a closed port would look like a lost packet; a rule sends marked packets to a
//! table that delivers everything locally. Done over netlink; no binary is called.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use mesh_common::{SPREAD_V4, SPREAD_V6, TRANSPARENT_MARK, TRANSPARENT_RULE_PRIORITY, TRANSPARENT_TABLE, maps::Pod};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::{
    ifaddrs::{InterfaceAddress, getifaddrs},
    net::if_::if_nametoindex,
};

use super::CaptureError;
use crate::io::netns::Netns;

/// Index of the loopback device: the first one of every network namespace.
const LOOPBACK: u32 = 1;
/// What has replies marked as what they reply to; off in every new namespace.
const MARKED_REPLIES: [&str; 3] =
    ["/proc/sys/net/ipv4/tcp_fwmark_accept", "/proc/sys/net/ipv4/fwmark_reflect", "/proc/sys/net/ipv6/fwmark_reflect"];
/// Whether a connection may have the addresses of one that ended a second ago, where timestamps tell the two apart (RFC 6191): without it
/// a pod that is called thousands of times a second runs out of ports to be called from.
const TIME_WAIT_REUSE: &str = "/proc/sys/net/ipv4/tcp_tw_reuse";
/// The kernel's default: on loopback only.
const REUSE_DEFAULT: &str = "2";

/// Sets a namespace up for impersonation, and routes what captured connections of the pod with these addresses are aimed at; of which
/// families ([`Pod::spread`]). Doing it again changes nothing.
pub fn prepare(netns: &Netns, addresses: &[IpAddr]) -> Result<u8, CaptureError> {
    in_netns(netns, "prepare the routing of a pod", |netlink| {
        mark_replies("1")?;
        if fs::read_to_string(TIME_WAIT_REUSE)?.trim() == REUSE_DEFAULT {
            fs::write(TIME_WAIT_REUSE, "1")?;
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let added = netlink.request(RouteNetlinkMessage::NewRule(rule(family)), NLM_F_CREATE | NLM_F_EXCL);
            match added.and_then(|()| netlink.request(RouteNetlinkMessage::NewRoute(route(family)), NLM_F_CREATE | NLM_F_REPLACE)) {
                Err(error) if family == AddressFamily::Inet6 && is_no_ipv6(&error) => {}
                other => other?,
            }
        }
        Ok(spread(netlink, addresses).unwrap_or_else(|error| {
            tracing::warn!(target: "capture", %error, "a pod's connections share one range of local ports");
            0
        }))
    })
}

/// Routes the addresses that destinations are aimed at from the pod's own, as far as a device has that: as the kernel does with the
/// addresses of a device, so that sockets bound to the device find them, and by loopback, for when the device has gone down and come back.
fn spread(netlink: &mut Netlink, addresses: &[IpAddr]) -> io::Result<u8> {
    let mut spread = 0;
    for (of_v4, family) in [(true, Pod::V4), (false, Pod::V6)] {
        let Some(own) = addresses.iter().copied().find(|a| a.is_ipv4() == of_v4) else { continue };
        let Some(device) = device_of(own)? else { continue };
        if !of_v4 {
            netlink.request(RouteNetlinkMessage::NewRule(aimed_rule()), NLM_F_CREATE | NLM_F_EXCL)?;
        }
        for (metric, device) in [(AIMED_METRICS[0], device), (AIMED_METRICS[1], LOOPBACK)] {
            let route = RouteNetlinkMessage::NewRoute(aimed(own, device, metric));
            netlink.request(route, NLM_F_CREATE | NLM_F_REPLACE)?;
        }
        spread |= family;
    }
    Ok(spread)
}

/// The index of the device that has an address.
fn device_of(address: IpAddr) -> io::Result<Option<u32>> {
    let has = |i: &InterfaceAddress| {
        let storage = i.address.as_ref();
        let v4 = storage.and_then(|s| s.as_sockaddr_in()).map(|s| IpAddr::V4(s.ip()));
        v4.or_else(|| storage.and_then(|s| s.as_sockaddr_in6()).map(|s| IpAddr::V6(s.ip()))) == Some(address)
    };
    let found = getifaddrs()?.find(has);
    Ok(found.map(|i| if_nametoindex(i.interface_name.as_str())).transpose()?)
}

/// The addresses of a namespace's devices that are not loopback ones; of a namespace with more than so many, the first.
pub fn local_addresses(netns: &Netns, most: usize) -> io::Result<Vec<IpAddr>> {
    netns.enter(|| Netlink::open()?.addresses(most))?
}

fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let of = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Local(ip) | AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    };
    // A peer's address stands before its own.
    let local = message.attributes.iter().find(|attribute| matches!(attribute, AddressAttribute::Local(_)));
    local.or_else(|| message.attributes.iter().find(|attribute| of(attribute).is_some())).and_then(of)
}

/// Undoes [`prepare`]; a namespace that was never prepared is left alone.
pub fn remove(netns: &Netns) -> Result<(), CaptureError> {
    in_netns(netns, "remove the routing of a pod", |netlink| {
        let mut ours = false;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            ours |= netlink.request(RouteNetlinkMessage::DelRule(rule(family)), 0).is_ok();
            let _ = netlink.request(RouteNetlinkMessage::DelRoute(route(family)), 0);
            let own = if family == AddressFamily::Inet { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
            for metric in AIMED_METRICS {
                let _ = netlink.request(RouteNetlinkMessage::DelRoute(aimed(own, 0, metric)), 0);
            }
        }
        let _ = netlink.request(RouteNetlinkMessage::DelRule(aimed_rule()), 0);
        if !ours {
            return Ok(());
        }
        if fs::read_to_string(TIME_WAIT_REUSE)?.trim() == "1" {
            fs::write(TIME_WAIT_REUSE, REUSE_DEFAULT)?;
        }
        mark_replies("0")
    })
}

/// The files show the namespace of the thread that opens them; a kernel without IPv6 has none of its.
fn mark_replies(on: &str) -> io::Result<()> {
    MARKED_REPLIES.iter().try_for_each(|path| match fs::write(path, on) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.contains("/ipv6/") => Ok(()),
        other => other,
    })
}

/// Whether a namespace has a way out for the family of `like`. Asks by connecting a datagram socket to a documentation
/// address, which sends nothing.
pub fn has_route(netns: &Netns, like: IpAddr) -> bool {
    let (any, out): (SocketAddr, SocketAddr) = match like {
        IpAddr::V4(_) => ((Ipv4Addr::UNSPECIFIED, 0).into(), (Ipv4Addr::new(192, 0, 2, 1), 9).into()),
        IpAddr::V6(_) => ((Ipv6Addr::UNSPECIFIED, 0).into(), (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 9).into()),
    };
    netns.enter(|| UdpSocket::bind(any).and_then(|s| s.connect(out))).is_ok_and(|connected| connected.is_ok())
}

fn in_netns<T>(netns: &Netns, what: &str, f: impl FnOnce(&mut Netlink) -> io::Result<T>) -> Result<T, CaptureError> {
    let done = netns.enter(|| Netlink::open().and_then(|mut netlink| f(&mut netlink)));
    done.and_then(|r| r).map_err(CaptureError::io(what))
}

fn is_no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::ENODEV | libc::EACCES))
}

fn rule(family: AddressFamily) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(TRANSPARENT_RULE_PRIORITY),
        RuleAttribute::FwMark(TRANSPARENT_MARK),
        RuleAttribute::FwMask(u32::MAX),
        RuleAttribute::Table(TRANSPARENT_TABLE),
    ];
    message
}

fn route(family: AddressFamily) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family,
        table: RouteHeader::RT_TABLE_UNSPEC,
        protocol: RouteProtocol::Static,
        scope: RouteScope::Host,
        kind: RouteType::Local,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Table(TRANSPARENT_TABLE), RouteAttribute::Oif(LOOPBACK)];
    message
}

/// The table of addresses that are this namespace's own, and that of what is aimed at in IPv6.
const LOCAL_TABLE: u32 = 255;
const AIMED_TABLE: u32 = 28_015;
/// Priorities of the two routes to what captured connections are aimed at.
const AIMED_METRICS: [u32; 2] = [28_014, 28_015];

/// Leads what the pod itself sends, and nothing that comes from elsewhere, to the routes of IPv6. Those of IPv4 have to be with the kernel's
/// own for loopback, of which it takes nothing from elsewhere.
fn aimed_rule() -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.action = RuleAction::ToTable;
    message.header.dst_len = 64;
    message.attributes = vec![
        RuleAttribute::Priority(TRANSPARENT_RULE_PRIORITY + 1),
        RuleAttribute::Iifname("lo".to_owned()),
        RuleAttribute::Destination(Ipv6Addr::from_bits(u128::from(u64::from_be_bytes(SPREAD_V6)) << 64).into()),
        RuleAttribute::Table(AIMED_TABLE),
    ];
    message
}

/// One of them; by no device, whichever it is.
fn aimed(own: IpAddr, device: u32, metric: u32) -> RouteMessage {
    let (prefix, length): (IpAddr, u8) = match own {
        IpAddr::V4(_) => (Ipv4Addr::new(SPREAD_V4[0], SPREAD_V4[1], 0, 0).into(), 16),
        IpAddr::V6(_) => (Ipv6Addr::from_bits(u128::from(u64::from_be_bytes(SPREAD_V6)) << 64).into(), 64),
    };
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: if own.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 },
        destination_prefix_length: length,
        table: RouteHeader::RT_TABLE_UNSPEC,
        protocol: RouteProtocol::Static,
        scope: RouteScope::Host,
        kind: RouteType::Local,
        ..RouteHeader::default()
    };
    let address = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    };
    let table = if own.is_ipv4() { LOCAL_TABLE } else { AIMED_TABLE };
    message.attributes = vec![RouteAttribute::Destination(address(prefix)), RouteAttribute::Priority(metric), RouteAttribute::Table(table)];
    if !own.is_unspecified() {
        message.attributes.push(RouteAttribute::PrefSource(address(own)));
    }
    if device != 0 {
        message.attributes.push(RouteAttribute::Oif(device));
    }
    message
}

/// A netlink socket of the thread's current network namespace.
struct Netlink(Socket);

impl Netlink {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// As many addresses as are wanted, without those of loopback. What more there are is not read.
    fn addresses(&mut self, most: usize) -> io::Result<Vec<IpAddr>> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(RouteNetlinkMessage::GetAddress(AddressMessage::default())));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let mut found = Vec::new();
        loop {
            let (answer, _) = self.0.recv_from_full()?;
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
                let length = usize::try_from(message.header.length).unwrap_or(usize::MAX).next_multiple_of(4);
                rest = rest.get(length.max(1)..).unwrap_or_default();
                match message.payload {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message)) => {
                        found.extend(address_of(&message).filter(|ip| !ip.is_loopback()));
                        if found.len() >= most {
                            return Ok(found);
                        }
                    }
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }

    /// Sends one request and waits for its acknowledgement. What exists already is fine.
    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let (answer, _) = self.0.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
        match answer.payload {
            NetlinkPayload::Error(error) => match error.code {
                None => Ok(()),
                Some(code) if code.get() == -libc::EEXIST => Ok(()),
                Some(_) => Err(error.to_io()),
            },
            other => Err(io::Error::other(format!("unexpected netlink answer: {other:?}"))),
        }
    }
}
