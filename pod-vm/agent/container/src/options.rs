//! Mount options by name (OCI runtime-spec, config.md "Mounts"; mount_setattr(2) for the attributes).

use crate::error::Refused;

/// `MOUNT_ATTR_…` of linux/mount.h.
pub(crate) mod attribute {
    pub(crate) const RDONLY: u64 = 0x1;
    pub(crate) const NOSUID: u64 = 0x2;
    pub(crate) const NODEV: u64 = 0x4;
    pub(crate) const NOEXEC: u64 = 0x8;
    /// The three times are one field: it has to be cleared as a whole before one is set.
    pub(crate) const ATIME_MASK: u64 = 0x70;
    pub(crate) const NOATIME: u64 = 0x10;
    pub(crate) const STRICTATIME: u64 = 0x20;
    pub(crate) const NODIRATIME: u64 = 0x80;
    pub(crate) const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// How events of mounting pass between a mount and its copies (mount_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Propagation {
    Private,
    Shared,
    Slave,
    Unbindable,
}

impl Propagation {
    /// By its name without the leading `r` for "recursively".
    pub(crate) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "private" => Self::Private,
            "shared" => Self::Shared,
            "slave" => Self::Slave,
            "unbindable" => Self::Unbindable,
            _ => return None,
        })
    }
}

/// What a list of options asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) bind: bool,
    /// Of a bind: everything mounted below comes along.
    pub(crate) recursive: bool,
    /// `MOUNT_ATTR_…` for the mount itself.
    pub(crate) set: u64,
    pub(crate) clear: u64,
    /// The same for the mount and everything below it (`rro` and its like).
    pub(crate) set_all: u64,
    pub(crate) clear_all: u64,
    /// With `true`: recursively.
    pub(crate) propagation: Option<(Propagation, bool)>,
    /// The file system's own, as `key` or `key=value`.
    pub(crate) data: Vec<String>,
}

impl Options {
    /// Reads a list; later entries win, as with mount(8).
    pub(crate) fn parse(field: &str, list: &[String]) -> Result<Self, Refused> {
        let mut options = Self::default();
        for option in list {
            match option.as_str() {
                "bind" => options.bind = true,
                "rbind" => (options.bind, options.recursive) = (true, true),
                // Nothing to do: what they ask for is how it is, or they are for other programs.
                "defaults" | "async" | "auto" | "noauto" | "user" | "nouser" | "_netdev" | "tmpcopyup" => {}
                "idmap" | "ridmap" => {
                    return Err(Refused::new(field, "id-mapped mounts are not made here"));
                }
                name => {
                    let all = name.strip_prefix('r').and_then(named);
                    if let Some((bits, mask)) = named(name) {
                        options.set = options.set & !mask | bits;
                        options.clear |= mask;
                    } else if let Some((bits, mask)) = all {
                        options.set_all = options.set_all & !mask | bits;
                        options.clear_all |= mask;
                    } else if let Some(one) = Propagation::named(name) {
                        options.propagation = Some((one, false));
                    } else if let Some(all) = name.strip_prefix('r').and_then(Propagation::named) {
                        options.propagation = Some((all, true));
                    } else {
                        options.data.push(option.clone());
                    }
                }
            }
        }
        // A bit cannot be set and cleared in one call, but for the field of times, which must.
        options.clear &= !(options.set & !attribute::ATIME_MASK);
        options.clear_all &= !(options.set_all & !attribute::ATIME_MASK);
        Ok(options)
    }
}

/// The bits that an option sets, and the bits that it decides about.
fn named(name: &str) -> Option<(u64, u64)> {
    use attribute as a;
    Some(match name {
        "ro" => (a::RDONLY, a::RDONLY),
        "rw" => (0, a::RDONLY),
        "nosuid" => (a::NOSUID, a::NOSUID),
        "suid" => (0, a::NOSUID),
        "nodev" => (a::NODEV, a::NODEV),
        "dev" => (0, a::NODEV),
        "noexec" => (a::NOEXEC, a::NOEXEC),
        "exec" => (0, a::NOEXEC),
        "nodiratime" => (a::NODIRATIME, a::NODIRATIME),
        "diratime" => (0, a::NODIRATIME),
        "nosymfollow" => (a::NOSYMFOLLOW, a::NOSYMFOLLOW),
        "symfollow" => (0, a::NOSYMFOLLOW),
        "relatime" | "norelatime" | "atime" | "nostrictatime" => (0, a::ATIME_MASK),
        "noatime" => (a::NOATIME, a::ATIME_MASK),
        "strictatime" => (a::STRICTATIME, a::ATIME_MASK),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &[&str]) -> Options {
        let list: Vec<String> = list.iter().map(|option| (*option).to_owned()).collect();
        Options::parse("mounts[0].options", &list).unwrap()
    }

    #[test]
    fn the_last_word_counts() {
        let options = parse(&["ro", "rw", "nosuid"]);
        assert_eq!(options.set, attribute::NOSUID);
        assert_eq!(options.clear, attribute::RDONLY);
        assert_eq!(parse(&["strictatime", "noatime"]).set, attribute::NOATIME);
    }

    #[test]
    fn names_that_begin_with_r_are_told_apart() {
        let options = parse(&["rbind", "rro", "rslave", "ro"]);
        assert!(options.bind && options.recursive);
        assert_eq!((options.set, options.set_all), (attribute::RDONLY, attribute::RDONLY));
        assert_eq!(options.propagation, Some((Propagation::Slave, true)));
        assert_eq!(parse(&["relatime"]).clear, attribute::ATIME_MASK);
        assert_eq!(parse(&["rw"]).set_all, 0);
    }

    #[test]
    fn what_is_not_known_is_the_file_systems() {
        assert_eq!(parse(&["mode=755", "size=64k", "nosuid"]).data, ["mode=755", "size=64k"]);
    }
}
