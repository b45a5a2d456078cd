//! Waiting for a connection that somebody else lets go of.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::sync::{Notify, futures::Notified};

pin_project_lite::pin_project! {
    /// Room for a connection, or a connection, may have become free.
    pub struct Freed<'a> {
        #[pin]
        endpoint: Notified<'a>,
        #[pin]
        cluster: Notified<'a>,
    }
}

impl<'a> Freed<'a> {
    pub fn new(endpoint: &'a Notify, cluster: &'a Notify) -> Self {
        Self { endpoint: endpoint.notified(), cluster: cluster.notified() }
    }

    pub fn enable(self: Pin<&mut Self>) {
        let this = self.project();
        this.endpoint.enable();
        this.cluster.enable();
    }
}

impl Future for Freed<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        if this.endpoint.poll(cx).is_ready() { Poll::Ready(()) } else { this.cluster.poll(cx) }
    }
}
