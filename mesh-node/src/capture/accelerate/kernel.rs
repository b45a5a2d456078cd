//! What acceleration asks of the kernel: where its structures have their fields, and what of sockets.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use mesh_common::accelerate::{KernelLayout, PairReply, PairRequest, Way};

use super::Pair;
use crate::{
    capture::{btf::Btf, diag::octets, sys},
    io::netns::Netns,
};

const BTF: &str = "/sys/kernel/btf/vmlinux";

/// Where the fields are that the programs read.
pub fn kernel_layout() -> Result<KernelLayout, String> {
    let bytes = std::fs::read(BTF).map_err(|e| format!("the kernel's BTF cannot be read ({BTF}: {e})"))?;
    let btf = Btf::parse(&bytes).map_err(|e| format!("the kernel's BTF cannot be used: {e}"))?;
    let unknown = |e: String| format!("this kernel is not known: {e}");
    let at = |structure: &str, path: &[&str]| btf.offset(structure, path).map_err(unknown);
    let zerocopy = btf.enumerator("sock_flags", "SOCK_ZEROCOPY").map_err(unknown)?;
    // Of eight bytes, the half that a bit is in.
    let half = if cfg!(target_endian = "little") { zerocopy / 32 } else { 1 - zerocopy / 32 };
    let (timestamping, size) = btf.field("sock", &["sk_tsflags"]).map_err(unknown)?;
    Ok(KernelLayout {
        rmem_alloc: at("sock", &["sk_backlog", "rmem_alloc", "counter"])?,
        socket: at("sock", &["sk_socket"])?,
        user_data: at("sock", &["sk_user_data"])?,
        file: at("socket", &["file"])?,
        file_flags: at("file", &["f_flags"])?,
        write_seq: at("tcp_sock", &["write_seq"])?,
        copied_seq: at("tcp_sock", &["copied_seq"])?,
        ulp: at("inet_connection_sock", &["icsk_ulp_ops"])?,
        flags: at("sock", &["__sk_common", "skc_flags"])? + 4 * half,
        zerocopy: 1 << (zerocopy % 32),
        timestamping,
        timestamping_mask: if size < 4 && cfg!(target_endian = "little") { (1 << (8 * size)) - 1 } else { u32::MAX },
        references: at("sk_psock", &["refcnt", "refs", "counter"])?,
        queue: at("sk_psock", &["ingress_msg", "next"])?,
        peek_off: at("sock", &["sk_peek_off"])?,
        io_uring: btf.offset("task_struct", &["io_uring"]).unwrap_or(u32::MAX),
        task_flags: at("task_struct", &["flags"])?,
        receive_low_water: at("sock", &["sk_rcvlowat"])?,
    })
}

/// One socket, found by its addresses.
#[derive(Debug, Clone)]
pub struct Place {
    pub netns: Arc<Netns>,
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

/// The kernel side.
#[derive(Debug)]
pub struct Kernel {
    pub pair: OwnedFd,
    /// An iterator over TCP sockets.
    pub wake: OwnedFd,
    pub sockets: OwnedFd,
    /// Counts what applications receive, for as long as this is open.
    pub _received: OwnedFd,
}

impl Kernel {
    pub fn ask(&self, place: &Place, request: PairRequest) -> io::Result<PairReply> {
        let family = if place.local.is_ipv4() { 4 } else { 6 };
        let request = PairRequest {
            family,
            remote_ip: octets(place.remote.ip()),
            local_ip: octets(place.local.ip()),
            remote_port: place.remote.port().to_be_bytes(),
            local_port: place.local.port().to_be_bytes(),
            ..request
        };
        place.netns.enter(|| sys::test_run(self.pair.as_fd(), &request))?
    }

    pub fn look(&self, place: &Place) -> io::Result<PairReply> {
        self.ask(place, PairRequest { ask: PairRequest::LOOK, ..PairRequest::default() })
    }

    /// Enters both sockets of a pair and gives each the other; whether there was room.
    pub fn join(&self, id: u64, pair: &Pair) -> io::Result<bool> {
        let (key, peer) = (id * 2, id * 2 + 1);
        let flow = pair.flow;
        let enter =
            |key, peer| PairRequest { ask: PairRequest::ENTER, key, peer, flow, server: u32::from(key > peer), ..PairRequest::default() };
        let join = |peer_socket| PairRequest { ask: PairRequest::JOIN, peer_socket, ..PairRequest::default() };
        let (one, other) = (self.ask(&pair.one, enter(key, peer))?, self.ask(&pair.other, enter(peer, key))?);
        if one.problem != 0 || other.problem != 0 {
            return Ok(false);
        }
        let (one, other) = (self.ask(&pair.one, join(other.socket))?, self.ask(&pair.other, join(one.socket))?);
        Ok(one.problem == 0 && other.problem == 0)
    }

    /// Whether of a pair that was joined nothing is unread that came by TCP. Of each direction the reader is looked at first: what it has
    /// taken by then was all there was when the sender is looked at.
    pub fn is_settled(&self, pair: &Pair) -> io::Result<bool> {
        let (first, one, last) = (self.look(&pair.other)?, self.look(&pair.one)?, self.look(&pair.other)?);
        // One in the midst of sending may have been told to do so by TCP.
        let is_all = |sender: PairReply, reader: PairReply| {
            sender.references <= 1 && (sender.way == Way::REDIRECT || sender.write_seq == reader.copied_seq)
        };
        Ok(is_all(one, first) && is_all(last, one))
    }

    /// Has the owners of these look again whether there is something to read. Goes through all sockets the kernel has, once for each network
    /// namespace: milliseconds.
    pub fn wake(&self, places: &[Place]) -> io::Result<()> {
        let mut namespaces: Vec<&Arc<Netns>> = Vec::new();
        for place in places {
            self.ask(place, PairRequest { ask: PairRequest::WAKE, ..PairRequest::default() })?;
            if namespaces.iter().all(|netns| netns.inode() != place.netns.inode()) {
                namespaces.push(&place.netns);
            }
        }
        namespaces.into_iter().try_for_each(|netns| netns.enter(|| sys::iterate(self.wake.as_fd()))?)
    }

    pub fn remove(&self, key: u64) {
        // Gone already when the socket is.
        let _ = sys::delete(self.sockets.as_fd(), &key.to_ne_bytes());
    }
}
