//! Futures that hardly ever complete, beside others that wake their task all the time.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use parking_lot::Mutex;
use pin_project_lite::pin_project;

pin_project! {
    /// Polls a future only when that was woken, and not with every wake of the task: the wait for the end of a pod, a configuration or a
    /// connection takes a lock with each poll.
    #[derive(Debug)]
    pub struct Rarely<F> {
        #[pin]
        inner: F,
        bell: Arc<Bell>,
        waker: Waker,
        task: Option<Waker>,
    }
}

#[derive(Debug)]
struct Bell {
    rung: AtomicBool,
    task: Mutex<Option<Waker>>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        if let Some(task) = &*self.task.lock() {
            task.wake_by_ref();
        }
    }
}

impl<F: Future> Rarely<F> {
    pub fn new(inner: F) -> Self {
        // Nobody has woken it before it was polled once.
        let bell = Arc::new(Bell { rung: AtomicBool::new(true), task: Mutex::new(None) });
        Self { inner, waker: bell.clone().into(), bell, task: None }
    }
}

impl<F: Future> Future for Rarely<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        if this.task.as_ref().is_none_or(|task| !task.will_wake(cx.waker())) {
            *this.task = Some(cx.waker().clone());
            *this.bell.task.lock() = Some(cx.waker().clone());
        }
        if !this.bell.rung.load(Ordering::Relaxed) || !this.bell.rung.swap(false, Ordering::AcqRel) {
            return Poll::Pending;
        }
        this.inner.poll(&mut Context::from_waker(this.waker))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn it_is_polled_when_it_was_woken_and_completes_whoever_waits_for_it() {
        let (polled, told) = (AtomicUsize::new(0), Arc::new(Notify::new()));
        let mut notified = Box::pin(told.notified());
        let counted = std::future::poll_fn(|cx| {
            polled.fetch_add(1, Ordering::Relaxed);
            notified.as_mut().poll(cx)
        });
        let mut rarely = Box::pin(Rarely::new(counted));
        // Who waits for it changes.
        assert!(rarely.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        for _ in 0..10 {
            tokio::select! {
                biased;
                () = rarely.as_mut() => panic!("nobody told it"),
                () = tokio::task::yield_now() => {}
            }
        }
        assert_eq!(polled.load(Ordering::Relaxed), 1);
        let teller = told.clone();
        let late = tokio::spawn(async move { teller.notify_one() });
        rarely.as_mut().await;
        late.await.expect("told");
        assert_eq!(polled.load(Ordering::Relaxed), 2);
    }
}
