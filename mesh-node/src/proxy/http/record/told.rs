//! A request that is over: logged, traced and counted.

use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use h2::Reason;
use http::{HeaderMap, HeaderValue, StatusCode};

use super::{Described, Flag, Record, X_REQUEST_ID, is_traced, told};
use crate::{
    proxy::{
        http::{h2::Client, wire::Malformed},
        reporting,
    },
    report::{
        entry::{Asked, ClusterName, Entry},
        format::Template,
        kept::Kept,
        peer::End,
    },
    route::Workload,
    telemetry::traffic::{Edge, Reporter, Tags},
};

impl Record {
    /// Takes down why a client of HTTP/2 did not wait for the end. As Envoy does, one that has reset its stream is told apart from one whose
    /// connection is gone, and from one that broke the protocol.
    pub fn left(&mut self, client: Client) {
        if self.details != "downstream_remote_disconnect" {
            return;
        }
        let flag = match client {
            Client::There | Client::Gone => return,
            // What the library says to one that breaks it.
            Client::Reset(Reason::PROTOCOL_ERROR | Reason::FLOW_CONTROL_ERROR | Reason::STREAM_CLOSED) => Flag::DownstreamProtocolError,
            Client::Reset(_) => Flag::DownstreamRemoteReset,
        };
        self.flags.replace(Flag::DownstreamDisconnect, flag);
        self.details = Cow::Borrowed("http2.remote_reset");
    }

    /// The same, where the application's connection ends with the client's: that is not what the request ended for.
    pub fn left_together(&mut self, client: Client) {
        if client == Client::Gone
            && (self.status.is_none() || self.unanswered)
            && self.flags.replace(Flag::UpstreamConnectionTermination, Flag::DownstreamDisconnect)
        {
            self.details = Cow::Borrowed("downstream_remote_disconnect");
            (self.status, self.grpc_meant) = (None, None);
        }
        self.left(client);
    }

    /// Takes down a request of HTTP/2 of which nothing is known but that it broke the protocol.
    pub fn broke_protocol(&mut self, source: Option<&Arc<Workload>>) {
        self.malformed(&Malformed::INVALID_FIELD, source);
        self.concluded = true;
    }

    /// What there is to tell of it.
    pub(super) fn entry(&self, duration: Duration) -> Entry<'_> {
        let described = self.described.as_deref();
        let asked = described.map(Described::asked);
        let inbound = self.reporter == Reporter::Destination;
        let cluster = match &self.cluster {
            Some(cluster) => {
                Some(ClusterName::Outbound { service: &cluster.id.service, port: cluster.id.port, subset: &cluster.id.subset })
            }
            None => inbound.then(|| ClusterName::Inbound(self.destination.port())),
        };
        let after = |at: Option<Instant>| at.map(|at| at.saturating_duration_since(self.started));
        Entry {
            start: reporting::wall(self.started),
            duration,
            request: asked,
            protocol: Some(self.protocol),
            code: self.status.map_or(0, |s| s.as_u16()),
            grpc_status: self.grpc_status(),
            grpc_said: self.down.grpc_status.is_some(),
            flags: self.flags.text(),
            flags_long: self.flags.long(),
            received_after: after(self.received_at),
            sent_after: after(self.sent_at),
            answered_after: after(self.answered_at),
            attempts: if inbound { u32::from(self.details == "via_upstream") } else { self.attempts },
            upstream_protocol: self.upstream_protocol.or((inbound && self.details == "via_upstream").then_some(self.protocol)),
            tells_a_request: true,
            flag_bits: self.flags.bits(),
            details: Some(&self.details),
            termination_details: None,
            transport_failure: self.transport_failure.as_deref(),
            bytes_received: self.up.bytes,
            bytes_sent: self.down.bytes,
            service_time: self.answered_after.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
            upstream_host: self.endpoint,
            upstream_cluster: cluster,
            upstream_local: self.upstream_local.filter(|_| self.endpoint.is_some()),
            downstream_local: Some(self.destination),
            downstream_remote: Some(self.client),
            sni: None,
            // Istio's name for what no rule has routed.
            route: self.route.as_deref().or((inbound || self.cluster.is_some()).then_some("default")),
            response_headers: described.and_then(|d| d.response_headers.as_ref()),
            response_trailers: self.down.trailers(),
            mutual_tls: self.mutual_tls,
            trace: self.trace,
            peer: self.peer.as_ref(),
            local: self.local.as_ref(),
            teller: self.teller.as_deref(),
            other: self.other.as_deref().map(|other| (if inbound { End::Downstream } else { End::Upstream }, other)),
            cluster: &self.metrics.cluster,
        }
    }

    /// What is written into a header: of a request, as it was asked for and with what is known of it, or of its answer. None of nothing.
    pub fn tell(
        &self,
        template: &Template,
        asked: Option<Asked<'_>>,
        answer: Option<(Option<StatusCode>, &HeaderMap)>,
    ) -> Option<HeaderValue> {
        let headers = answer.map(|(_, headers)| Kept::of(headers, &template.asks().response));
        let code = answer.and_then(|(status, _)| status).map_or(0, |s| s.as_u16());
        // Whose rule it is is nobody's business but the operator's.
        let route = self.route.as_deref().filter(|_| self.route_is_named);
        let entry = Entry { request: asked, response_headers: headers.as_ref(), code, route, ..self.entry(self.started.elapsed()) };
        HeaderValue::from_bytes(&template.bytes(&entry)).ok().filter(|value| !value.is_empty())
    }

    /// For who looks at one node: what was denied, and everything with `--log access=debug`.
    fn say(&self, entry: &Entry<'_>) {
        let asked = entry.request.as_ref();
        let id = asked.and_then(|a| a.headers.get(&X_REQUEST_ID)).and_then(|v| v.to_str().ok());
        let (source, peer) = (self.source.as_ref(), self.peer.as_ref().map(ToString::to_string));
        macro_rules! say {
            ($level:ident, $what:literal) => {
                tracing::$level!(
                    name: $what,
                    target: "access",
                    { reporter = self.reporter.name(), protocol = self.protocol, method = asked.map(|a| a.method), path = asked.map(|a| a.path),
                      authority = asked.map(|a| a.authority), request_id = id, response_code = self.status.map(|s| s.as_u16()),
                      response_flags = %self.flags, response_code_details = %self.details, attempts = self.attempts,
                      duration = format!("{}ms", entry.duration.as_millis()), route_name = self.route.as_deref(),
                      upstream_cluster = self.cluster.as_ref().map(|c| c.id.to_string()), upstream_host = self.endpoint.map(|e| e.to_string()),
                      downstream_remote_address = %self.client, downstream_local_address = %self.destination, src.identity = peer,
                      src.workload = source.map(|s| s.name.name.to_string()), src.namespace = source.map(|s| s.name.namespace.to_string()) },
                    $what
                )
            };
        }
        if self.denied {
            say!(info, "request denied");
        } else {
            say!(debug, "request complete");
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.metrics.http_active.dec();
        if !self.concluded {
            self.cut();
        }
        let duration = self.started.elapsed();
        let told = self.teller.as_ref().map(|w| told(&w.reporting, self.reporter)).filter(|t| t.wants_request());
        if is_traced() || self.denied {
            self.say(&self.entry(duration));
        }
        if told.is_none() && self.traced.is_none() && self.watched.is_none() {
            return self.count(duration, Tags::default());
        }
        let entry = self.entry(duration);
        if let Some(traced) = &self.traced {
            let cluster = self.cluster.as_ref().map(|c| &c.id);
            traced.tell(&entry, self.reporter, cluster, self.destination.port(), &self.metrics);
        }
        if let Some(name) = &self.watched {
            self.metrics.watch.tell(name, reporting::event(&entry, self.reporter, self.edge.as_deref().map(Edge::key)));
        }
        let Some(told) = told else {
            drop(entry);
            return self.count(duration, Tags::default());
        };
        let tags = told.tags_of(&entry);
        reporting::log(&self.metrics.access, &told.logs, &entry);
        drop(entry);
        self.count(duration, tags);
    }
}
