//! What a module says about itself: the section `.modinfo`, a list of `key=value`, each ended by a zero (`include/linux/module.h`,
//! `scripts/mod/modpost.c`).

/// What is needed of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Modinfo {
    /// Modules whose symbols it uses.
    pub(crate) depends: Vec<String>,
    /// Modules, or aliases of some, to be loaded before it where they exist.
    pub(crate) before: Vec<String>,
    /// The same, after it.
    pub(crate) after: Vec<String>,
    /// Names, with wildcards, by which the kernel asks for it.
    pub(crate) aliases: Vec<String>,
    /// Version of the kernel that it was built for.
    pub(crate) release: String,
}

/// A module's name as the kernel has it: files may have `-` where the name has `_`. Nothing but letters, digits and `_` is a name:
/// it becomes a path in the guest and a word in the list.
pub(crate) fn name(text: &str) -> Option<String> {
    let name = text.replace('-', "_");
    let good = !name.is_empty() && name.len() < 56; // MODULE_NAME_LEN
    (good && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')).then_some(name)
}

impl Modinfo {
    pub(crate) fn parse(section: &[u8]) -> Self {
        let mut info = Self::default();
        for field in section.split(|byte| *byte == 0) {
            let Some((key, value)) = std::str::from_utf8(field).ok().and_then(|field| field.split_once('='))
            else {
                continue;
            };
            match key {
                "depends" => {
                    info.depends.extend(value.split(',').filter(|word| !word.is_empty()).map(str::to_owned));
                }
                "softdep" => info.softdep(value),
                "vermagic" => value.split(' ').next().unwrap_or_default().clone_into(&mut info.release),
                // Words of one line each; anything else is no alias that the kernel makes.
                "alias" if value.chars().all(|c| c.is_ascii_graphic()) && !value.is_empty() => {
                    info.aliases.push(value.to_owned());
                }
                _ => {}
            }
        }
        info.aliases.sort();
        info.aliases.dedup();
        info
    }

    /// `pre: a b post: c`, in any order (modprobe.d(5)).
    fn softdep(&mut self, value: &str) {
        let mut list = None;
        for word in value.split_whitespace() {
            match (word, &mut list) {
                ("pre:", _) => list = Some(&mut self.before),
                ("post:", _) => list = Some(&mut self.after),
                (word, Some(list)) => list.push(word.to_owned()),
                (_, None) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read() {
        let info = Modinfo::parse(
            b"alias=fs-x\0depends=a,b-c\0softdep=pre: p q post: r\0softdep=post: s pre: t\0vermagic=6.1.0-50 SMP mod\0alias=a b\0x\0",
        );
        assert_eq!(info.depends, ["a", "b-c"]);
        assert_eq!(info.before, ["p", "q", "t"]);
        assert_eq!(info.after, ["r", "s"]);
        assert_eq!(info.aliases, ["fs-x"]);
        assert_eq!(info.release, "6.1.0-50");
        assert_eq!(Modinfo::parse(b"depends=\0").depends, Vec::<String>::new());
    }

    #[test]
    fn names_are_words() {
        assert_eq!(name("virtio-rng").as_deref(), Some("virtio_rng"));
        for bad in ["", "../x", "a b", "a\n", "a/b", "ä", &"x".repeat(56)] {
            assert_eq!(name(bad), None, "{bad:?}");
        }
    }
}
