//! From a name in a tar to the way below the target, and what a `.wh.` name asks for.
//!
//! Whiteouts: OCI image-spec, layer.md, "Whiteouts"; `.wh..wh.` names other than the opaque marker are aufs's own
//! book-keeping.

use crate::error::Fault;

const WHITEOUT: &[u8] = b".wh.";
const AUFS: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A name split at its last component; both parts are free of `..`, `.`, NUL and empty components.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// Components above the last one, joined by `/`; empty for the target itself.
    pub(crate) parent: Vec<u8>,
    pub(crate) name: Vec<u8>,
}

impl Place {
    /// `parent` and `name` joined again.
    pub(crate) fn path(&self) -> Vec<u8> {
        if self.parent.is_empty() { self.name.clone() } else { [&self.parent[..], b"/", &self.name].concat() }
    }
}

/// What an entry's name asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// The target directory itself (`./`).
    Root,
    Make(Place),
    /// Hide this name of the layers below.
    Whiteout(Place),
    /// Hide everything the layers below have in this directory.
    Opaque(Vec<u8>),
    /// aufs's book-keeping.
    Nothing,
}

fn components(path: &[u8]) -> Result<Vec<&[u8]>, Fault> {
    let components: Vec<_> =
        path.split(|&byte| byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
    if path.is_empty() || path.contains(&0) || components.contains(&&b".."[..]) {
        return Err(Fault::Name);
    }
    Ok(components)
}

fn place(components: &[&[u8]]) -> Option<Place> {
    let (name, parent) = components.split_last()?;
    Some(Place { parent: parent.join(&b'/'), name: name.to_vec() })
}

/// Reads the name of an entry.
pub(crate) fn wish(path: &[u8]) -> Result<Wish, Fault> {
    let components = components(path)?;
    let Some(mut place) = place(&components) else { return Ok(Wish::Root) };
    let below_whiteout = components[..components.len() - 1].iter().any(|part| part.starts_with(WHITEOUT));
    if place.name == OPAQUE {
        return if below_whiteout { Err(Fault::Whiteout) } else { Ok(Wish::Opaque(place.parent)) };
    }
    if components.iter().any(|part| part.starts_with(AUFS)) {
        return Ok(Wish::Nothing);
    }
    if below_whiteout {
        return Err(Fault::Whiteout);
    }
    let Some(hidden) = place.name.strip_prefix(WHITEOUT) else { return Ok(Wish::Make(place)) };
    if matches!(hidden, b"" | b"." | b"..") {
        return Err(Fault::Whiteout);
    }
    place.name = hidden.to_vec();
    Ok(Wish::Whiteout(place))
}

/// Reads the target of a hard link, which is named like an entry of the same tar.
pub(crate) fn link_target(path: &[u8]) -> Result<Place, Fault> {
    place(&components(path)?).ok_or(Fault::Misplaced("a hard link to the root"))
}

#[cfg(test)]
mod tests {
    use super::{Place, Wish, wish};
    use crate::error::Fault;

    fn make(parent: &str, name: &str) -> Place {
        Place { parent: parent.into(), name: name.into() }
    }

    #[test]
    fn names_are_normalised() {
        for path in ["a/b", "/a/b", "./a/b", "//a/./b/", "a//b/."] {
            assert_eq!(wish(path.as_bytes()), Ok(Wish::Make(make("a", "b"))), "{path}");
        }
        for path in [".", "./", "/", "//./"] {
            assert_eq!(wish(path.as_bytes()), Ok(Wish::Root), "{path}");
        }
        for path in ["", "..", "a/..", "../a", "a/../b", "/..", "a\0b"] {
            assert_eq!(wish(path.as_bytes()), Err(Fault::Name), "{path:?}");
        }
    }

    #[test]
    fn whiteouts_are_told_from_names() {
        assert_eq!(wish(b"d/.wh.x"), Ok(Wish::Whiteout(make("d", "x"))));
        assert_eq!(wish(b".wh...."), Ok(Wish::Whiteout(make("", "..."))));
        assert_eq!(wish(b"d/.wh..wh..opq"), Ok(Wish::Opaque(b"d".to_vec())));
        assert_eq!(wish(b".wh..wh..opq"), Ok(Wish::Opaque(Vec::new())));
        for path in [".wh..wh.plnk", ".wh..wh.plnk/1.2", "d/.wh..wh.aufs"] {
            assert_eq!(wish(path.as_bytes()), Ok(Wish::Nothing), "{path}");
        }
        for path in [".wh.", "d/.wh..", "d/.wh...", ".wh.x/y", ".wh.x/.wh..wh..opq", ".wh./y"] {
            assert_eq!(wish(path.as_bytes()), Err(Fault::Whiteout), "{path}");
        }
    }
}
