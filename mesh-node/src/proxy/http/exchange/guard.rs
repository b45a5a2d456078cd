//! Policies that refer to a service, asked where the client is, as a waypoint asks them: of what a route leads away from the service's own
//! endpoints, which ask them too, and of what it answers or changes.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, StatusCode};

use super::{End, Exchange};
use crate::{
    config::Snapshot,
    policy::{Facts, Governing, Sni, Verified},
    proxy::http::{
        body::{RequestBody, Responder},
        gate::{Asked, Gate, shows_bodies},
        upload::{Begun, Upload},
        wire::{expects_continue, is_websocket, take_expectation},
    },
    route::{Cluster, PortOf, Service, ServicePort, Workload, request::RequestHead},
};

/// What was dialled, and by whom.
#[derive(Clone, Copy)]
pub(super) struct Dialled<'s> {
    pub snapshot: &'s Arc<Snapshot>,
    pub source: &'s Arc<Workload>,
    pub service: &'s Service,
    pub port: &'s ServicePort,
}

/// What comes of a request that may pass, beside what becomes of its head.
#[derive(Default)]
pub(super) struct Passed {
    /// What external authorizers were shown of the body.
    pub begun: Option<Begun>,
    /// Headers that say what was verified.
    pub written: Vec<HeaderName>,
    /// What was judged, for as long as the request is under way.
    pub judged: Option<Box<Judged>>,
}

/// A request that policies of its service have let pass, to be judged by later ones too.
pub(super) struct Judged {
    gate: Gate,
    head: RequestHead,
    claims: Option<Verified>,
    dialled: PortOf,
    generation: u64,
}

impl Judged {
    /// Completes when a later configuration denies it.
    pub async fn denied_later(&self) {
        let mut config = self.gate.proxy.config.clone();
        loop {
            if config.load().generation != self.generation && self.is_denied(&config.load()) {
                return;
            }
            if !config.changed().await {
                return std::future::pending().await;
            }
        }
    }

    fn is_denied(&self, snapshot: &Snapshot) -> bool {
        let source = snapshot.workload(&self.gate.pod.uid);
        let service = source.and_then(|source| snapshot.service_of(&source.view, &self.dialled.service));
        let governing = service.and_then(|service| service.port(self.dialled.port)?.guard.as_ref());
        governing.is_some_and(|governing| self.gate.is_denied_by(snapshot, governing, &self.head, self.claims.as_ref()))
    }
}

/// What comes of it, unless it is denied before.
pub(super) async fn under<O>(judged: Box<Judged>, served: impl Future<Output = O> + Send) -> Option<O> {
    let served = Box::pin(served);
    tokio::select! {
        biased;
        outcome = served => Some(outcome),
        () = judged.denied_later() => None,
    }
}

impl<B: RequestBody, R: Responder> Exchange<'_, '_, B, R> {
    /// Asks, if there is anybody to ask. `cluster`: where the request goes, if it goes on.
    pub(super) async fn guard(&mut self, dialled: Dialled<'_>, cluster: Option<&Cluster>, head: &mut RequestHead) -> Result<Passed, End> {
        match &dialled.port.guard {
            // Rare, and large.
            Some(governing) => Box::pin(self.ask(dialled, governing, cluster, head)).await,
            None => Ok(Passed::default()),
        }
    }

    async fn ask(
        &mut self,
        Dialled { snapshot, source, service, port }: Dialled<'_>,
        governing: &Governing,
        cluster: Option<&Cluster>,
        head: &mut RequestHead,
    ) -> Result<Passed, End> {
        let down = self.down;
        let mut facts = Facts::new(Some(source.identity.clone()), down.client.ip(), down.original);
        facts.via_trusted_proxy = snapshot.mesh.is_trusted_proxy(facts.peer.as_ref(), facts.source);
        facts.sni = Sni::Read(None);
        facts.dialled = Some(service.name.clone());
        let gate = Gate::of_service(down.proxy, down.pod, facts, down.client);
        if expects_continue(&head.headers) && !self.body.is_end() && shows_bodies(snapshot, governing) {
            take_expectation(&mut head.headers);
            if self.responder.informational(StatusCode::CONTINUE, HeaderMap::new()).await.is_err() {
                return Err(self.abandoned());
            }
        }
        let asked = Asked {
            head,
            changed: None,
            client_cert: None,
            protocol: self.record.protocol,
            again: cluster.map_or(&[], |cluster| snapshot.tokens_of(cluster)),
        };
        let mut upload = Upload::new(&mut *self.body, false, &down.proxy.replays.of(&down.pod.kept));
        let judged = tokio::select! {
            biased;
            judged = gate.judge(snapshot, governing, asked, &mut upload) => Some(judged),
            _ = self.responder.gone() => None,
        };
        let begun = upload.set_aside();
        match judged {
            Some(Ok(pass)) => {
                if let Some(changed) = pass.head {
                    *head = changed;
                    self.record.became(head);
                }
                self.to_client = pass.to_client;
                let dialled = PortOf { service: service.name.clone(), port: port.port };
                let judged = Judged { gate, head: head.clone(), claims: pass.claims, dialled, generation: snapshot.generation };
                // What it could become else may carry requests that nobody judges.
                self.upgrade = self.upgrade.take().filter(is_websocket);
                Ok(Passed { begun: Some(begun), written: pass.written, judged: Some(Box::new(judged)) })
            }
            Some(Err(refusal)) => {
                refusal.note(self.record, &gate, head);
                if refusal.gone {
                    return Err(End::Broken);
                }
                Err(self.reply(refusal.reply, |_, _| {}).await)
            }
            None => Err(self.abandoned()),
        }
    }
}
