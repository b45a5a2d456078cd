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
    for (left, size, repeatable) in [(0, 1, true), (10, 1000, true), (63, 16 * 1024, true), (65, 16 * 1024, false), (100_000, 1, false)] {
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
    let mut bodies = [(); 4].map(|()| Frames { left: REPLAY_SHARE / 65_536, size: 65_536 - size_of::<Frame>(), meter: Meter::default() });
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
