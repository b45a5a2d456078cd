//! Why a connection did not go through, by stage. Every variant must say its reason, flag and whether another attempt
//! may help: there is no default.

use std::{io, net::SocketAddr, sync::Arc};

use super::{live::Cut, outcome::Direction};
use crate::{
    hbone::{TunnelError, headers::BadRequest, tunnel},
    id::ObjectName,
    io::relay::{Broken, Side},
    policy::Denial,
    telemetry::{Flag, Flags, chain},
    tls::HandshakeFailure,
};

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("the original destination is not known")]
    LostOriginalDestination,
    #[error("port {0} belongs to the mesh itself")]
    ReservedPort(u16),
    #[error("service {service} has no port {port}")]
    NoSuchPort { service: ObjectName, port: u16 },
    #[error("service {0} has no usable endpoint")]
    NoEndpoint(ObjectName),
    #[error("{0} names no service and port that this pod is an endpoint of")]
    UnknownHost(String),
    #[error("no rule about TLS of service {0} takes the server name")]
    NoRoute(ObjectName),
    #[error("{0} is no endpoint any more")]
    EndpointLeft(SocketAddr),
    #[error("the pod has as many connections to service {0} as its DestinationRule allows")]
    Overflow(ObjectName),
    #[error("{0} is not part of the mesh and outbound traffic is REGISTRY_ONLY")]
    NotInRegistry(SocketAddr),
    #[error("too many connections are open on this node")]
    TooManyConnections,
    #[error("the pod is not part of the configuration yet")]
    UnknownWorkload,
    #[error("the destination pod on this node is not captured yet")]
    NotServedYet,
    #[error("no identity: {0}")]
    Identity(Arc<str>),
    #[error("connecting to {to} failed")]
    Dial { to: SocketAddr, source: io::Error },
    #[error("connecting to the mesh peer {to} failed")]
    DialPeer { to: SocketAddr, source: io::Error },
    #[error("connecting to {0} took too long")]
    DialTimeout(SocketAddr),
    #[error("the TLS handshake failed")]
    Tls { kind: HandshakeFailure, source: io::Error },
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    #[error("connection closed due to policy rejection: {}", .0.reason())]
    Denied(Denial),
    #[error(transparent)]
    BadRequest(#[from] BadRequest),
    #[error("authority {0} is not this pod")]
    ForeignAuthority(String),
    #[error("the application at {to} cannot be reached")]
    Application { to: SocketAddr, source: io::Error },
    #[error("the connection broke")]
    Broken(#[source] io::Error),
    /// Once it was open.
    #[error("the upstream reset the connection")]
    UpstreamReset(#[source] io::Error),
    #[error("{0}")]
    Cut(Cut),
}

/// How a connection ended, as Envoy's TCP proxy tells it.
#[derive(Debug, Default)]
pub struct Ended {
    pub flags: Flags,
    /// Why there is no connection to where it goes.
    pub unconnected: Option<String>,
    /// Why it was ended here, or not let in.
    pub closed: Option<String>,
}

impl From<Denial> for Failure {
    fn from(denial: Denial) -> Self {
        Self::Denied(denial)
    }
}

impl Failure {
    /// The metric label value.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::LostOriginalDestination => "lost_original_destination",
            Self::ReservedPort(_) => "reserved_port",
            Self::NoSuchPort { .. } => "no_such_port",
            Self::NoEndpoint(_) | Self::UnknownHost(_) => "no_endpoint",
            Self::NoRoute(_) => "no_route",
            Self::EndpointLeft(_) => "endpoint_left",
            Self::Overflow(_) => "overflow",
            Self::NotInRegistry(_) => "not_in_registry",
            Self::TooManyConnections => "too_many_connections",
            Self::UnknownWorkload => "unknown_workload",
            Self::NotServedYet => "not_served_yet",
            Self::Identity(_) => "identity",
            Self::Dial { .. } | Self::DialPeer { .. } => "connect",
            Self::DialTimeout(_) => "connect_timeout",
            Self::Tls { .. } => "tls",
            Self::Tunnel(TunnelError::Refused(::http::StatusCode::UNAUTHORIZED)) => "denied_by_peer",
            Self::Tunnel(TunnelError::Refused(_)) => "refused_by_peer",
            Self::Tunnel(_) => "tunnel",
            Self::Denied(Denial::PlaintextUnderStrict) => "plaintext_under_strict",
            Self::Denied(Denial::DeniedBy { .. } | Denial::External { .. }) => "denied",
            Self::Denied(Denial::NotAllowed) => "not_allowed",
            Self::BadRequest(_) => "bad_request",
            Self::ForeignAuthority(_) => "foreign_authority",
            Self::Application { .. } => "application",
            Self::Broken(_) | Self::UpstreamReset(_) => "broken",
            Self::Cut(Cut::PolicyChanged) => "policy_changed",
            Self::Cut(Cut::PodGone) => "pod_gone",
            Self::Cut(Cut::LeftTheMesh) => "left_the_mesh",
            Self::Cut(Cut::Shutdown) => "shutdown",
            Self::Cut(Cut::Idle) => "idle",
            Self::Cut(Cut::MaxDuration) => "max_duration",
            Self::Cut(Cut::Revoked) => "revoked",
        }
    }

    /// The `response_flags` value, ztunnel's.
    pub fn response_flag(&self) -> &'static str {
        match self {
            Self::Denied(_) | Self::Cut(Cut::PolicyChanged) | Self::Tunnel(TunnelError::Refused(::http::StatusCode::UNAUTHORIZED)) => {
                "DENY"
            }
            // Hardly anything else keeps a node's port from answering.
            Self::DialPeer { source, .. } if source.kind() == io::ErrorKind::TimedOut => "NETWORK_POLICY",
            Self::Identity(_) => "IDENTITY_ERROR",
            Self::Cut(Cut::Revoked) | Self::Tls { kind: HandshakeFailure::Revoked, .. } => "CERT_REVOKED",
            Self::Tls { .. } => "TLS_FAILURE",
            Self::Tunnel(TunnelError::Handshake(_) | TunnelError::HandshakeTimeout) => "H2_HANDSHAKE_FAILURE",
            Self::Dial { .. }
            | Self::DialPeer { .. }
            | Self::DialTimeout(_)
            | Self::Application { .. }
            | Self::NoEndpoint(_)
            | Self::UnknownHost(_)
            | Self::NoRoute(_)
            | Self::EndpointLeft(_)
            | Self::NoSuchPort { .. }
            | Self::NotInRegistry(_)
            | Self::Overflow(_)
            | Self::NotServedYet
            | Self::TooManyConnections
            | Self::UnknownWorkload
            | Self::Tunnel(TunnelError::Closing(_) | TunnelError::Request(_) | TunnelError::Refused(_) | TunnelError::ResponseTimeout) => {
                "CONNECT"
            }
            Self::LostOriginalDestination
            | Self::ReservedPort(_)
            | Self::BadRequest(_)
            | Self::ForeignAuthority(_)
            | Self::Broken(_)
            | Self::UpstreamReset(_)
            | Self::Cut(Cut::PodGone | Cut::LeftTheMesh | Cut::Shutdown | Cut::Idle | Cut::MaxDuration) => "-",
        }
    }

    /// How Envoy's TCP proxy tells of it in an access log.
    pub fn told(&self, direction: Direction) -> Ended {
        let connecting = |why: String| Ended {
            flags: Flags::of(&[Flag::UpstreamConnectionFailure, Flag::RetriesExhausted]),
            unconnected: Some(why),
            closed: None,
        };
        let flagged = |flag: Flag| Ended { flags: Flags::of(&[flag]), ..Ended::default() };
        let closed = |why: String| Ended { closed: Some(why), ..Ended::default() };
        let text = || chain(self).replace(' ', "_");
        match (self, direction) {
            (Self::Dial { source, .. } | Self::DialPeer { source, .. } | Self::Application { source, .. }, _) => {
                connecting(format!("delayed_connect_error:_{}", io_words(source).replace(' ', "_")))
            }
            (Self::DialTimeout(_), _) => connecting("connection_timeout".to_owned()),
            (Self::NotServedYet | Self::EndpointLeft(_), _)
            | (Self::Identity(_) | Self::Tls { .. } | Self::Tunnel(_), Direction::Outbound) => connecting(text()),
            (Self::NoEndpoint(_) | Self::UnknownHost(_) | Self::NotInRegistry(_), _) => flagged(Flag::NoHealthyUpstream),
            (Self::NoSuchPort { .. } | Self::NoRoute(_), _) => flagged(Flag::NoRoute),
            (Self::Overflow(_), _) => flagged(Flag::UpstreamOverflow),
            (Self::UpstreamReset(_), _) => flagged(Flag::UpstreamRemoteReset),
            (Self::Cut(Cut::MaxDuration), _) => flagged(Flag::DurationTimeout),
            // Envoy says nothing of one that nobody used.
            (Self::Cut(Cut::Idle), _) => Ended::default(),
            (Self::Denied(denial), _) => closed(denial.details()),
            (Self::Identity(_) | Self::Tls { .. } | Self::Tunnel(_), Direction::Inbound)
            | (
                Self::LostOriginalDestination
                | Self::ReservedPort(_)
                | Self::TooManyConnections
                | Self::UnknownWorkload
                | Self::BadRequest(_)
                | Self::ForeignAuthority(_)
                | Self::Broken(_)
                | Self::Cut(Cut::PolicyChanged | Cut::PodGone | Cut::LeftTheMesh | Cut::Shutdown | Cut::Revoked),
                _,
            ) => closed(text()),
        }
    }

    /// Whether it is that one end has reset an open connection, or gone while the other still sent: that is how some connections end, and
    /// no failure of anything, as for ztunnel. What breaks between nodes is one.
    pub fn is_an_end(&self) -> bool {
        let (Self::Broken(error) | Self::UpstreamReset(error)) = self else { return false };
        matches!(error.raw_os_error(), Some(libc::ECONNRESET | libc::EPIPE | libc::ENOTCONN)) || tunnel::is_reset(error)
    }

    /// Whether it was over before it was known where the connection was to go: ztunnel tells of these with a warning, and counts none of
    /// them as opened.
    pub fn is_early(&self) -> bool {
        match self {
            Self::LostOriginalDestination
            | Self::ReservedPort(_)
            | Self::NoSuchPort { .. }
            | Self::NoEndpoint(_)
            | Self::UnknownHost(_)
            | Self::NoRoute(_)
            | Self::NotInRegistry(_)
            | Self::TooManyConnections
            | Self::UnknownWorkload
            | Self::BadRequest(_)
            | Self::ForeignAuthority(_) => true,
            Self::Overflow(_)
            | Self::EndpointLeft(_)
            | Self::NotServedYet
            | Self::Identity(_)
            | Self::Dial { .. }
            | Self::DialPeer { .. }
            | Self::DialTimeout(_)
            | Self::Tls { .. }
            | Self::Tunnel(_)
            | Self::Denied(_)
            | Self::Application { .. }
            | Self::Broken(_)
            | Self::UpstreamReset(_)
            | Self::Cut(_) => false,
        }
    }

    /// Whether nobody listens there, as far as is known.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Dial { source, .. } | Self::Application { source, .. } => source.kind() == io::ErrorKind::ConnectionRefused,
            Self::Tunnel(TunnelError::Refused(status)) => *status == http::StatusCode::SERVICE_UNAVAILABLE,
            Self::LostOriginalDestination
            | Self::ReservedPort(_)
            | Self::NoSuchPort { .. }
            | Self::NoEndpoint(_)
            | Self::UnknownHost(_)
            | Self::NoRoute(_)
            | Self::EndpointLeft(_)
            | Self::Overflow(_)
            | Self::NotInRegistry(_)
            | Self::TooManyConnections
            | Self::UnknownWorkload
            | Self::NotServedYet
            | Self::Identity(_)
            | Self::DialPeer { .. }
            | Self::DialTimeout(_)
            | Self::Tls { .. }
            | Self::Tunnel(_)
            | Self::Denied(_)
            | Self::BadRequest(_)
            | Self::ForeignAuthority(_)
            | Self::Broken(_)
            | Self::UpstreamReset(_)
            | Self::Cut(_) => false,
        }
    }

    /// Whether nothing has reached the application and the same connection may succeed a moment later: the destination's
    /// node has not finished enrolling it, or another endpoint may answer.
    pub fn retryable(&self) -> bool {
        match self {
            Self::NotServedYet | Self::UnknownWorkload | Self::EndpointLeft(_) | Self::Tunnel(TunnelError::Closing(_)) => true,
            Self::DialPeer { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
            ),
            Self::LostOriginalDestination
            | Self::ReservedPort(_)
            | Self::NoSuchPort { .. }
            | Self::NoEndpoint(_)
            | Self::UnknownHost(_)
            | Self::NoRoute(_)
            | Self::NotInRegistry(_)
            | Self::Overflow(_)
            | Self::TooManyConnections
            | Self::Identity(_)
            | Self::Dial { .. }
            | Self::DialTimeout(_)
            | Self::Tls { .. }
            | Self::Tunnel(_)
            | Self::Denied(_)
            | Self::BadRequest(_)
            | Self::ForeignAuthority(_)
            | Self::Application { .. }
            | Self::Broken(_)
            | Self::UpstreamReset(_)
            | Self::Cut(_) => false,
        }
    }
}

/// What the system says of an error, without its number.
pub fn io_words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

fn is_reset(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ECONNRESET) || tunnel::is_reset(error)
}

impl From<Broken<Cut>> for Failure {
    fn from(broken: Broken<Cut>) -> Self {
        match broken {
            Broken::Read { side: Side::Upstream, source } | Broken::Write { side: Side::Upstream, source } if is_reset(&source) => {
                Self::UpstreamReset(source)
            }
            Broken::Read { source, .. } | Broken::Write { source, .. } => Self::Broken(source),
            Broken::Cut(cut) => Self::Cut(cut),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_does_not_answer_is_not_one_that_refuses() {
        let of =
            |kind: io::ErrorKind| Failure::DialPeer { to: SocketAddr::from(([10, 0, 0, 1], 15008)), source: kind.into() }.response_flag();
        assert_eq!([of(io::ErrorKind::TimedOut), of(io::ErrorKind::ConnectionRefused)], ["NETWORK_POLICY", "CONNECT"]);
    }

    #[test]
    fn a_reset_by_one_of_its_ends_is_how_a_connection_ends() {
        let of = |error: io::Error| Failure::Broken(error).is_an_end();
        let stream = |reason: h2::Reason| io::Error::new(io::ErrorKind::ConnectionReset, h2::Error::from(reason));
        assert!(of(io::Error::from_raw_os_error(libc::EPIPE)) && of(io::Error::from_raw_os_error(libc::ECONNRESET)));
        assert!(of(stream(h2::Reason::CONNECT_ERROR)) && !of(stream(h2::Reason::CANCEL)) && !of(io::ErrorKind::ConnectionReset.into()));
        assert!(!of(io::Error::from_raw_os_error(libc::ETIMEDOUT)) && !Failure::Cut(Cut::PodGone).is_an_end());
    }
}
