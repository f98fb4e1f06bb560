//! The mounts of this mount namespace, as proc_pid_mountinfo(5) lists them.

use std::path::PathBuf;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// As statx(2) says it (STATX_MNT_ID).
    pub(crate) id: u64,
    /// `major:minor` of the file system.
    pub(crate) device: String,
    /// What of the file system is shown, and where.
    pub(crate) root: PathBuf,
    pub(crate) point: PathBuf,
    /// Its type.
    pub(crate) kind: String,
}

/// All of them; none where /proc cannot be read.
pub(crate) fn read() -> Vec<Mounted> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<Mounted> {
    let (fields, rest) = line.split_once(" - ")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let [id, _, device, root, point, ..] = fields.as_slice() else { return None };
    Some(Mounted {
        id: id.parse().ok()?,
        device: (*device).to_owned(),
        root: unescaped(root),
        point: unescaped(point),
        kind: rest.split(' ').next()?.to_owned(),
    })
}

/// Blanks and backslashes are octal numbers.
fn unescaped(field: &str) -> PathBuf {
    let mut text = field.to_owned();
    for (escape, character) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        text = text.replace(escape, character);
    }
    PathBuf::from(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_optional_fields_and_escapes() {
        let line =
            r"36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue";
        let mounted = parse(line).unwrap();
        assert_eq!((mounted.id, mounted.device.as_str(), mounted.kind.as_str()), (36, "98:0", "ext3"));
        assert_eq!((mounted.root, mounted.point), ("/mnt1".into(), "/mnt 2".into()));
        assert_eq!(parse("36 35 98:0"), None);
        assert!(read().iter().any(|mounted| mounted.point.as_os_str() == "/proc"));
    }
}
