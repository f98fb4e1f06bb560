//! Debian's kernel for clouds, fetched by apt: `linux-image-cloud-amd64` of a suite, unpacked and not installed.
//!
//! apt does what it is good at (mirrors, proxies, signatures) in directories of its own, so the machine's package lists, cache and
//! pinning are neither used nor changed. The mirror is the one that the machine's own sources name for the suite, or for the
//! release that it extends (bookworm for bookworm-backports); the kernel's signature chain is checked with Debian's own keys.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use thiserror::Error;

use crate::manifest::Package;

/// The package that depends on the newest kernel.
const META: &str = "linux-image-cloud-amd64";
/// The keys of package debian-archive-keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What to fetch, and from where.
#[derive(Debug, Clone, Default)]
pub struct Debian {
    /// The suite, such as `bookworm` (6.1) or `bookworm-backports` (6.12); the machine's own release if it is left out.
    pub suite: Option<String>,
    /// URL of the archive, if not that of the machine's apt sources.
    pub mirror: Option<String>,
}

/// A kernel package, unpacked.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// The kernel.
    pub vmlinuz: PathBuf,
    /// Its modules.
    pub modules: PathBuf,
    /// Which package it is.
    pub package: Package,
}

/// Why the kernel could not be fetched.
#[derive(Debug, Error)]
pub enum FetchError {
    /// A program that is needed did not start.
    #[error(
        "starting {program}: kernels are fetched with apt and dpkg; elsewhere give --kernel and --modules"
    )]
    Start {
        /// Its name.
        program: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed while {action}:\n{said}")]
    Failed {
        /// Its name.
        program: &'static str,
        /// What it was to do.
        action: String,
        /// The end of what it said.
        said: String,
    },
    /// A file could not be read or written.
    #[error("{action} {}", path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// The machine does not say which release it is.
    #[error("this machine's /etc/os-release names no release of Debian: name the suite (--debian SUITE)")]
    NoRelease,
    /// Not a name of a suite or a URL.
    #[error("{0:?} is no name of a suite and no URL")]
    BadName(String),
    /// No archive for the suite.
    #[error(
        "no apt source of this machine has {suite} or the release that it belongs to: name its archive (--mirror URL)"
    )]
    NoMirror {
        /// What was looked for.
        suite: String,
    },
    /// The suite has no such package.
    #[error("suite {suite} has no package {META}")]
    NoPackage {
        /// What was searched.
        suite: String,
    },
    /// The package has no kernel.
    #[error("package {package} does not hold one kernel with its modules")]
    Content {
        /// Its name.
        package: String,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FetchError {
    move |source| FetchError::File { action, path: path.to_owned(), source }
}

/// Fetches the kernel into `directory`, which is empty; each step is told to `progress`.
pub fn fetch(what: &Debian, directory: &Path, progress: &mut dyn FnMut(&str)) -> Result<Fetched, FetchError> {
    let suite = match &what.suite {
        Some(suite) => suite.clone(),
        None => own_release().ok_or(FetchError::NoRelease)?,
    };
    let mirror = match &what.mirror {
        Some(mirror) => mirror.clone(),
        None => own_mirror(&suite)?.ok_or_else(|| FetchError::NoMirror { suite: suite.clone() })?,
    };
    // They become words of a file that apt reads.
    for word in [&suite, &mirror] {
        let good = |c: char| c.is_ascii_graphic() && !matches!(c, '[' | ']' | '#' | '"' | '\\');
        if word.is_empty() || !word.chars().all(good) {
            return Err(FetchError::BadName(word.clone()));
        }
    }
    // apt takes relative paths for its own.
    let directory = std::path::absolute(directory).map_err(failed("finding", directory))?;
    let apt = Apt::prepare(&directory.join("apt"), &suite, &mirror)?;
    progress(&format!("reading the package lists of {suite} from {mirror}"));
    apt.run("apt-get", &["-q", "update"], "reading the package lists")?;
    let shown = apt.run("apt-cache", &["show", "--no-all-versions", META], "looking for the kernel");
    let (name, version) = shown
        .ok()
        .and_then(|shown| kernel_of(&shown))
        .ok_or_else(|| FetchError::NoPackage { suite: suite.clone() })?;
    progress(&format!("fetching {name} {version}"));
    apt.run("apt-get", &["-q", "download", &format!("{name}={version}")], "fetching the kernel")?;
    progress(&format!("unpacking {name}"));
    let tree = directory.join("package");
    let deb = find(&apt.directory, |name| name.strip_suffix(".deb").is_some())?;
    let content = || FetchError::Content { package: name.clone() };
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("-x").arg(deb.ok_or_else(content)?).arg(&tree);
    run(unpack, "dpkg-deb", "unpacking the kernel")?;
    fs::remove_dir_all(&apt.directory).map_err(failed("removing", &apt.directory))?;

    let vmlinuz = find(&tree.join("boot"), |name| name.starts_with("vmlinuz-"))?.ok_or_else(content)?;
    // Debian moves from /lib to /usr/lib.
    let homes = ["lib/modules", "usr/lib/modules"].map(|home| tree.join(home));
    let home = homes.iter().find(|home| home.is_dir()).ok_or_else(content)?;
    let modules = find(home, |_| true)?.ok_or_else(content)?;
    Ok(Fetched { vmlinuz, modules, package: Package { name, version, suite } })
}

/// apt with directories of its own.
struct Apt {
    directory: PathBuf,
    options: Vec<String>,
}

impl Apt {
    fn prepare(directory: &Path, suite: &str, mirror: &str) -> Result<Self, FetchError> {
        for part in ["lists/partial", "archives/partial", "etc"] {
            let part = directory.join(part);
            fs::create_dir_all(&part).map_err(failed("making", &part))?;
        }
        // Without the file apt takes the keys that the machine trusts.
        let signed =
            if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
        let files =
            [("sources.list", format!("deb {signed}{mirror} {suite} main\n")), ("status", String::new())];
        for (name, content) in files {
            let path = directory.join(name);
            fs::write(&path, content).map_err(failed("writing", &path))?;
        }
        let own = [
            ("Dir::Etc::SourceList", "sources.list"),
            ("Dir::Etc::SourceParts", "etc"),
            ("Dir::Etc::Preferences", "etc/preferences"),
            ("Dir::Etc::PreferencesParts", "etc"),
            ("Dir::State", ""),
            ("Dir::State::Lists", "lists"),
            ("Dir::State::Status", "status"),
            ("Dir::Cache", ""),
            ("Dir::Cache::Archives", "archives"),
        ];
        let mut options: Vec<String> =
            own.map(|(key, name)| format!("{key}={}", directory.join(name).display())).into();
        // Descriptions, icons and the like are not looked at, and the user _apt cannot come into a private directory.
        options.extend(
            [
                "Acquire::Languages=none",
                // Lists that cannot be fetched are an error here, not a warning.
                "APT::Update::Error-Mode=any",
                "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
                "APT::Sandbox::User=root",
                "APT::Architecture=amd64",
                "APT::Architectures=amd64",
            ]
            .map(str::to_owned),
        );
        Ok(Self { directory: directory.to_owned(), options })
    }

    fn run(&self, program: &'static str, arguments: &[&str], action: &str) -> Result<String, FetchError> {
        let mut command = Command::new(program);
        for option in &self.options {
            command.args(["-o", option]);
        }
        command.args(arguments).current_dir(&self.directory);
        run(command, program, action)
    }
}

/// Runs a program to its end; gives its output.
fn run(mut command: Command, program: &'static str, action: &str) -> Result<String, FetchError> {
    const LINES: usize = 12;
    let output =
        command.env("LC_ALL", "C").output().map_err(|source| FetchError::Start { program, source })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    let said = text(&output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    let mut end = String::new();
    for line in &lines[lines.len().saturating_sub(LINES)..] {
        // Writing to a string cannot fail.
        let _ = writeln!(end, "  {line}");
    }
    Err(FetchError::Failed { program, action: action.to_owned(), said: end.trim_end().to_owned() })
}

/// The machine's release, if it is one of Debian.
fn own_release() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim_matches(['"', '\'']).to_owned())
    };
    value("ID").filter(|id| id == "debian").and_then(|_| value("VERSION_CODENAME"))
}

/// The archive that the machine's own sources have for the suite.
fn own_mirror(suite: &str) -> Result<Option<String>, FetchError> {
    let mut command = Command::new("apt-get");
    // Also sources whose lists were never fetched, as on a machine that is quite new.
    command.args(["indextargets", "--no-release-info", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)"]);
    command.arg("Created-By: Packages");
    Ok(choose_mirror(&run(command, "apt-get", "reading this machine's sources")?, suite))
}

/// From lines of `RELEASE COMPONENT URL`: the first archive of the suite, else that of the release that the suite extends.
fn choose_mirror(targets: &str, suite: &str) -> Option<String> {
    let release = suite.split_once('-').map_or(suite, |(release, _)| release);
    [suite, release].iter().find_map(|wanted| {
        targets.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [found, "main", mirror] if found == *wanted => Some(mirror.to_owned()),
                _ => None,
            }
        })
    })
}

/// From the record of the meta package: the kernel's package and its version, `Depends: NAME (= VERSION)`.
fn kernel_of(record: &str) -> Option<(String, String)> {
    let depends = record.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    depends.split(", ").find_map(|word| {
        let (name, version) = word.split_once(" (= ")?;
        name.starts_with("linux-image-").then(|| (name.to_owned(), version.trim_end_matches(')').to_owned()))
    })
}

/// The one entry of a directory whose name `accept` takes.
fn find(directory: &Path, accept: impl Fn(&str) -> bool) -> Result<Option<PathBuf>, FetchError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed("reading", directory))? {
        let entry = entry.map_err(failed("reading", directory))?;
        if entry.file_name().to_str().is_some_and(&accept) {
            found.push(entry.path());
        }
    }
    Ok(if found.len() == 1 { found.pop() } else { None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_that_of_the_suite_or_of_its_release() {
        let targets = "bookworm contrib http://a/\nbookworm main http://b/debian/\nbookworm-security main http://s/\nx main\n";
        let mirror = |suite| choose_mirror(targets, suite);
        assert_eq!(mirror("bookworm").as_deref(), Some("http://b/debian/"));
        assert_eq!(mirror("bookworm-backports").as_deref(), Some("http://b/debian/"));
        assert_eq!(mirror("bookworm-security").as_deref(), Some("http://s/"));
        assert_eq!(mirror("trixie"), None);
        assert_eq!(mirror("x"), None);
    }

    #[test]
    fn the_kernel_is_what_the_meta_package_depends_on() {
        let record =
            "Package: linux-image-cloud-amd64\nDepends: linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1)\n";
        let expected = ("linux-image-6.1.0-50-cloud-amd64".to_owned(), "6.1.176-1".to_owned());
        assert_eq!(kernel_of(record), Some(expected));
        assert_eq!(kernel_of("Depends: other (= 1)"), None);
    }

    #[test]
    fn names_that_would_change_the_sources_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        for suite in ["", "a b", "a\nb", "a[b"] {
            let what = Debian { suite: Some(suite.to_owned()), mirror: Some("http://localhost/".to_owned()) };
            let result = fetch(&what, directory.path(), &mut |_| {});
            assert!(matches!(result, Err(FetchError::BadName(_))), "{suite:?}: {result:?}");
        }
    }
}
