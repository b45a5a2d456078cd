//! The request's body on its way up: kept as far as it may have to be sent again, and copied to mirrors.

use bytes::BytesMut;
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
        }
    }

    /// Copies every frame to a mirror, as long as it keeps up.
    pub fn copy_to(&mut self, mirror: mpsc::Sender<Copied>) {
        self.mirrors.push(mirror);
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
    pub fn is_sent(&mut self) {
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

    /// Whether the client has sent the whole request.
    pub fn is_received(&mut self) -> bool {
        let is_end = self.live.is_end();
        if is_end && self.received.is_none() {
            self.received = Some(Instant::now());
        }
        is_end
    }

    /// What a response to it is judged with.
    pub fn heard(&mut self) -> Heard {
        Heard { repeatable: self.can_repeat(), received: self.is_received().then_some(self.received).flatten() }
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
        if let Some(frame) = self.again() {
            self.passed.see(&frame);
            return Ok(Some(frame));
        }
        let frame = self.live.frame().await?.map(|f| self.pass(f));
        if let Some(frame) = &frame {
            self.passed.see(frame);
        }
        if self.live.is_end() {
            self.finish_mirrors();
        }
        Ok(frame)
    }

    fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
        if let Some(frame) = self.again() {
            self.passed.see(&frame);
            return Ok(Some(frame));
        }
        let frame = self.live.buffered()?.map(|f| self.pass(f));
        if let Some(frame) = &frame {
            self.passed.see(frame);
        }
        if self.live.is_end() {
            self.finish_mirrors();
        }
        Ok(frame)
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
mod tests {
    use bytes::Bytes;

    use super::{replays::REPLAY_SHARE, *};

    /// A body of so many frames of a size.
    struct Frames {
        left: usize,
        size: usize,
        meter: Meter,
    }

    impl FrameSource for Frames {
        async fn frame(&mut self) -> Result<Option<Frame>, BodyError> {
            self.buffered()
        }

        fn buffered(&mut self) -> Result<Option<Frame>, BodyError> {
            if self.left == 0 {
                return Ok(None);
            }
            self.left -= 1;
            Ok(Some(Frame::Data(Bytes::from(vec![b'x'; self.size]))))
        }

        fn is_end(&self) -> bool {
            self.left == 0
        }
    }

    impl RequestBody for Frames {
        fn meter(&mut self) -> &mut Meter {
            &mut self.meter
        }

        fn framing(&self) -> Framing {
            Framing::Chunked
        }

        async fn closed(&mut self) -> Closed {
            std::future::pending().await
        }

        fn become_raw(&mut self) {}
    }

    async fn all(upload: &mut Upload<'_, Frames>) -> usize {
        let mut total = 0;
        while let Some(frame) = upload.frame().await.expect("a frame") {
            if let Frame::Data(data) = frame {
                total += data.len();
            }
        }
        total
    }

    #[tokio::test]
    async fn a_body_is_sent_again_as_long_as_it_could_be_kept() {
        for (left, size, repeatable) in [(0, 1, true), (10, 1000, true), (63, 16 * 1024, true), (65, 16 * 1024, false), (100_000, 1, false)]
        {
            let replays = Replays::default();
            let mut body = Frames { left, size, meter: Meter::default() };
            let mut upload = Upload::new(&mut body, true, &replays);
            assert_eq!(all(&mut upload).await, left * size);
            assert_eq!(upload.can_repeat(), repeatable, "{left} frames of {size}");
            assert!(replays.used() <= REPLAY_EACH + 17 * 1024, "what keeping costs is counted: {}", replays.used());
            if repeatable {
                upload.rewind();
                assert_eq!(all(&mut upload).await, left * size, "the second time");
                upload.settle();
            }
            drop(upload);
            assert_eq!(replays.used(), 0, "given back");
        }
    }

    #[tokio::test]
    async fn what_is_read_ahead_is_sent_once_and_given_back() {
        let replays = Replays::default();
        for keep in [false, true] {
            let mut body = Frames { left: 20, size: 16 * 1024, meter: Meter::default() };
            let mut upload = Upload::new(&mut body, keep, &replays);
            for _ in 0..3 {
                upload.read_ahead().await.expect("read");
            }
            assert_eq!(all(&mut upload).await, 20 * 16 * 1024);
            assert_eq!(upload.can_repeat(), keep);
            drop(upload);
            assert_eq!(replays.used(), 0);
        }
    }

    #[tokio::test]
    async fn what_is_shown_of_a_body_goes_on_whole() {
        for (left, size, enough, shown, whole) in [
            (0, 1, 10, 0, true),
            (3, 3, 10, 9, true),
            (5, 3, 10, 15, false),
            (4, 3, 10, 12, true),
            (2, 5, 10, 10, true),
            (100, 16 * 1024, 1, 32 * 1024, false),
        ] {
            for keep in [false, true] {
                let replays = Replays::default();
                let mut body = Frames { left, size, meter: Meter::default() };
                let mut upload = Upload::new(&mut body, keep, &replays);
                assert_eq!(upload.is_empty(), left == 0);
                for again in [false, true] {
                    let beginning = upload.preview(enough).await.expect("shown");
                    let more = if again && !whole { size } else { 0 };
                    assert!(beginning.whole || beginning.whole == whole, "{left} of {size}");
                    assert!((shown..=shown + more).contains(&beginning.data.len()), "{left} of {size}: {}", beginning.data.len());
                }
                assert_eq!(all(&mut upload).await, left * size);
                drop(upload);
                assert_eq!(replays.used(), 0, "given back");
            }
        }
    }

    #[tokio::test]
    async fn nothing_is_shown_where_there_is_no_room() {
        let all = Replays::default();
        let owners = [(); 5].map(|()| Share::default());
        let mut bodies =
            [(); 4].map(|()| Frames { left: REPLAY_SHARE / 65_536, size: 65_536 - size_of::<Frame>(), meter: Meter::default() });
        let mut held = Vec::new();
        for (body, owner) in bodies.iter_mut().zip(&owners) {
            let mut full = Upload::new(body, false, &all.of(owner));
            full.preview(usize::MAX).await.expect("shown");
            held.push(full);
            // There is none for the same owner any more; for another as long as there is any.
            for (other, room) in [(owner, false), (&owners[4], held.len() < 4)] {
                let mut body = Frames { left: 1, size: 1, meter: Meter::default() };
                let shown = Upload::new(&mut body, false, &all.of(other)).preview(1).await;
                assert_eq!(shown.is_ok(), room, "{} are held", held.len());
                assert!(room || matches!(shown, Err(Unseen::NoRoom)));
            }
        }
        held.clear();
        assert_eq!(all.used(), 0, "given back");
        assert!(owners.iter().all(|owner| all.of(owner).used() == 0 && owner.used() == 0));
    }

    #[tokio::test]
    async fn what_mirrors_hold_is_bounded_in_bytes_and_leaves_requests_room() {
        let (all_of, owner) = (Replays::default(), Share::default());
        let replays = all_of.of(&owner);
        let mut held = Vec::new();
        let mut ended = 0;
        for _ in 0..40 {
            let mut body = Frames { left: 16, size: 64 * 1024, meter: Meter::default() };
            let mut upload = Upload::new(&mut body, false, &replays);
            let (sender, receiver) = mpsc::channel(MIRROR_BEHIND);
            upload.copy_to(sender);
            assert_eq!(all(&mut upload).await, 16 * 64 * 1024, "the request goes on");
            held.push(receiver);
        }
        assert!(replays.used() <= REPLAY_SHARE / 2, "{}", replays.used());
        assert!(replays.used() > REPLAY_SHARE / 4, "{}", replays.used());
        let mut body = Frames { left: 10, size: 64 * 1024, meter: Meter::default() };
        let mut upload = Upload::new(&mut body, true, &replays);
        all(&mut upload).await;
        assert!(upload.can_repeat(), "there is room for requests");
        drop(upload);
        for mut receiver in held.drain(..) {
            while let Some(piece) = receiver.recv().await {
                ended += usize::from(matches!(piece, Copied::End));
            }
        }
        assert!((1..40).contains(&ended), "those there was no room for are cut: {ended}");
        assert_eq!(all_of.used(), 0, "given back");
    }

    #[tokio::test]
    async fn a_mirror_is_told_the_end_only_if_it_was_sent_everything() {
        for (left, complete) in [(3, true), (MIRROR_BEHIND + 1, false)] {
            let mut body = Frames { left, size: 10, meter: Meter::default() };
            let mut upload = Upload::new(&mut body, false, &Replays::default());
            let (sender, mut receiver) = mpsc::channel(MIRROR_BEHIND);
            upload.copy_to(sender);
            assert_eq!(all(&mut upload).await, left * 10, "the request goes on");
            let mut ended = false;
            while let Ok(piece) = receiver.try_recv() {
                ended = matches!(piece, Copied::End);
            }
            assert_eq!(ended, complete);
        }
    }
}
