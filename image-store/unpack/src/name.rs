//! Names in a tar: made relative to the target, or refused.
//!
//! As containerd does, a leading `/` and all `.` parts go away; unlike it, `..` is refused instead of being folded:
//! no image has it for a good reason. Whiteouts follow image-spec's layer.md.

use crate::error::{NameProblem, UnpackError};

/// The kernel's PATH_MAX, with its zero byte.
pub(crate) const PATH_MAX: usize = 4096;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Prefix of what aufs kept for itself: `.wh..wh.plnk`, `.wh..wh.aufs`, `.wh..wh.orph`.
const AUFS: &[u8] = b".wh..wh.";

/// Where something lies below the target: parts joined by single slashes, none of them empty, `.` or `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    path: Vec<u8>,
    /// Where the last part starts.
    last: usize,
}

/// What an entry's name says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// The target itself.
    Root,
    /// Something below it.
    Below(Place),
    /// Hides that name in lower layers.
    Whiteout(Place),
    /// Hides everything in lower layers that is in this directory (empty: the target).
    Opaque(Vec<u8>),
    /// What aufs left behind: means nothing.
    Ignored,
}

impl Place {
    /// The directory that it is in; empty for the target.
    pub(crate) fn parent(&self) -> &[u8] {
        &self.path[..self.last.saturating_sub(1)]
    }

    /// The last part.
    pub(crate) fn base(&self) -> &[u8] {
        &self.path[self.last..]
    }

    fn new(path: Vec<u8>) -> Self {
        let last = path.iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
        Self { path, last }
    }
}

/// Reads an entry's name.
pub(crate) fn meaning(name: &[u8]) -> Result<Meaning, UnpackError> {
    let refuse = |problem| Err(UnpackError::name(name, problem));
    let Some(place) = place(name)? else { return Ok(Meaning::Root) };
    let base = place.base();
    let parts = || place.path.split(|&byte| byte == b'/');
    if parts().any(|part| part.starts_with(AUFS) && part != OPAQUE) {
        return Ok(Meaning::Ignored);
    }
    if place.parent().split(|&byte| byte == b'/').any(|part| part.starts_with(WHITEOUT)) {
        return refuse(NameProblem::BelowWhiteout);
    }
    if base == OPAQUE {
        return Ok(Meaning::Opaque(place.parent().to_vec()));
    }
    let Some(hidden) = base.strip_prefix(WHITEOUT) else { return Ok(Meaning::Below(place)) };
    if matches!(hidden, b"" | b"." | b"..") {
        return refuse(NameProblem::Whiteout);
    }
    let mut path = place.path[..place.last].to_vec();
    path.extend_from_slice(hidden);
    Ok(Meaning::Whiteout(Place::new(path)))
}

/// Makes a name relative; `None` is the target itself.
pub(crate) fn place(name: &[u8]) -> Result<Option<Place>, UnpackError> {
    let refuse = |problem| Err(UnpackError::name(name, problem));
    if name.is_empty() {
        return refuse(NameProblem::Empty);
    }
    if name.contains(&0) {
        return refuse(NameProblem::Nul);
    }
    let mut path = Vec::with_capacity(name.len());
    for part in name.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => continue,
            b".." => return refuse(NameProblem::DotDot),
            _ => {}
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(part);
    }
    if path.len() >= PATH_MAX {
        return refuse(NameProblem::TooLong);
    }
    Ok((!path.is_empty()).then(|| Place::new(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn below(path: &str) -> Meaning {
        Meaning::Below(Place::new(path.as_bytes().to_vec()))
    }

    #[test]
    fn names_become_relative() {
        for (name, expected) in [
            ("a", below("a")),
            ("./a/b", below("a/b")),
            ("/a//b/./c/", below("a/b/c")),
            ("///", Meaning::Root),
            ("./", Meaning::Root),
            (".", Meaning::Root),
            ("a...b/..c/...", below("a...b/..c/...")),
            (".wh.a", Meaning::Whiteout(Place::new(b"a".to_vec()))),
            ("d/.wh.a", Meaning::Whiteout(Place::new(b"d/a".to_vec()))),
            ("d/.wh....", Meaning::Whiteout(Place::new(b"d/...".to_vec()))),
            (".wh..wh..opq", Meaning::Opaque(Vec::new())),
            ("a/b/.wh..wh..opq", Meaning::Opaque(b"a/b".to_vec())),
            (".wh..wh.plnk/1.2", Meaning::Ignored),
            ("a/.wh..wh.orph", Meaning::Ignored),
            (".wh", below(".wh")),
        ] {
            assert_eq!(meaning(name.as_bytes()).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        let long = "a/".repeat(PATH_MAX);
        for (name, expected) in [
            ("", NameProblem::Empty),
            ("..", NameProblem::DotDot),
            ("/..", NameProblem::DotDot),
            ("a/../b", NameProblem::DotDot),
            ("a/..", NameProblem::DotDot),
            (".wh.", NameProblem::Whiteout),
            (".wh..", NameProblem::Whiteout),
            (".wh...", NameProblem::Whiteout),
            ("a/.wh..", NameProblem::Whiteout),
            (".wh.a/b", NameProblem::BelowWhiteout),
            (".wh..wh..opq/b", NameProblem::BelowWhiteout),
            ("a\0b", NameProblem::Nul),
            (&long, NameProblem::TooLong),
        ] {
            match meaning(name.as_bytes()) {
                Err(UnpackError::Name { problem, .. }) => assert_eq!(problem, expected, "{name}"),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn parts_of_a_place() {
        let nested = Place::new(b"a/b/c".to_vec());
        assert_eq!((nested.parent(), nested.base()), (&b"a/b"[..], &b"c"[..]));
        let top = Place::new(b"c".to_vec());
        assert_eq!((top.parent(), top.base()), (&b""[..], &b"c"[..]));
    }
}
