//! What is sent back, and what is sent here: read to a limit, and in its time.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use hyper::{
    Response, StatusCode,
    body::{Body as _, Frame, Incoming, SizeHint},
    header::{CONTENT_TYPE, HeaderValue},
};
use serde_json::Value;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::failure::Failure;

/// The largest body that is read, as Kubernetes has it.
const LARGEST: usize = 3 << 20;
/// How long a client may take to send one.
const TIME: Duration = Duration::from_secs(30);
/// Pieces that wait for a slow client.
const PIECES: usize = 16;

/// The body of an answer.
#[derive(Debug)]
pub(crate) enum Body {
    /// All of it at once.
    Whole(Option<Bytes>),
    /// Piece by piece, as they come.
    Pieces(Receiver<Bytes>),
}

impl Body {
    /// A body that is sent while it comes to be. The sender sees it when the client has gone.
    pub(crate) fn pieces() -> (Sender<Bytes>, Self) {
        let (sender, receiver) = channel(PIECES);
        (sender, Self::Pieces(receiver))
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Body::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Body::Pieces(receiver) => receiver
                .poll_recv(context)
                .map(|piece| piece.map(|piece| Ok(Frame::data(piece)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Body::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Body::Pieces(_) => SizeHint::default(),
        }
    }
}

/// An answer.
pub(crate) type Answer = Response<Body>;

/// An answer of this type.
pub(crate) fn answer(status: u16, media_type: &'static str, body: Body) -> Answer {
    let mut answer = Response::new(body);
    *answer.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
    let media_type = HeaderValue::from_static(media_type);
    answer.headers_mut().insert(CONTENT_TYPE, media_type);
    answer
}

/// An object.
pub(crate) fn json(status: u16, object: &Value) -> Answer {
    let text = Bytes::from(object.to_string());
    answer(status, "application/json", Body::Whole(Some(text)))
}

/// A refusal.
pub(crate) fn refusal(failure: &Failure) -> Answer {
    json(failure.code, &failure.status())
}

/// Reads a request's body.
pub(crate) async fn read(mut body: Incoming) -> Result<Bytes, Failure> {
    let whole = async {
        let mut bytes = BytesMut::new();
        loop {
            let frame = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context));
            let Some(frame) = frame.await else {
                return Ok(bytes.freeze());
            };
            let frame =
                frame.map_err(|_| Failure::bad_request("the body ended before it was whole"))?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            if bytes.len() + data.len() > LARGEST {
                return Err(Failure::too_large(LARGEST));
            }
            bytes.extend_from_slice(&data);
        }
    };
    match tokio::time::timeout(TIME, whole).await {
        Ok(read) => read,
        Err(_) => Err(Failure::timeout("the body did not come in time")),
    }
}
