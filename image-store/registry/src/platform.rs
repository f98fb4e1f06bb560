//! The platform that images are chosen for: linux on the architecture of this build.

use std::env::consts::ARCH;
use std::fmt;

/// `os/architecture[/variant]` in the words of Go, which image indexes use (image-index.md, "platform").
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default)]
pub(crate) struct Platform {
    pub(crate) os: String,
    pub(crate) architecture: String,
    pub(crate) variant: String,
}

/// How well a platform fits; more is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Fit(u8);

/// What this build runs on, and which variants of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostPlatform {
    architecture: &'static str,
    /// The level of the baseline variant and of the best one that runs here: `v1` and `v3`, say.
    variants: (u8, u8),
}

impl Platform {
    /// Marks attestations and other documents that are no images.
    pub(crate) fn is_unknown(&self) -> bool {
        self.os == "unknown" || self.architecture == "unknown"
    }
}

impl HostPlatform {
    /// Of this build and this processor.
    pub(crate) fn detect() -> Self {
        match ARCH {
            "x86_64" => Self { architecture: "amd64", variants: (1, amd64_level()) },
            "aarch64" => Self { architecture: "arm64", variants: (8, 8) },
            "arm" => Self { architecture: "arm", variants: (5, 7) },
            "x86" => Self { architecture: "386", variants: (0, 0) },
            "powerpc64" => Self { architecture: "ppc64le", variants: (0, 0) },
            "loongarch64" => Self { architecture: "loong64", variants: (0, 0) },
            other => Self { architecture: other, variants: (0, 0) },
        }
    }

    /// How well `platform` runs here; `None`: not at all. The baseline comes before what only some processors can
    /// run, so that every node of a cluster, and every other runtime, chooses the same image.
    pub(crate) fn fit(&self, platform: &Platform) -> Option<Fit> {
        if platform.os != "linux" || platform.architecture != self.architecture {
            return None;
        }
        let (baseline, best) = self.variants;
        if platform.variant.is_empty() {
            return Some(Fit(u8::MAX));
        }
        let level: u8 = platform.variant.strip_prefix('v')?.parse().ok()?;
        if level < baseline || level > best {
            return None;
        }
        // 32-bit ARM has no common baseline: every level there is newer and better.
        let is_baseline = level == baseline && self.architecture != "arm";
        Some(if is_baseline { Fit(u8::MAX) } else { Fit(level) })
    }
}

impl fmt::Display for HostPlatform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "linux/{}", self.architecture)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

/// The micro-architecture level of the x86-64 psABI ("Micro-Architecture Levels") that this processor has.
#[cfg(target_arch = "x86_64")]
fn amd64_level() -> u8 {
    use std::arch::is_x86_feature_detected as has;
    let v2 = has!("cmpxchg16b")
        && has!("popcnt")
        && has!("sse3")
        && has!("ssse3")
        && has!("sse4.1")
        && has!("sse4.2");
    let v3 = v2
        && has!("avx")
        && has!("avx2")
        && has!("bmi1")
        && has!("bmi2")
        && has!("f16c")
        && has!("fma")
        && has!("lzcnt")
        && has!("movbe");
    let v4 =
        v3 && has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
    1 + u8::from(v2) + u8::from(v3) + u8::from(v4)
}

#[cfg(not(target_arch = "x86_64"))]
fn amd64_level() -> u8 {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_owned);
        let mut next = || parts.next().unwrap_or_default();
        Platform { os: next(), architecture: next(), variant: next() }
    }

    #[test]
    fn variants_fit_as_far_as_the_processor_goes() {
        let host = HostPlatform { architecture: "amd64", variants: (1, 3) };
        let fit = |text: &str| host.fit(&platform(text));
        assert!(fit("linux/amd64").is_some());
        assert_eq!(fit("linux/amd64"), fit("linux/amd64/v1"));
        assert!(fit("linux/amd64") > fit("linux/amd64/v3"));
        assert!(fit("linux/amd64/v3") > fit("linux/amd64/v2"));
        for other in ["linux/amd64/v4", "linux/amd64/x", "linux/arm64", "windows/amd64", "unknown/unknown"] {
            assert_eq!(fit(other), None, "{other}");
        }
        let arm = HostPlatform { architecture: "arm", variants: (5, 7) };
        assert!(arm.fit(&platform("linux/arm/v7")) > arm.fit(&platform("linux/arm/v6")));
        let arm64 = HostPlatform { architecture: "arm64", variants: (8, 8) };
        assert_eq!(arm64.fit(&platform("linux/arm64")), arm64.fit(&platform("linux/arm64/v8")));
        assert_eq!(arm64.fit(&platform("linux/arm64/v9")), None);
    }

    #[test]
    fn this_build_has_a_platform() {
        let host = HostPlatform::detect();
        assert!(
            host.fit(&Platform {
                os: "linux".into(),
                architecture: host.architecture.into(),
                variant: String::new()
            })
            .is_some()
        );
        assert!(host.to_string().starts_with("linux/"));
    }
}
