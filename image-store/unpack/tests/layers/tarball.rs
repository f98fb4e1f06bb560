//! Writes tars, well-formed and otherwise, byte by byte.

pub(crate) const BLOCK: usize = 512;
const CHECKSUM: usize = 148;

/// One header with its content.
#[derive(Clone)]
pub(crate) struct Item {
    pub(crate) name: Vec<u8>,
    pub(crate) flag: u8,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u64,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: u64,
    pub(crate) device: (u64, u64),
    pub(crate) content: Vec<u8>,
    /// What the size field says, if not the content's length.
    pub(crate) size: Option<u64>,
    pub(crate) gnu: bool,
    /// Bytes written over the finished header, before the checksum is taken unless they are the checksum.
    pub(crate) patches: Vec<(usize, Vec<u8>)>,
}

pub(crate) fn item(flag: u8, name: impl AsRef<[u8]>) -> Item {
    Item {
        name: name.as_ref().to_vec(),
        flag,
        link: Vec::new(),
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: 1_000_000_000,
        device: (0, 0),
        content: Vec::new(),
        size: None,
        gnu: false,
        patches: Vec::new(),
    }
}

pub(crate) fn file(name: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Item {
    Item { content: content.as_ref().to_vec(), ..item(b'0', name) }
}

pub(crate) fn directory(name: impl AsRef<[u8]>) -> Item {
    Item { mode: 0o755, ..item(b'5', name) }
}

pub(crate) fn symlink(name: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> Item {
    Item { link: to.as_ref().to_vec(), ..item(b'2', name) }
}

pub(crate) fn hard_link(name: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> Item {
    Item { link: to.as_ref().to_vec(), ..item(b'1', name) }
}

pub(crate) fn device(flag: u8, name: &str, major: u64, minor: u64) -> Item {
    Item { device: (major, minor), ..item(flag, name) }
}

/// An extended header for the next item.
pub(crate) fn pax(records: &[(&str, &[u8])]) -> Item {
    let mut content = Vec::new();
    for (key, value) in records {
        content.extend(pax_record(key, value));
    }
    Item { content, ..item(b'x', "pax") }
}

pub(crate) fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut length = body + 1;
    while length != body + length.to_string().len() {
        length = body + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

/// A GNU long name (`L`) or long link (`K`).
pub(crate) fn long(flag: u8, text: impl AsRef<[u8]>) -> Item {
    let content = [text.as_ref(), b"\0"].concat();
    Item { content, gnu: true, ..item(flag, "././@LongLink") }
}

/// Octal if it fits, base-256 otherwise.
pub(crate) fn number(value: u64, width: usize) -> Vec<u8> {
    let octal = format!("{value:0digits$o}\0", digits = width - 1);
    if octal.len() == width {
        return octal.into_bytes();
    }
    let mut field = vec![0; width];
    field[0] = 0x80;
    let bytes = value.to_be_bytes();
    let count = bytes.len().min(width - 1);
    field[width - count..].copy_from_slice(&bytes[bytes.len() - count..]);
    field
}

impl Item {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut header = [0; BLOCK];
        let mut put =
            |offset: usize, field: &[u8]| header[offset..offset + field.len()].copy_from_slice(field);
        put(0, &self.name[..self.name.len().min(100)]);
        put(100, &number(self.mode, 8));
        put(108, &number(self.uid, 8));
        put(116, &number(self.gid, 8));
        put(124, &number(self.size.unwrap_or(self.content.len() as u64), 12));
        put(136, &number(self.mtime, 12));
        put(156, &[self.flag]);
        put(157, &self.link[..self.link.len().min(100)]);
        put(257, if self.gnu { b"ustar  \0" } else { b"ustar\x0000" });
        put(329, &number(self.device.0, 8));
        put(337, &number(self.device.1, 8));
        for (offset, patch) in &self.patches {
            put(*offset, patch);
        }
        seal(&mut header);
        for (offset, patch) in self.patches.iter().filter(|(offset, _)| *offset == CHECKSUM) {
            header[*offset..offset + patch.len()].copy_from_slice(patch);
        }
        let mut bytes = header.to_vec();
        bytes.extend(&self.content);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    pub(crate) fn mode(mut self, mode: u64) -> Self {
        self.mode = mode;
        self
    }

    pub(crate) fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub(crate) fn mtime(mut self, mtime: u64) -> Self {
        self.mtime = mtime;
        self
    }

    pub(crate) fn size(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }

    pub(crate) fn content(mut self, content: impl AsRef<[u8]>) -> Self {
        self.content = content.as_ref().to_vec();
        self
    }

    pub(crate) fn patch(mut self, offset: usize, bytes: impl AsRef<[u8]>) -> Self {
        self.patches.push((offset, bytes.as_ref().to_vec()));
        self
    }

    pub(crate) fn gnu(mut self) -> Self {
        self.gnu = true;
        self
    }
}

/// Writes the checksum of a header.
pub(crate) fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u64 = header[..BLOCK].iter().map(|&byte| u64::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// The items and an end mark.
pub(crate) fn tar(items: &[Item]) -> Vec<u8> {
    let mut bytes: Vec<u8> = items.iter().flat_map(Item::bytes).collect();
    bytes.extend([0; 2 * BLOCK]);
    bytes
}
