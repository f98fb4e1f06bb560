//! Names: `vendor/class=device`.

/// `vendor.com/class=device` (SPEC.md, "Fully Qualified Device Name").
pub fn is_qualified(name: &str) -> bool {
    name.split_once('=').is_some_and(|(kind, device)| is_kind(kind) && is_device(device))
}

/// `vendor.com/class`.
pub(super) fn is_kind(kind: &str) -> bool {
    kind.split_once('/').is_some_and(|(vendor, class)| is_class(vendor) && is_class(class))
}

/// A vendor or class: a letter first, a letter or digit last, between them also `_`, `-` and `.`.
pub fn is_class(name: &str) -> bool {
    name.starts_with(|letter: char| letter.is_ascii_alphabetic()) && is_word(name, "_-.")
}

/// A device within its kind: may also begin with a digit and have colons.
pub(super) fn is_device(name: &str) -> bool {
    is_word(name, "_-.:")
}

fn is_word(name: &str, between: &str) -> bool {
    let is_edge = |letter: char| letter.is_ascii_alphanumeric();
    name.starts_with(is_edge)
        && name.ends_with(is_edge)
        && name.chars().all(|letter| is_edge(letter) || between.contains(letter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_specification() {
        for name in ["vendor.com/gpu=0", "nvidia.com/gpu=GPU-1:2", "v/c=d", "a-b_c.d/e.f=all"] {
            assert!(is_qualified(name), "{name}");
        }
        for name in [
            "",
            "gpu",
            "vendor.com/gpu",
            "vendor.com/gpu=",
            "=0",
            "/gpu=0",
            "vendor/=0",
            "1vendor/gpu=0",
            "vendor/1gpu=0",
            "vendor/gpu=-0",
            "vendor/gpu=0-",
            "vendor/gpu=a b",
            "vendor-/gpu=0",
            "ven dor/gpu=0",
            "vendor/a/b=0",
            "vendor/gpu=a=b",
            "vendor/gpu=../x",
            "/dev/null",
        ] {
            assert!(!is_qualified(name), "{name}");
        }
    }
}
