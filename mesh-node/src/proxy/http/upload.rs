//! The request's body on its way up: kept as far as it may have to be sent again, and copied to mirrors.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::mpsc;

use super::{
    body::{BodyError, Closed, FrameSource, RequestBody},
    framing::Frame,
    wire::Framing,
};

/// Most of one body that is kept for another attempt, bytes: Envoy's buffer limit.
const REPLAY_EACH: usize = 1024 * 1024;
/// Most that is kept of all bodies of the node, bytes.
const REPLAY_ALL: usize = 64 * 1024 * 1024;
/// Frames a mirror may be behind before it is given up.
pub const MIRROR_BEHIND: usize = 64;

/// What all requests of the node keep for other attempts, bytes.
#[derive(Debug, Clone, Default)]
pub struct Replays(Arc<AtomicUsize>);

impl Replays {
    fn take(&self, n: usize) -> bool {
        let up = |used: usize| used.checked_add(n).filter(|used| *used <= REPLAY_ALL);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, up).is_ok()
    }
}

/// A request's body for as many attempts as it takes.
pub struct Upload<'a, B> {
    live: &'a mut B,
    kept: Vec<Frame>,
    kept_bytes: usize,
    /// Which of the kept frames the attempt under way sends next.
    at: usize,
    keeping: bool,
    /// Frames have been sent and not kept: there can be no other attempt.
    lost: bool,
    replays: Replays,
    mirrors: Vec<mpsc::Sender<Frame>>,
}

impl<'a, B: RequestBody> Upload<'a, B> {
    pub fn new(live: &'a mut B, keep: bool, replays: &Replays) -> Self {
        let (kept, mirrors) = (Vec::new(), Vec::new());
        Self { live, kept, kept_bytes: 0, at: 0, keeping: keep, lost: false, replays: replays.clone(), mirrors }
    }

    pub fn framing(&self) -> Framing {
        self.live.framing()
    }

    /// Copies every frame to a mirror, as long as it keeps up.
    pub fn copy_to(&mut self, mirror: mpsc::Sender<Frame>) {
        self.mirrors.push(mirror);
    }

    /// Whether the whole body can be sent again.
    pub fn can_repeat(&self) -> bool {
        !self.lost
    }

    /// Begins another attempt.
    pub fn rewind(&mut self) {
        self.at = 0;
    }

    /// There will be no other attempt: nothing need be kept.
    pub fn settle(&mut self) {
        self.keeping = false;
        if self.at >= self.kept.len() {
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.kept = Vec::new();
        self.at = 0;
        self.replays.0.fetch_sub(std::mem::take(&mut self.kept_bytes), Ordering::Relaxed);
    }

    /// Whether the client has sent the whole request.
    pub fn is_received(&self) -> bool {
        self.live.is_end()
    }

    pub async fn closed(&mut self) -> Closed {
        self.live.closed().await
    }

    pub fn become_raw(&mut self) {
        self.keeping = false;
        self.live.become_raw();
    }

    fn pass(&mut self, frame: Frame) -> Frame {
        // A mirror that is too far behind, or gone, is given up; the request goes on.
        self.mirrors.retain(|mirror| mirror.try_send(frame.clone()).is_ok());
        let n = if let Frame::Data(data) = &frame { data.len() } else { 0 };
        if self.keeping && (self.kept_bytes + n > REPLAY_EACH || !self.replays.take(n)) {
            self.keeping = false;
            self.forget();
        }
        if self.keeping {
            self.kept_bytes += n;
            self.kept.push(frame.clone());
            self.at = self.kept.len();
        } else {
            self.lost = true;
        }
        frame
    }

    fn again(&mut self) -> Option<Frame> {
        let frame = self.kept.get(self.at).cloned()?;
        self.at += 1;
        if !self.keeping && self.at >= self.kept.len() {
            self.lost = true;
            self.forget();
        }
        Some(frame)
    }
}

impl<B: RequestBody> FrameSource for Upload<'_, B> {
    async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
        if let Some(frame) = self.again() {
            return Ok(Some(frame));
        }
        let frame = self.live.frame().await?;
        if frame.is_none() {
            self.mirrors.clear();
        }
        Ok(frame.map(|f| self.pass(f)))
    }

    fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
        if let Some(frame) = self.again() {
            return Ok(Some(frame));
        }
        let frame = self.live.buffered()?.map(|f| self.pass(f));
        if self.live.is_end() {
            self.mirrors.clear();
        }
        Ok(frame)
    }

    fn is_end(&self) -> bool {
        self.at >= self.kept.len() && self.live.is_end()
    }
}

impl<B> Drop for Upload<'_, B> {
    fn drop(&mut self) {
        self.replays.0.fetch_sub(self.kept_bytes, Ordering::Relaxed);
    }
}
