//! A layer's bytes, in order and exactly as many as its descriptor says, over as many connections as it takes.
//!
//! Where a connection breaks or falls silent, the next one asks for the rest (Range, RFC 9110 §14). A server that
//! knows no ranges answers with everything; then what was delivered already is skipped. An endpoint gets a few
//! attempts, more as long as they bring something; then the next endpoint goes on where it stopped.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::header::{CONTENT_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use tokio::time::{Instant, sleep_until, timeout};

use crate::digest::Digest;
use crate::endpoint::Kind;
use crate::error::{Attempts, RegistryError};
use crate::failure::Failure;
use crate::manifest::LayerDescriptor;
use crate::session::Wire;
use crate::source::Source;
use crate::transport::refuse_encoding;

/// Attempts at one endpoint that bring nothing.
const FRUITLESS_MAX: u32 = 5;
/// What counts as something: a server must not keep us reconnecting for a byte at a time.
const FRUIT: u64 = 64 << 10;
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// All bytes are there; how long to wait for the end that HTTP's framing may still owe.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// A blob's bytes in order. Resumes by itself (Range) after a broken connection, at the next endpoint if need be.
/// Ends after exactly the descriptor's size; does **not** verify the digest (the caller hashes). Dropping it drops
/// the connection.
pub struct BlobStream {
    wire: Arc<Wire>,
    source: Arc<Source>,
    digest: Digest,
    size: u64,
    /// Delivered so far.
    offset: u64,
    /// Endpoints in the order to be asked; the first `asked` of them are done with.
    order: Vec<usize>,
    asked: usize,
    attempts: Attempts,
    state: State,
    fruitless: u32,
    /// Where the last connection broke.
    broke_at: u64,
    /// Endpoints that delivered something.
    contributors: Vec<usize>,
}

enum State {
    /// To be opened, not before the time given.
    Closed(Option<Instant>),
    Open {
        body: Incoming,
        /// Bytes at the front that were delivered before.
        skip: u64,
    },
    Done,
}

impl BlobStream {
    pub(crate) async fn open(
        wire: Arc<Wire>,
        source: Arc<Source>,
        layer: &LayerDescriptor,
    ) -> Result<Self, RegistryError> {
        let mut stream = Self {
            wire,
            order: source.for_content(),
            source,
            digest: layer.digest.clone(),
            size: layer.size,
            offset: 0,
            asked: 0,
            attempts: Attempts::default(),
            state: State::Closed(None),
            fruitless: 0,
            broke_at: 0,
            contributors: Vec::new(),
        };
        if stream.size == 0 {
            stream.state = State::Done;
        }
        while let State::Closed(_) = stream.state {
            stream.connect().await?;
        }
        Ok(stream)
    }

    /// How many bytes it will deliver in all.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many bytes it has delivered.
    pub fn position(&self) -> u64 {
        self.offset
    }

    /// The next bytes; `None` at the end. May be dropped and called again without losing any.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            let limit = self.wire.transport.progress_timeout();
            let (body, skip) = match &mut self.state {
                State::Done => return Ok(None),
                State::Closed(_) => {
                    self.connect().await?;
                    continue;
                }
                State::Open { body, skip } => (body, skip),
            };
            if self.offset == self.size {
                return self.end().await;
            }
            let mut data = match timeout(limit, body.frame()).await {
                Err(_) => {
                    self.broken(Failure::Stalled(limit))?;
                    continue;
                }
                Ok(None) => {
                    let (got, size) = (self.offset, self.size);
                    self.broken(Failure::CutShort { got, size })?;
                    continue;
                }
                Ok(Some(Err(error))) => {
                    self.broken(Failure::from_body(&error))?;
                    continue;
                }
                Ok(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
            };
            let skipped = usize::try_from(*skip).unwrap_or(usize::MAX).min(data.len());
            data.advance(skipped);
            *skip -= skipped as u64;
            if data.is_empty() {
                continue;
            }
            let end = self.offset + data.len() as u64;
            if end > self.size {
                return Err(self.too_long(end));
            }
            self.offset = end;
            self.contributed();
            return Ok(Some(data));
        }
    }

    /// To be called when the bytes turn out not to have the digest: whoever delivered them is asked last from now
    /// on. Says whether somebody else is left, so that opening the layer again makes sense.
    pub fn reject(self) -> bool {
        for position in &self.contributors {
            self.source.sessions[*position].demote();
        }
        self.source.for_content().iter().any(|position| !self.source.sessions[*position].is_demoted())
    }

    /// Everything is delivered; whatever comes now is too much.
    async fn end(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let limit = self.wire.transport.progress_timeout().min(END_TIMEOUT);
        while let State::Open { body, .. } = &mut self.state {
            match timeout(limit, body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    let extra = frame.into_data().map_or(0, |data| data.len() as u64);
                    if extra > 0 {
                        return Err(self.too_long(self.size + extra));
                    }
                }
                // A body whose end is missing is complete all the same: its size says so, its digest will tell.
                Ok(None | Some(Err(_))) | Err(_) => self.state = State::Done,
            }
        }
        Ok(None)
    }

    /// One attempt to get a body that goes on at `offset`.
    async fn connect(&mut self) -> Result<(), RegistryError> {
        if let State::Closed(Some(not_before)) = self.state {
            sleep_until(not_before).await;
        }
        let Some(&position) = self.order.get(self.asked) else { return Err(self.exhausted()) };
        match self.request(position).await {
            Ok((body, skip)) => {
                self.state = State::Open { body, skip };
                Ok(())
            }
            Err(failure) => self.broken(failure),
        }
    }

    async fn request(&self, position: usize) -> Result<(Incoming, u64), Failure> {
        let mut headers = HeaderMap::new();
        if self.offset > 0 {
            let range = format!("bytes={}-", self.offset);
            let range = HeaderValue::from_str(&range).map_err(|error| Failure::Range(error.to_string()))?;
            headers.insert(RANGE, range);
        }
        let session = &self.source.sessions[position];
        let response = session.get(&self.wire, Kind::Blobs, self.digest.as_str(), &headers).await?;
        refuse_encoding(response.headers())?;
        let skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                check_range(&response, self.offset, self.size)?;
                0
            }
            _ => self.offset,
        };
        let announced = response.body().size_hint().exact();
        if let Some(length) = announced
            && length > self.size - self.offset + skip
        {
            let got = length + self.offset - skip;
            return Err(Failure::WrongSize { digest: self.digest.clone(), got, size: self.size });
        }
        Ok((response.into_body(), skip))
    }

    /// Decides how to go on after a failure: again here, at the next endpoint, or not at all.
    fn broken(&mut self, failure: Failure) -> Result<(), RegistryError> {
        if self.offset - self.broke_at >= FRUIT {
            self.fruitless = 0;
        }
        self.broke_at = self.offset;
        self.fruitless += 1;
        let is_last = self.asked + 1 >= self.order.len();
        // An endpoint that does not even accept is left for another, if there is one.
        let is_over = !failure.is_transient() || (failure.is_dead_end() && !is_last);
        if !is_over && self.fruitless <= FRUITLESS_MAX {
            let backoff = BACKOFF_MIN.saturating_mul(1 << (self.fruitless - 1)).min(BACKOFF_MAX);
            tracing::debug!(
                digest = %self.digest, offset = self.offset, reason = %failure, "layer transfer is resumed"
            );
            self.state = State::Closed(Some(Instant::now() + backoff));
            return Ok(());
        }
        self.state = State::Closed(None);
        self.give_up(failure);
        if self.asked >= self.order.len() { Err(self.exhausted()) } else { Ok(()) }
    }

    fn give_up(&mut self, failure: Failure) {
        if let Some(&position) = self.order.get(self.asked) {
            let session = &self.source.sessions[position];
            if failure.is_dead_end() {
                session.demote();
            }
            self.attempts.add(session.shown(Kind::Blobs, self.digest.as_str()), failure);
        }
        self.asked += 1;
        self.fruitless = 0;
    }

    /// Nothing that was delivered can be trusted to be this blob.
    fn too_long(&mut self, got: u64) -> RegistryError {
        self.contributed();
        self.give_up(Failure::WrongSize { digest: self.digest.clone(), got, size: self.size });
        self.state = State::Closed(None);
        self.asked = self.order.len();
        self.exhausted()
    }

    fn contributed(&mut self) {
        if let Some(position) = self.order.get(self.asked)
            && self.contributors.last() != Some(position)
        {
            self.contributors.push(*position);
        }
    }

    fn exhausted(&mut self) -> RegistryError {
        let subject = format!("{} of {}", self.digest, self.source.reference);
        if self.order.is_empty() {
            return RegistryError::NoEndpoint { reference: subject };
        }
        RegistryError::Endpoints {
            action: "fetch layer",
            subject,
            attempts: std::mem::take(&mut self.attempts),
        }
    }
}

/// A 206 must go on exactly where the bytes ended, in a blob of the right size.
fn check_range(response: &Response<Incoming>, offset: u64, size: u64) -> Result<(), Failure> {
    let header =
        response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let wrong = || {
        let header = crate::failure::printable(header);
        Failure::Range(format!("asked for bytes from {offset} of {size}, its Content-Range is {header:?}"))
    };
    let (start, end, total) = parse_range(header).ok_or_else(wrong)?;
    if start != offset || end < start || end >= size || total.is_some_and(|total| total != size) {
        return Err(wrong());
    }
    Ok(())
}

/// `bytes START-END/TOTAL`, where the total may be `*`.
fn parse_range(header: &str) -> Option<(u64, u64, Option<u64>)> {
    let (unit, range) = header.trim().split_once(' ')?;
    let (range, total) = range.split_once('/')?;
    let (start, end) = range.trim().split_once('-')?;
    let total = if total.trim() == "*" { None } else { Some(total.trim().parse().ok()?) };
    unit.eq_ignore_ascii_case("bytes").then_some((start.parse().ok()?, end.parse().ok()?, total))
}

impl fmt::Debug for BlobStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobStream")
            .field("digest", &self.digest)
            .field("size", &self.size)
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(parse_range("bytes 5-9/10"), Some((5, 9, Some(10))));
        assert_eq!(parse_range("bytes 5-9/*"), Some((5, 9, None)));
        for garbage in ["", "bytes", "bytes 5-9", "bytes */10", "items 5-9/10", "bytes -9/10", "bytes 5-x/10"]
        {
            assert_eq!(parse_range(garbage), None, "{garbage}");
        }
    }
}
