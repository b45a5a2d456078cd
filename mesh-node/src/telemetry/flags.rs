//! Response flags: why a request or connection ended as it did, in Envoy's letters.

use std::{borrow::Cow, fmt};

use prometheus_client::encoding::{EncodeLabelValue, LabelValueEncoder};

/// Envoy's response flags, as far as they occur here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flag {
    NoHealthyUpstream,
    UpstreamConnectionFailure,
    UpstreamOverflow,
    NoRoute,
    NoCluster,
    RetriesExhausted,
    UpstreamTimeout,
    UpstreamRemoteReset,
    UpstreamConnectionTermination,
    UpstreamProtocolError,
    DownstreamDisconnect,
    DownstreamProtocolError,
    DownstreamRemoteReset,
    DelayInjected,
    FaultInjected,
    UnauthorizedExternally,
    DurationTimeout,
}

impl Flag {
    pub fn name(self) -> &'static str {
        match self {
            Self::NoHealthyUpstream => "UH",
            Self::UpstreamConnectionFailure => "UF",
            Self::UpstreamOverflow => "UO",
            Self::NoRoute => "NR",
            Self::NoCluster => "NC",
            Self::RetriesExhausted => "URX",
            Self::UpstreamTimeout => "UT",
            Self::UpstreamRemoteReset => "UR",
            Self::UpstreamConnectionTermination => "UC",
            Self::UpstreamProtocolError => "UPE",
            Self::DownstreamDisconnect => "DC",
            Self::DownstreamProtocolError => "DPE",
            Self::DownstreamRemoteReset => "DR",
            Self::DelayInjected => "DI",
            Self::FaultInjected => "FI",
            Self::UnauthorizedExternally => "UAEX",
            Self::DurationTimeout => "DT",
        }
    }
}

impl Flag {
    fn long(self) -> &'static str {
        match self {
            Self::NoHealthyUpstream => "NoHealthyUpstream",
            Self::UpstreamConnectionFailure => "UpstreamConnectionFailure",
            Self::UpstreamOverflow => "UpstreamOverflow",
            Self::NoRoute => "NoRouteFound",
            Self::NoCluster => "NoClusterFound",
            Self::RetriesExhausted => "UpstreamRetryLimitExceeded",
            Self::UpstreamTimeout => "UpstreamRequestTimeout",
            Self::UpstreamRemoteReset => "UpstreamRemoteReset",
            Self::UpstreamConnectionTermination => "UpstreamConnectionTermination",
            Self::UpstreamProtocolError => "UpstreamProtocolError",
            Self::DownstreamDisconnect => "DownstreamConnectionTermination",
            Self::DownstreamProtocolError => "DownstreamProtocolError",
            Self::DownstreamRemoteReset => "DownstreamRemoteReset",
            Self::DelayInjected => "DelayInjected",
            Self::FaultInjected => "FaultInjected",
            Self::UnauthorizedExternally => "UnauthorizedExternalService",
            Self::DurationTimeout => "DurationTimeout",
        }
    }

    /// Its bit in Envoy's `response.flags`.
    fn bit(self) -> i64 {
        match self {
            Self::NoHealthyUpstream => 0x2,
            Self::UpstreamTimeout => 0x4,
            Self::UpstreamRemoteReset => 0x10,
            Self::UpstreamConnectionFailure => 0x20,
            Self::UpstreamConnectionTermination => 0x40,
            Self::UpstreamOverflow => 0x80,
            Self::NoRoute => 0x100,
            Self::DelayInjected => 0x200,
            Self::FaultInjected => 0x400,
            Self::UnauthorizedExternally => 0x1000,
            Self::DownstreamDisconnect => 0x4000,
            Self::RetriesExhausted => 0x8000,
            Self::DownstreamProtocolError => 0x4_0000,
            Self::DurationTimeout => 0x40_0000,
            Self::UpstreamProtocolError => 0x80_0000,
            Self::NoCluster => 0x100_0000,
            Self::DownstreamRemoteReset => 0x1000_0000,
        }
    }
}

/// Most flags one request can have.
const MAX_FLAGS: usize = 4;

/// Flags in the order they were raised; printed with commas, `-` for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Flags([Option<Flag>; MAX_FLAGS]);

impl Flags {
    /// As Envoy's `response.flags` has them.
    pub fn bits(self) -> i64 {
        self.0.iter().flatten().fold(0, |bits, flag| bits | flag.bit())
    }

    /// As printed; almost always that is not put together.
    pub fn text(self) -> Cow<'static, str> {
        match self.0 {
            [None, ..] => Cow::Borrowed("-"),
            [Some(one), None, ..] => Cow::Borrowed(one.name()),
            _ => Cow::Owned(self.to_string()),
        }
    }

    /// By Envoy's long names.
    pub fn long(self) -> Cow<'static, str> {
        match self.0 {
            [None, ..] => Cow::Borrowed("-"),
            [Some(one), None, ..] => Cow::Borrowed(one.long()),
            all => Cow::Owned(all.iter().flatten().map(|f| f.long()).collect::<Vec<_>>().join(",")),
        }
    }

    /// These, in their order.
    pub fn of(flags: &[Flag]) -> Self {
        let mut all = Self::default();
        flags.iter().for_each(|flag| all.raise(*flag));
        all
    }

    /// One in the place of another, each once; whether the other was raised.
    pub fn replace(&mut self, old: Flag, new: Flag) -> bool {
        let was = self.0.contains(&Some(old));
        let all = std::mem::take(&mut self.0);
        all.into_iter().flatten().for_each(|flag| self.raise(if flag == old { new } else { flag }));
        was
    }

    pub fn raise(&mut self, flag: Flag) {
        if !self.0.contains(&Some(flag))
            && let Some(free) = self.0.iter_mut().find(|f| f.is_none())
        {
            *free = Some(flag);
        }
    }
}

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut any = false;
        for flag in self.0.iter().flatten() {
            if any {
                f.write_str(",")?;
            }
            f.write_str(flag.name())?;
            any = true;
        }
        if any { Ok(()) } else { f.write_str("-") }
    }
}

impl EncodeLabelValue for Flags {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        use fmt::Write as _;
        write!(encoder, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_told_once() {
        let mut flags = Flags::of(&[Flag::UpstreamConnectionTermination, Flag::DownstreamDisconnect]);
        assert!(flags.replace(Flag::UpstreamConnectionTermination, Flag::DownstreamDisconnect));
        assert_eq!(flags.text(), "DC");
        assert!(!flags.replace(Flag::NoRoute, Flag::DownstreamDisconnect));
        flags.raise(Flag::NoRoute);
        assert!(flags.replace(Flag::DownstreamDisconnect, Flag::UpstreamConnectionTermination));
        assert_eq!(flags.text(), "UC,NR");
    }
}
