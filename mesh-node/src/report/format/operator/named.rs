//! Names of servers, networks of addresses and identities, as operators are asked for them.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::values::Values;
use crate::{
    id::SpiffeId,
    report::entry::{Entry, ORIGINAL_HOST},
};

/// The server's name, or the host a request names: the one before the other, if there is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ServerName {
    first: Whose,
    other: Option<Whose>,
}

/// Whose name of a server it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Sni,
    /// The host a request named before it was given another.
    Original,
    Host,
    OriginalOrHost,
}

impl ServerName {
    /// By its options.
    pub(super) fn named(options: &str) -> Option<Self> {
        let (which, header) = options.split_once(':').unwrap_or((options, ""));
        let host = match header {
            "" | "ORIG_OR_HOST" => Whose::OriginalOrHost,
            "ORIG" => Whose::Original,
            "HOST" => Whose::Host,
            _ => return None,
        };
        let (first, other) = match which {
            "SNI_ONLY" => (Whose::Sni, None),
            "SNI_FIRST" => (Whose::Sni, Some(host)),
            "HOST_FIRST" => (host, Some(Whose::Sni)),
            _ => return None,
        };
        Some(Self { first, other })
    }

    pub(super) fn of<'e>(self, entry: &Entry<'e>) -> Option<Cow<'e, str>> {
        self.first.of(entry).or_else(|| self.other?.of(entry))
    }
}

impl Whose {
    fn of<'e>(self, entry: &Entry<'e>) -> Option<Cow<'e, str>> {
        let host = || entry.request.map(|asked| Cow::Borrowed(asked.authority)).filter(|host| !host.is_empty());
        let original = || entry.request?.headers.get(&ORIGINAL_HOST).map(|host| String::from_utf8_lossy(host.as_bytes()));
        match self {
            Self::Sni => entry.sni.map(Cow::Borrowed),
            Self::Original => original(),
            Self::Host => host(),
            Self::OriginalOrHost => original().or_else(host),
        }
    }
}

/// The network an address is in; none of more bits than it has.
pub(super) fn net(ip: IpAddr, bits: u8) -> Option<String> {
    let network = match ip {
        IpAddr::V4(ip) => {
            IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & u32::MAX.checked_shl(32_u32.checked_sub(bits.into())?).unwrap_or(0)))
        }
        IpAddr::V6(ip) => {
            IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & u128::MAX.checked_shl(128_u32.checked_sub(bits.into())?).unwrap_or(0)))
        }
    };
    Some(format!("{network}/{bits}"))
}

pub(super) fn identity(id: Option<&SpiffeId>, values: &mut impl Values) {
    match id {
        Some(id) => values.text(id.to_string().as_bytes()),
        None => values.nothing(),
    }
}
