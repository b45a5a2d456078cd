//! Moving bodies: where frames come from, where they go, and the pump between them.
//!
//! Everything here may be dropped at any await and taken up again: what has been read but not written stays with the sink.

use std::{
    future::Future,
    io,
    pin::pin,
    task::{Context, Poll, Waker},
};

use bytes::BytesMut;
use http::{HeaderMap, StatusCode};

use super::{
    framing::Frame,
    meter::Meter,
    wire::{Framing, Malformed},
};

/// Frames put together before they are written.
const AT_ONCE: usize = 8;

/// Why a body does not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("the connection ended before the body did")]
    Truncated,
    #[error("the body is malformed: {0}")]
    Malformed(Malformed),
    /// The other end reset the stream or the connection.
    #[error("the body was cut")]
    Cut(#[source] io::Error),
}

impl From<Malformed> for BodyError {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

/// Where frames come from.
pub trait FrameSource: Send {
    /// The next frame, or `None` at the end.
    fn frame(&mut self) -> impl Future<Output = Result<Option<Frame>, BodyError>> + Send;

    /// A frame that is there already.
    fn buffered(&mut self) -> Result<Option<Frame>, BodyError>;

    /// Whether it is known that nothing more will come.
    fn is_end(&self) -> bool;
}

/// Where frames go.
pub trait FrameSink: Send {
    fn push(&mut self, frame: Frame);

    /// Nothing more will be pushed.
    fn end(&mut self);

    fn has_ended(&self) -> bool;

    /// Whether all that was pushed, and the end, are written.
    fn is_flushed(&self) -> bool;

    fn flush(&mut self) -> impl Future<Output = io::Result<()>> + Send;

    /// Whether there is room for more: nothing is to be read while there is none.
    fn has_room(&self) -> bool {
        true
    }

    /// Completes when there is, which is set aside until it is used or given back.
    fn room(&mut self) -> impl Future<Output = io::Result<()>> + Send {
        std::future::ready(Ok(()))
    }

    /// Others may have it.
    fn give_back(&mut self) {}

    /// Completes when the other end wants no more, if only the sink is told of that.
    fn broken(&mut self) -> impl Future<Output = io::Error> + Send {
        std::future::pending()
    }
}

/// Which side of a pump failed.
#[derive(Debug)]
pub enum Broken {
    Source(BodyError),
    Sink(io::Error),
}

/// Moves frames until the source has ended and everything is written. A sink that takes nothing stops the source.
pub async fn pump(source: &mut impl FrameSource, sink: &mut impl FrameSink) -> Result<(), Broken> {
    fill(source, sink).await?;
    drain(sink).await.map_err(Broken::Sink)
}

/// Writes what has been pushed.
pub async fn drain(sink: &mut impl FrameSink) -> io::Result<()> {
    while !sink.is_flushed() {
        sink.flush().await?;
    }
    Ok(())
}

/// Moves frames until the source has ended. The last of them may not be written yet.
pub async fn fill(source: &mut impl FrameSource, sink: &mut impl FrameSink) -> Result<(), Broken> {
    loop {
        if !sink.has_ended() && sink.has_room() {
            for _ in 0..AT_ONCE {
                let Some(frame) = source.buffered().map_err(Broken::Source)? else { break };
                sink.push(frame);
            }
            if source.is_end() {
                sink.end();
            }
        }
        if sink.has_ended() {
            return Ok(());
        }
        if !sink.is_flushed() {
            sink.flush().await.map_err(Broken::Sink)?;
            continue;
        }
        if !sink.has_room() {
            sink.room().await.map_err(Broken::Sink)?;
            // Not while there is nothing to be had.
            match at_once(source.frame()) {
                Some(frame) => match frame.map_err(Broken::Source)? {
                    Some(frame) => sink.push(frame),
                    None => sink.end(),
                },
                None => sink.give_back(),
            }
            continue;
        }
        let frame = tokio::select! {
            biased;
            frame = source.frame() => frame.map_err(Broken::Source)?,
            error = sink.broken() => return Err(Broken::Sink(error)),
        };
        match frame {
            Some(frame) => sink.push(frame),
            None => sink.end(),
        }
    }
}

/// What a future comes to without waiting.
fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// The beginning of a body.
#[derive(Debug)]
pub struct Beginning {
    pub data: BytesMut,
    /// There is no more of it.
    pub whole: bool,
}

/// Why the beginning of a body cannot be shown.
#[derive(Debug)]
pub enum Unseen {
    Broken(BodyError),
    /// Too much is kept already.
    NoRoom,
}

/// A body that can be looked at before any of it goes on.
pub trait Preview: Send {
    /// Reads until there are `enough` bytes or there is no more. What has been read still goes on later.
    fn preview(&mut self, enough: usize) -> impl Future<Output = Result<Beginning, Unseen>> + Send;

    /// Whether there is no body.
    fn is_empty(&self) -> bool;
}

/// What a client did after its request.
#[derive(Debug)]
pub enum Closed {
    /// It will send no more, and still reads.
    Half,
    /// It is gone.
    Gone(io::Error),
}

/// The body of a request, and what comes after it.
pub trait RequestBody: FrameSource {
    /// The body's length, if it has been told.
    fn framing(&self) -> Framing;

    /// What has passed of it.
    fn meter(&mut self) -> &mut Meter;

    /// After the end of the body: completes when the client has closed, in part or in whole.
    fn closed(&mut self) -> impl Future<Output = Closed> + Send;

    /// Takes what follows as it comes: after the protocol was switched.
    fn become_raw(&mut self);
}

/// A response's head on its way to the client.
#[derive(Debug)]
pub struct ResponseHead {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub framing: Framing,
}

/// Where the response goes.
pub trait Responder: FrameSink {
    /// Whether only [`Responder::gone`] tells of a client that has reset; otherwise its body does too.
    const RESETS_APART: bool;

    /// What has passed of the response.
    fn meter(&mut self) -> &mut Meter;

    /// Whether it answers a HEAD.
    fn is_head(&self) -> bool;

    /// Sends a head before the final one: 100 or 103.
    fn informational(&mut self, status: StatusCode, headers: HeaderMap) -> impl Future<Output = io::Result<()>> + Send;

    /// Puts the head on its way. `close`: the connection must not be used again.
    fn start(&mut self, head: ResponseHead, close: bool) -> io::Result<()>;

    /// Completes when the client does not want the response any more.
    fn gone(&mut self) -> impl Future<Output = io::Error> + Send;
}
