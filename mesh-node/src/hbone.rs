//! HBONE: HTTP/2 CONNECT streams over mutual TLS, one stream per TCP connection. Byte-compatible with Istio's ztunnel.
//!
//! [`headers`] is the pure part; [`client`] and [`pool`] open tunnels, [`server`] accepts them, [`tunnel`] carries the
//! bytes. TLS and sockets are the caller's.

pub mod client;
pub mod headers;
pub mod pool;
pub mod server;
pub mod tunnel;
pub mod windows;

use std::time::Duration;

use tokio::{sync::Notify, time::sleep};

pub use client::{Connection, Leaving, TunnelError, is_sent_away};
pub use pool::{Pool, PoolKey};
pub use tunnel::Tunnel;

/// HTTP/2 settings of both ends.
///
/// A stream's window bounds what a reader that does not read can pile up here: 1 MiB per flow, against ztunnel's 4. The
/// connection's window is not allowed to become the bottleneck: with ztunnel's 16 MiB four stalled readers stop every
/// other stream between the same two pods. With many connections it is narrower ([`windows`]).
pub const STREAM_WINDOW: u32 = 1024 * 1024;
pub const CONNECTION_WINDOW: u32 = 256 * 1024 * 1024;
pub const MAX_FRAME: u32 = 1024 * 1024;
/// What a stream may have queued for sending beyond the peer's window.
pub const SEND_BUFFER: usize = 256 * 1024;
pub const CLIENT_HEADER_LIST: u32 = 16 * 1024;
pub const SERVER_HEADER_LIST: u32 = 64 * 1024;
pub const SERVER_MAX_STREAMS: u32 = 200;
/// Streams of one pooled connection before another is opened.
pub const POOL_STREAMS: usize = 100;
/// How long a pooled connection without streams is kept.
pub const IDLE_RELEASE: Duration = Duration::from_mins(5);
/// An HTTP/2 PING goes out this often, and its answer must come within the timeout.
pub const PING_INTERVAL: Duration = Duration::from_secs(10);
pub const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// The same of one that may be gone.
pub const DOUBTED_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the TLS and HTTP/2 handshakes of a peer may take.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Streams reset by one end whose late frames are put up with, and for how long. The library's defaults (50, and 1,024 late
/// frames in a connection's life) would end a connection that others share when many of its streams are cut at once.
pub const RESET_STREAMS: usize = 4096;
pub const RESET_MEMORY: Duration = Duration::from_secs(10);
/// Streams that a peer may have reset here by breaking the protocol, late frames included, in a connection's life; beyond that it is told
/// to calm down and goes. Their resets wait for a peer that does not read.
pub const ERROR_RESETS: usize = 65_536;

/// Sends PINGs until one is not answered in time. `doubted`: woken when the peer may be gone; it is asked at once then, and has less time.
async fn keepalive(mut ping_pong: h2::PingPong, doubted: &Notify) {
    loop {
        let is_doubted = tokio::select! {
            () = sleep(PING_INTERVAL) => false,
            () = doubted.notified() => true,
        };
        let late = async {
            let is_doubted = is_doubted
                || tokio::select! {
                    () = sleep(PING_TIMEOUT) => false,
                    () = doubted.notified() => true,
                };
            if is_doubted {
                sleep(DOUBTED_TIMEOUT).await;
            }
        };
        tokio::select! {
            biased;
            answered = ping_pong.ping(h2::Ping::opaque()) => if answered.is_err() {
                // The connection itself has ended; whoever drives it reports why.
                std::future::pending::<()>().await;
            },
            () = late => return,
        }
    }
}

#[cfg(test)]
mod tests;
