//! The resize stream: JSON objects one after the other, each the size of the client's terminal.

use serde::Deserialize;

use crate::TerminalSize;

/// The most that an unfinished object may take, in bytes.
const MAX_HELD: usize = 1 << 10;

#[derive(Debug, Deserialize)]
struct Size {
    #[serde(alias = "width")]
    #[serde(rename = "Width", default)]
    width: u16,
    #[serde(alias = "height")]
    #[serde(rename = "Height", default)]
    height: u16,
}

/// Collects bytes into sizes.
#[derive(Debug, Default)]
pub(crate) struct Resizes {
    held: Vec<u8>,
}

/// The stream holds something else.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotASize;

impl Resizes {
    /// The last size that is complete with these bytes: of several, the earlier are outdated.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<Option<TerminalSize>, NotASize> {
        self.held.extend_from_slice(bytes);
        let mut latest = None;
        let mut sizes = serde_json::Deserializer::from_slice(&self.held).into_iter::<Size>();
        let used = loop {
            let used = sizes.byte_offset();
            match sizes.next() {
                Some(Ok(Size { width, height })) => latest = Some(TerminalSize { width, height }),
                Some(Err(error)) if error.is_eof() => break used,
                Some(Err(_)) => return Err(NotASize),
                None => break self.held.len(),
            }
        };
        self.held.drain(..used);
        if self.held.len() > MAX_HELD { Err(NotASize) } else { Ok(latest) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn size(width: u16, height: u16) -> TerminalSize {
        TerminalSize { width, height }
    }

    #[test]
    fn sizes_however_they_are_cut() {
        let mut resizes = Resizes::default();
        assert_eq!(resizes.take(b"{\"Width\":80,\"Height\":24}\n"), Ok(Some(size(80, 24))));
        assert_eq!(resizes.take(b"{\"Width\":8"), Ok(None));
        assert_eq!(resizes.take(b"1,\"Height\":25}{\"Width\":82,\"Height\":26}{\"W"), Ok(Some(size(82, 26))));
        assert_eq!(resizes.take(b"idth\":1,\"Height\":2}"), Ok(Some(size(1, 2))));
        assert_eq!(resizes.take(b"{\"width\":3,\"height\":4,\"x\":null}"), Ok(Some(size(3, 4))));
        assert_eq!(resizes.take(b"  \n"), Ok(None));
    }

    #[test]
    fn anything_else_ends_it() {
        for wrong in
            [&b"hello"[..], b"{\"Width\":-1}", b"{\"Width\":70000,\"Height\":1}", b"\"80x24\"", &[b' '; 5000]]
        {
            let mut resizes = Resizes::default();
            let first = resizes.take(wrong);
            assert!(first == Err(NotASize) || wrong[0] == b' ', "{wrong:?}");
        }
        let mut resizes = Resizes::default();
        let endless = "{\"a\":\"".to_owned() + &"x".repeat(2000);
        assert_eq!(resizes.take(endless.as_bytes()), Err(NotASize));
    }
}
