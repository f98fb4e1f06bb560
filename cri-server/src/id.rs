//! Identifiers of pods and containers: 64 lowercase hex digits, as kubelet and cAdvisor expect in cgroup names.

use std::fmt;
use std::str::FromStr;

/// Why a text is no identifier.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no identifier: expected 64 lowercase hex digits")]
pub(crate) struct InvalidId(String);

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub(crate) struct $name(Box<str>);

        impl $name {
            /// A fresh random one.
            pub(crate) fn random() -> Self {
                Self(random_hex(32).into())
            }

            pub(crate) fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let digits = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
                if text.len() == 64 && digits { Ok(Self(text.into())) } else { Err(InvalidId(text.into())) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

identifier!(
    /// A pod sandbox.
    PodId
);
identifier!(
    /// A container.
    ContainerId
);

/// `bytes` random bytes in hex.
pub(crate) fn random_hex(bytes: usize) -> String {
    let mut buffer = vec![0_u8; bytes];
    fill(&mut buffer);
    hex::encode(buffer)
}

pub(crate) fn random_number() -> u32 {
    let mut buffer = [0; 4];
    fill(&mut buffer);
    u32::from_ne_bytes(buffer)
}

fn fill(buffer: &mut [u8]) {
    let mut filled = 0;
    while filled < buffer.len() {
        // getrandom(2) fails only where the kernel has no random source at all (ENOSYS before 3.17).
        filled += rustix::rand::getrandom(&mut buffer[filled..], rustix::rand::GetRandomFlags::empty())
            .expect("the kernel has getrandom");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_64_lowercase_hex_digits_are_an_identifier() {
        assert!(PodId::random().as_str().parse::<PodId>().is_ok());
        for bad in ["", "abc", &"A".repeat(64), &"g".repeat(64), &"a".repeat(65), "../../../etc/passwd"] {
            assert!(bad.parse::<ContainerId>().is_err(), "{bad}");
        }
    }
}
