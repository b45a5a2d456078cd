//! `PeerAuthentication`: whether plaintext is accepted. Semantics of Istio's security API, ambient mode.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{envelope::FieldError, selector::WorkloadSelector};

/// How a workload treats plaintext. In ambient mode `DISABLE` cannot turn HBONE off and acts as `PERMISSIVE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum MtlsMode {
    /// Inherit from the wider scope.
    #[default]
    Unset,
    Disable,
    Permissive,
    Strict,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PeerAuthentication {
    pub selector: Option<WorkloadSelector>,
    pub mode: MtlsMode,
    /// By container port.
    pub port_modes: BTreeMap<u16, MtlsMode>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Spec {
    selector: Option<WorkloadSelector>,
    #[serde(default)]
    mtls: Option<Mtls>,
    #[serde(default)]
    port_level_mtls: Option<BTreeMap<String, Mtls>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mtls {
    #[serde(default)]
    mode: MtlsMode,
}

impl PeerAuthentication {
    pub(super) fn read(spec: Spec) -> Result<Self, FieldError> {
        let selector = spec.selector.filter(|s| !s.match_labels.is_empty());
        let ports = spec.port_level_mtls.unwrap_or_default();
        if selector.is_none() && !ports.is_empty() {
            return Err(FieldError::new("spec.portLevelMtls", "applies to selected workloads only; add spec.selector.matchLabels"));
        }
        let mut port_modes = BTreeMap::new();
        for (port, mtls) in ports {
            let number = port.parse::<u16>().ok().filter(|p| *p != 0).ok_or_else(|| {
                FieldError::new(format!("spec.portLevelMtls.{port}"), "is not a port; use a container port number from 1 to 65535")
            })?;
            port_modes.insert(number, mtls.mode);
        }
        Ok(Self { selector, mode: spec.mtls.map_or(MtlsMode::Unset, |m| m.mode), port_modes })
    }
}
