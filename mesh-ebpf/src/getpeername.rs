//! `cgroup/getpeername4` and `getpeername6`: an application that asks whom it is connected to sees whom it dialled.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use mesh_common::{Address, maps::SocketMark};

use crate::connect::{set_user_address6, storage};

/// The only value these hooks may return.
const PROCEED: i32 = 1;

#[cgroup_sock_addr(getpeername4)]
pub fn mesh_getpeername4(ctx: SockAddrContext) -> i32 {
    if let Some(dst) = orig_dst(&ctx) {
        let v4 = [dst.ip[12], dst.ip[13], dst.ip[14], dst.ip[15]];
        // SAFETY: user_ip4 and user_port are writable for getpeername4.
        unsafe {
            (*ctx.sock_addr).user_ip4 = u32::from_ne_bytes(v4);
            (*ctx.sock_addr).user_port = u32::from(u16::from_ne_bytes(dst.port));
        }
    }
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
pub fn mesh_getpeername6(ctx: SockAddrContext) -> i32 {
    if let Some(dst) = orig_dst(&ctx) {
        set_user_address6(&ctx, &dst);
    }
    PROCEED
}

/// Where the socket was going before capture.
#[inline(always)]
fn orig_dst(ctx: &SockAddrContext) -> Option<Address> {
    let mark = storage(ctx.sock_addr, 0);
    if mark.is_null() {
        return None;
    }
    // SAFETY: non-null storage, valid while the socket is.
    let mark = unsafe { *mark };
    (mark.kind == SocketMark::CAPTURED || mark.kind == SocketMark::DIRECT).then_some(mark.orig_dst)
}
