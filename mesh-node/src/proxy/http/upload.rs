//! The request's body on its way up: kept as far as it may have to be sent again, and copied to mirrors.

use bytes::BytesMut;
use http::HeaderName;
use tokio::{sync::mpsc, time::Instant};

mod replays;

pub use self::replays::{Copied, Replays, Share};
use self::replays::{Part, compact, cost};
use super::{
    attempt::Heard,
    body::{Beginning, BodyError, Closed, FrameSource, Preview, RequestBody, Unseen},
    framing::Frame,
    meter::Meter,
    wire::Framing,
};

/// Most of one body that is kept for another attempt, bytes: Envoy's buffer limit.
const REPLAY_EACH: usize = 1024 * 1024;
/// Frames a mirror may be behind before it is given up.
pub const MIRROR_BEHIND: usize = 64;

/// Most of a body that is read before there is a connection to send it on, bytes.
const READ_AHEAD: usize = 64 * 1024;

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
    mirrors: Vec<mpsc::Sender<Copied>>,
    /// What the attempt under way has been given.
    passed: Meter,
    /// When it was first seen to be whole.
    received: Option<Instant>,
    /// When all of it had gone on, in the attempt under way.
    sent: Option<Instant>,
    /// What may not come behind it.
    untrailed: Vec<HeaderName>,
}

/// The beginning of a body.
pub struct Begun {
    kept: Vec<Frame>,
    bytes: usize,
    replays: Replays,
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.replays.give_back(self.bytes);
    }
}

impl<'a, B: FrameSource> Upload<'a, B> {
    pub fn new(live: &'a mut B, keep: bool, replays: &Replays) -> Self {
        let (kept, mirrors) = (Vec::new(), Vec::new());
        let passed = Meter::default();
        Self {
            live,
            kept,
            kept_bytes: 0,
            at: 0,
            keeping: keep,
            lost: false,
            replays: replays.clone(),
            mirrors,
            passed,
            received: None,
            sent: None,
            untrailed: Vec::new(),
        }
    }

    /// Lets no trailers of these names pass: as headers they say what was verified.
    pub fn keep_out(&mut self, names: &[HeaderName]) {
        self.untrailed.extend_from_slice(names);
    }

    /// What an attempt is given.
    fn given(&mut self, frame: Option<Frame>) -> Option<Frame> {
        let frame = self.without_untrailed(frame?);
        self.passed.see(&frame);
        Some(frame)
    }

    fn without_untrailed(&self, mut frame: Frame) -> Frame {
        if let Frame::Trailers(trailers) = &mut frame {
            self.untrailed.iter().for_each(|name| drop(trailers.remove(name)));
        }
        frame
    }

    /// How many frames have been read and are kept.
    pub fn kept_frames(&self) -> usize {
        self.kept.len()
    }

    /// Copies every frame to a mirror, as long as it keeps up.
    pub fn copy_to(&mut self, mirror: mpsc::Sender<Copied>) {
        let replays = &self.replays;
        let kept = self.kept.iter().all(|frame| Copied::of(frame, replays).is_some_and(|copied| mirror.try_send(copied).is_ok()));
        if !kept {
            return;
        }
        self.mirrors.push(mirror);
        if !self.kept.is_empty() && self.live.is_end() {
            self.finish_mirrors();
        }
    }

    /// What has been read of the body, for who sends it on.
    pub fn set_aside(mut self) -> Begun {
        let (kept, bytes) = (std::mem::take(&mut self.kept), std::mem::take(&mut self.kept_bytes));
        Begun { kept, bytes, replays: self.replays.clone() }
    }

    /// Behind what has been read of it before.
    pub fn after(mut self, mut begun: Begun) -> Self {
        (self.kept, self.kept_bytes) = (std::mem::take(&mut begun.kept), std::mem::take(&mut begun.bytes));
        self
    }

    /// Whether the whole body can be sent again.
    pub fn can_repeat(&self) -> bool {
        !self.lost
    }

    /// Begins another attempt.
    pub fn rewind(&mut self) {
        self.at = 0;
        self.passed = Meter::default();
        self.sent = None;
    }

    /// All of it has gone on.
    pub fn mark_sent(&mut self) {
        self.sent = Some(Instant::now());
    }

    /// When all of it had come, and when all of it had gone on, if it has.
    pub fn times(&self) -> (Option<std::time::Instant>, Option<std::time::Instant>) {
        (self.received.map(Instant::into_std), self.sent.map(Instant::into_std))
    }

    /// What the attempt under way has been given.
    pub fn passed(&mut self) -> &mut Meter {
        &mut self.passed
    }

    /// There will be no other attempt: nothing need be kept.
    pub fn settle(&mut self) {
        self.keeping = false;
        if self.at >= self.kept.len() {
            self.forget();
        }
    }

    /// Something of an answer has come, if only of its beginning: there will be no other attempt, whatever becomes of this one.
    pub fn commit(&mut self) {
        self.lost = true;
        self.settle();
    }

    fn forget(&mut self) {
        self.kept = Vec::new();
        self.at = 0;
        self.replays.give_back(std::mem::take(&mut self.kept_bytes));
    }

    /// Whether the client has sent the whole request; the first time that it has is taken down.
    pub fn note_received(&mut self) -> bool {
        let is_end = self.live.is_end();
        if is_end && self.received.is_none() {
            self.received = Some(Instant::now());
        }
        is_end
    }

    /// What a response to it is judged with.
    pub fn heard(&mut self) -> Heard {
        Heard { repeatable: self.can_repeat(), received: self.note_received().then_some(self.received).flatten() }
    }

    /// Reads on while the request cannot be sent yet, as far as may be kept.
    pub async fn read_ahead(&mut self) -> Result<(), BodyError> {
        if self.kept_bytes >= READ_AHEAD || self.live.is_end() {
            return std::future::pending().await;
        }
        match self.live.frame().await? {
            None => self.finish_mirrors(),
            Some(frame) => {
                self.copy(&frame);
                // Beyond the limit of all bodies it is still the first attempt's to send.
                self.kept_bytes += self.charge(&frame, true);
                self.kept.push(compact(&frame));
            }
        }
        if self.live.is_end() {
            self.finish_mirrors();
        }
        Ok(())
    }

    /// A mirror that is too far behind, or gone, is given up; the request goes on.
    fn copy(&mut self, frame: &Frame) {
        let replays = &self.replays;
        self.mirrors.retain(|mirror| Copied::of(frame, replays).is_some_and(|copied| mirror.try_send(copied).is_ok()));
    }

    fn finish_mirrors(&mut self) {
        for mirror in self.mirrors.drain(..) {
            // One that has no room for its end was too far behind.
            let _ = mirror.try_send(Copied::End);
        }
    }

    /// Counts what keeping a frame costs. Nought when there is no room for it, unless it is forced in.
    fn charge(&self, frame: &Frame, forced: bool) -> usize {
        let n = cost(frame);
        if self.replays.take(n, Part::All) {
            return n;
        }
        if forced {
            self.replays.force(n);
            return n;
        }
        0
    }

    fn pass(&mut self, frame: Frame) -> Frame {
        let frame = self.without_untrailed(frame);
        self.copy(&frame);
        let charged = if self.keeping && self.kept_bytes < REPLAY_EACH { self.charge(&frame, false) } else { 0 };
        if charged == 0 {
            if self.keeping {
                self.keeping = false;
                self.forget();
            }
            self.lost = true;
            return frame;
        }
        self.kept_bytes += charged;
        self.kept.push(compact(&frame));
        self.at = self.kept.len();
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

impl<B: RequestBody> Upload<'_, B> {
    pub fn framing(&self) -> Framing {
        self.live.framing()
    }

    pub async fn closed(&mut self) -> Closed {
        self.live.closed().await
    }

    pub fn become_raw(&mut self) {
        self.keeping = false;
        self.live.become_raw();
    }
}

impl<B: FrameSource> Preview for Upload<'_, B> {
    async fn preview(&mut self, enough: usize) -> Result<Beginning, Unseen> {
        let mut data = BytesMut::new();
        let mut add = |frame: &Frame| {
            if let Frame::Data(more) = frame {
                data.extend_from_slice(more);
            }
            data.len()
        };
        let mut seen = self.kept.iter().map(&mut add).last().unwrap_or(0);
        while !self.live.is_end() {
            // Beyond that only whether it was all, if that is known.
            let next = if seen < enough { self.live.frame().await } else { self.live.buffered() };
            let Some(frame) = next.map_err(Unseen::Broken)? else { break };
            self.copy(&frame);
            let charged = self.charge(&frame, false);
            if charged == 0 {
                return Err(Unseen::NoRoom);
            }
            self.kept_bytes += charged;
            self.kept.push(compact(&frame));
            let full = seen >= enough;
            seen = add(&frame);
            if full {
                break;
            }
        }
        if self.live.is_end() {
            self.finish_mirrors();
        }
        Ok(Beginning { data, whole: self.live.is_end() })
    }

    fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.live.is_end()
    }
}

impl<B: FrameSource> FrameSource for Upload<'_, B> {
    async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
        let frame = match self.again() {
            Some(frame) => Some(frame),
            None => self.live.frame().await?.map(|f| self.pass(f)),
        };
        if self.live.is_end() {
            self.finish_mirrors();
        }
        Ok(self.given(frame))
    }

    fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
        let frame = match self.again() {
            Some(frame) => Some(frame),
            None => self.live.buffered()?.map(|f| self.pass(f)),
        };
        if self.live.is_end() {
            self.finish_mirrors();
        }
        Ok(self.given(frame))
    }

    fn is_end(&self) -> bool {
        self.at >= self.kept.len() && self.live.is_end()
    }
}

impl<B> Drop for Upload<'_, B> {
    fn drop(&mut self) {
        self.replays.give_back(self.kept_bytes);
    }
}

#[cfg(test)]
mod tests;
