//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

pub(crate) const USAGE: &str =
    "usage: podvisor-fs --socket-path PATH --shared-dir DIRECTORY --ready-fd NUMBER
       [--tag TAG] [--threads NUMBER] [--max-files NUMBER] | --version";

/// Longest tag, in bytes (virtio 1.2, 5.11.4).
const TAG_LENGTH: usize = 36;

/// What to do.
#[derive(Debug, PartialEq)]
pub(crate) enum Asked {
    Serve(Options),
    Version,
}

/// What to serve, and how.
#[derive(Debug, PartialEq)]
pub(crate) struct Options {
    /// Where the hypervisor connects. Made here; whoever started this process removes it.
    pub(crate) socket_path: PathBuf,
    /// The tree to serve: a mount point.
    pub(crate) shared_dir: PathBuf,
    /// A descriptor to close once a hypervisor can connect.
    pub(crate) ready_fd: i32,
    /// The tag in the device's configuration. Only for hypervisors that leave that to the server; QEMU 7.2 does not.
    pub(crate) tag: Option<String>,
    /// Threads that serve requests; with 0 it is the one that reads the queues.
    pub(crate) threads: usize,
    /// How many files the guest can hold at a time: one for every file it knows, one more for every one it has open.
    pub(crate) max_files: u64,
}

/// Why the command line cannot be obeyed.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum OptionError {
    #[error("unknown option {0}")]
    Unknown(String),
    #[error("{0} needs a value")]
    NoValue(String),
    #[error("{option} {value}: {expected} is expected")]
    Value { option: String, value: String, expected: &'static str },
    #[error("{0} is missing")]
    Missing(&'static str),
}

impl Options {
    pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Asked, OptionError> {
        let mut arguments = arguments;
        let (mut socket_path, mut shared_dir, mut ready_fd, mut tag) = (None, None, None, None);
        let (mut threads, mut max_files) = (None, None);
        while let Some(option) = arguments.next() {
            let option = option.to_string_lossy().into_owned();
            if option == "--version" {
                return Ok(Asked::Version);
            }
            let mut value = || arguments.next().ok_or_else(|| OptionError::NoValue(option.clone()));
            match option.as_str() {
                "--socket-path" => socket_path = Some(value()?.into()),
                "--shared-dir" => shared_dir = Some(value()?.into()),
                "--ready-fd" => ready_fd = Some(number(&option, value()?, 3, i32::MAX)?),
                "--tag" => tag = Some(tag_of(&option, value()?)?),
                "--threads" => threads = Some(number(&option, value()?, 0, 64)?),
                "--max-files" => max_files = Some(number(&option, value()?, 64, 1 << 24)?),
                _ => return Err(OptionError::Unknown(option)),
            }
        }
        Ok(Asked::Serve(Self {
            socket_path: socket_path.ok_or(OptionError::Missing("--socket-path"))?,
            shared_dir: shared_dir.ok_or(OptionError::Missing("--shared-dir"))?,
            ready_fd: ready_fd.ok_or(OptionError::Missing("--ready-fd"))?,
            tag,
            threads: threads.unwrap_or(DEFAULT_THREADS),
            max_files: max_files.unwrap_or(DEFAULT_MAX_FILES),
        }))
    }
}

/// So that one that waits for a disk does not hold up the others.
const DEFAULT_THREADS: usize = 4;

/// Far more than programs hold; a guest that takes them all costs the host some hundred MiB, counted where this process is.
const DEFAULT_MAX_FILES: u64 = 1 << 18;

fn number<T: std::str::FromStr + PartialOrd>(
    option: &str,
    value: OsString,
    least: T,
    most: T,
) -> Result<T, OptionError> {
    let parsed = value.to_str().and_then(|text| text.parse().ok());
    parsed.filter(|number| (least..=most).contains(number)).ok_or_else(|| OptionError::Value {
        option: option.to_owned(),
        value: value.to_string_lossy().into_owned(),
        expected: "a number in its range",
    })
}

fn tag_of(option: &str, value: OsString) -> Result<String, OptionError> {
    let fits = |tag: &String| (1..=TAG_LENGTH).contains(&tag.len());
    value
        .into_string()
        .map_err(|value| value.to_string_lossy().into_owned())
        .and_then(|tag| if fits(&tag) { Ok(tag) } else { Err(tag) })
        .map_err(|value| OptionError::Value {
            option: option.to_owned(),
            value,
            expected: "1 to 36 bytes of UTF-8",
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Asked, OptionError> {
        Options::parse(line.split_whitespace().map(OsString::from))
    }

    const NEEDED: &str = "--socket-path /s --shared-dir /d --ready-fd 3";

    #[test]
    fn what_is_needed_is_enough() {
        let Ok(Asked::Serve(options)) = parse(NEEDED) else { panic!("{:?}", parse(NEEDED)) };
        assert_eq!((options.threads, options.max_files), (DEFAULT_THREADS, DEFAULT_MAX_FILES));
        assert_eq!(parse("--version"), Ok(Asked::Version));
    }

    #[test]
    fn every_option_is_taken() {
        let line = format!("{NEEDED} --tag pod --threads 0 --max-files 100");
        let Ok(Asked::Serve(options)) = parse(&line) else { panic!("{:?}", parse(&line)) };
        assert_eq!(options.tag.as_deref(), Some("pod"));
        assert_eq!((options.threads, options.max_files), (0, 100));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, said) in [
            ("--socket-path /s --ready-fd 3", "--shared-dir is missing"),
            ("--cache auto", "unknown option --cache"),
            ("--tag", "--tag needs a value"),
            ("--ready-fd 1", "--ready-fd 1: a number in its range is expected"),
            ("--ready-fd x", "--ready-fd x: a number in its range is expected"),
            ("--threads 65", "--threads 65: a number in its range is expected"),
            (
                "--tag 1234567890123456789012345678901234567",
                "--tag 1234567890123456789012345678901234567: 1 to 36 bytes of UTF-8 is expected",
            ),
        ] {
            assert_eq!(parse(line).unwrap_err().to_string(), said);
        }
    }
}
