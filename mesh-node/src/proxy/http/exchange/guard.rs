//! Policies that refer to a service, asked where the client is, as a waypoint asks them: of what a route leads away from the service's own
//! endpoints, which ask them too, and of what it answers or changes.

use std::{future::poll_fn, net::SocketAddr, pin::Pin, sync::Arc, task::Poll};

use http::{HeaderMap, HeaderName, StatusCode};

use super::{End, Exchange};
use crate::{
    config::Snapshot,
    id::ObjectName,
    policy::{Denial, Facts, Governing, Request, Sni, Verified},
    proxy::{
        Proxy, ServedPod,
        http::{
            Downstream,
            body::{RequestBody, Responder},
            gate::{Asked, Gate, remote, shows_bodies},
            upload::{Begun, Upload},
            wire::{expects_continue, is_websocket, take_expectation},
        },
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

/// A request that policies of its service have let pass, if there were any, to be judged by later ones too.
pub(super) struct Judged {
    proxy: Arc<Proxy>,
    pod: Arc<ServedPod>,
    client: SocketAddr,
    original: SocketAddr,
    head: RequestHead,
    claims: Option<Verified>,
    dialled: PortOf,
    generation: u64,
}

impl Judged {
    fn new(down: &Downstream<'_>, dialled: Dialled<'_>, head: &RequestHead, claims: Option<Verified>) -> Box<Self> {
        let Downstream { proxy, pod, client, original, .. } = *down;
        Box::new(Self {
            proxy: proxy.clone(),
            pod: pod.clone(),
            client,
            original,
            head: head.clone(),
            claims,
            dialled: PortOf { service: dialled.service.name.clone(), port: dialled.port.port },
            generation: dialled.snapshot.generation,
        })
    }

    /// Completes when a later configuration denies it, which is counted.
    pub async fn denied_later(self: Box<Self>) -> Denial {
        let mut config = self.proxy.config.clone();
        loop {
            {
                let snapshot = config.load();
                if snapshot.generation != self.generation
                    && let Err(denial) = self.judge(&snapshot)
                {
                    self.proxy.metrics.policy_decision(denial.policy(), "denied");
                    return denial;
                }
            }
            if !config.changed().await {
                return std::future::pending().await;
            }
        }
    }

    fn judge(&self, snapshot: &Snapshot) -> Result<(), Denial> {
        let Some(source) = snapshot.workload(&self.pod.uid) else { return Ok(()) };
        let port = snapshot.service_of(&source.view, &self.dialled.service).and_then(|service| service.port(self.dialled.port));
        let Some(governing) = port.and_then(|port| port.guard.as_ref()) else { return Ok(()) };
        let facts = facts(snapshot, source, &self.dialled.service, (self.client, self.original));
        let remote = remote(snapshot, &facts, &self.head.headers);
        governing.request(&facts, &Request::new(&self.head, self.claims.as_ref(), remote))
    }
}

fn facts(snapshot: &Snapshot, source: &Workload, service: &ObjectName, (client, original): (SocketAddr, SocketAddr)) -> Facts {
    let mut facts = Facts::new(Some(source.identity.clone()), client.ip(), original);
    facts.via_trusted_proxy = snapshot.mesh.is_trusted_proxy(facts.peer.as_ref(), facts.source);
    facts.sni = Sni::Read(None);
    facts.dialled = Some(service.clone());
    facts
}

/// What comes of it, unless it is denied before.
pub(super) async fn under<O>(judged: Option<Box<Judged>>, mut served: Pin<&mut impl Future<Output = O>>) -> Result<O, Denial> {
    let mut denied = judged.map(|judged| Box::pin(judged.denied_later()));
    poll_fn(|cx| {
        if let Poll::Ready(outcome) = served.as_mut().poll(cx) {
            return Poll::Ready(Ok(outcome));
        }
        denied.as_mut().map_or(Poll::Pending, |denied| denied.as_mut().poll(cx).map(Err))
    })
    .await
}

impl<B: RequestBody, R: Responder> Exchange<'_, '_, B, R> {
    /// Asks, if there is anybody to ask. `cluster`: where the request goes, if it goes on.
    pub(super) async fn guard(&mut self, dialled: Dialled<'_>, cluster: Option<&Cluster>, head: &mut RequestHead) -> Result<Passed, End> {
        match &dialled.port.guard {
            // Rare, and large.
            Some(governing) => Box::pin(self.ask(dialled, governing, cluster, head)).await,
            None => Ok(Passed { judged: Some(Judged::new(self.down, dialled, head, None)), ..Passed::default() }),
        }
    }

    async fn ask(
        &mut self,
        dialled: Dialled<'_>,
        governing: &Governing,
        cluster: Option<&Cluster>,
        head: &mut RequestHead,
    ) -> Result<Passed, End> {
        let (down, Dialled { snapshot, source, service, .. }) = (self.down, dialled);
        let facts = facts(snapshot, source, &service.name, (down.client, down.original));
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
                let judged = Judged::new(down, dialled, head, pass.claims);
                // What it could become else may carry requests that nobody judges.
                self.upgrade = self.upgrade.take().filter(is_websocket);
                Ok(Passed { begun: Some(begun), written: pass.written, judged: Some(judged) })
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
