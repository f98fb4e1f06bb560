//! The tree that overlayfs would show of an image's layers (kernel, `Documentation/filesystems/overlayfs.rst`), as a stream.
//!
//! Of what the layers have under one name the topmost counts. Directories under one name are one, with the owner and mode of the topmost, down
//! to one that is opaque or something else. What overlayfs does not do is not done here either: the root is merged even if it is opaque.

use std::io::Read;

use crate::ErofsError;
use crate::index::{IndexReader, Record};
use crate::node::{Kind, Node};

/// One step through the merged tree, depth first, names in the order of their bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A directory; what is in it follows. The root's name is empty.
    Enter {
        /// Name in its directory.
        name: Vec<u8>,
        /// What is there.
        node: Node,
    },
    /// Any other file.
    File {
        /// Name in its directory.
        name: Vec<u8>,
        /// What is there.
        node: Node,
        /// Number of the layer that it is from, the lowest being 0.
        layer: usize,
    },
    /// The end of a directory.
    Leave,
}

/// Merges layers.
pub struct Merge<R> {
    /// Lowest first.
    layers: Vec<Cursor<R>>,
    /// For each directory that is open: the layers that take part in it, topmost first.
    open: Vec<Vec<usize>>,
    begun: bool,
}

struct Cursor<R> {
    reader: IndexReader<R>,
    head: Option<Record>,
}

impl<R: Read> Cursor<R> {
    fn take(&mut self) -> Result<Option<Record>, ErofsError> {
        Ok(std::mem::replace(&mut self.head, self.reader.next()?))
    }

    /// The name of the next file of the directory that the cursor is in.
    fn name(&self) -> Option<&[u8]> {
        match &self.head {
            Some(Record::File { name, .. }) => Some(name),
            Some(Record::Leave) | None => None,
        }
    }

    fn kind(&self) -> Option<&Kind> {
        match &self.head {
            Some(Record::File { node, .. }) => Some(&node.kind),
            Some(Record::Leave) | None => None,
        }
    }

    /// Passes over the next file with everything below it.
    fn skip(&mut self) -> Result<(), ErofsError> {
        let mut depth = 0_usize;
        loop {
            match self.take()? {
                Some(Record::File { node, .. }) if node.is_directory() => depth += 1,
                Some(Record::File { .. }) => {}
                Some(Record::Leave) => depth = depth.saturating_sub(1),
                None => return Ok(()),
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }
}

impl<R: Read> Merge<R> {
    /// From the indexes of the layers, lowest first, each at its beginning.
    pub fn new(indexes: impl IntoIterator<Item = R>) -> Result<Self, ErofsError> {
        let mut layers = Vec::new();
        for index in indexes {
            let mut reader = IndexReader::new(index)?;
            let head = reader.next()?;
            layers.push(Cursor { reader, head });
        }
        Ok(Self { layers, open: Vec::new(), begun: false })
    }

    /// The next step; `None` after the end of the root.
    pub fn step(&mut self) -> Result<Option<Event>, ErofsError> {
        if !self.begun {
            self.begun = true;
            return self.root().map(Some);
        }
        loop {
            let Some(taking_part) = self.open.last().cloned() else { return Ok(None) };
            let Some(name) =
                taking_part.iter().filter_map(|&layer| self.layers[layer].name()).min().map(<[u8]>::to_vec)
            else {
                for &layer in &taking_part {
                    self.layers[layer].take()?;
                }
                self.open.pop();
                return Ok(Some(Event::Leave));
            };
            let has_it = |layer: &usize| self.layers[*layer].name() == Some(&name);
            let having: Vec<usize> = taking_part.into_iter().filter(has_it).collect();
            if let Some(event) = self.resolve(name, &having)? {
                return Ok(Some(event));
            }
        }
    }

    fn root(&mut self) -> Result<Event, ErofsError> {
        let mut root = Node::default();
        // The topmost comes last and counts.
        for layer in &mut self.layers {
            if let Some(Record::File { node, .. }) = layer.take()? {
                root = node;
            }
        }
        self.open.push((0..self.layers.len()).rev().collect());
        Ok(Event::Enter { name: Vec::new(), node: root })
    }

    /// What is seen under a name that these layers have, topmost first; `None`: nothing.
    fn resolve(&mut self, name: Vec<u8>, having: &[usize]) -> Result<Option<Event>, ErofsError> {
        let Some((&top, below)) = having.split_first() else { return Ok(None) };
        let Some(Record::File { node, .. }) = self.layers[top].take()? else { return Ok(None) };
        let mut taking_part = vec![top];
        // Whether what is further below is hidden.
        let mut closed = node.kind != Kind::Directory { opaque: false };
        for &layer in below {
            let cursor = &mut self.layers[layer];
            match cursor.kind() {
                Some(&Kind::Directory { opaque }) if !closed => {
                    cursor.take()?;
                    taking_part.push(layer);
                    closed = opaque;
                }
                _ => {
                    cursor.skip()?;
                    closed = true;
                }
            }
        }
        Ok(match node.kind {
            Kind::Whiteout => None,
            Kind::Directory { .. } => {
                self.open.push(taking_part);
                Some(Event::Enter { name, node })
            }
            _ => Some(Event::File { name, node, layer: top }),
        })
    }
}
