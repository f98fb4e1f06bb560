//! From one TOML value to one typed value, or what would have been allowed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::{Range, RangeInclusive};
use std::path::{Component, Path, PathBuf};

use toml::Spanned;
use toml::de::DeValue;

use crate::document::shorten;

/// A value that cannot be taken.
#[derive(Debug)]
pub(crate) struct Refused {
    /// Where it stands: for an element of an array the element.
    pub(crate) span: Range<usize>,
    /// The value, shortened.
    pub(crate) found: String,
    /// What may stand there instead.
    pub(crate) allowed: String,
}

impl Refused {
    pub(crate) fn new(value: &Spanned<DeValue<'_>>, allowed: impl Into<String>) -> Self {
        let found = match value.get_ref() {
            DeValue::String(text) => format!("\"{}\"", shorten(text)),
            DeValue::Integer(number) => shorten(number.as_str()),
            DeValue::Float(number) => shorten(number.as_str()),
            DeValue::Boolean(yes) => yes.to_string(),
            DeValue::Datetime(time) => time.to_string(),
            DeValue::Array(_) => "an array".to_owned(),
            DeValue::Table(_) => "a table".to_owned(),
        };
        Self { span: value.span(), found, allowed: allowed.into() }
    }
}

type Value<'v> = Spanned<DeValue<'v>>;

/// A string for which `accept` has a meaning.
fn string<T>(value: &Value<'_>, allowed: &str, accept: impl FnOnce(&str) -> Option<T>) -> Result<T, Refused> {
    value.get_ref().as_str().and_then(accept).ok_or_else(|| Refused::new(value, allowed))
}

/// One of a few words.
pub(crate) fn choice<T: Copy>(words: &[(&str, T)]) -> impl Fn(&Value<'_>) -> Result<T, Refused> {
    move |value| {
        let quoted: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        string(value, &quoted.join(" or "), |text| {
            words.iter().find(|(word, _)| *word == text).map(|(_, meaning)| *meaning)
        })
    }
}

/// `true` or `false`.
pub(crate) fn boolean(value: &Value<'_>) -> Result<bool, Refused> {
    value.get_ref().as_bool().ok_or_else(|| Refused::new(value, "true or false"))
}

/// An integer in a range. `unit` may be empty.
pub(crate) fn number<T: TryFrom<i64>>(
    range: RangeInclusive<i64>,
    unit: &str,
) -> impl Fn(&Value<'_>) -> Result<T, Refused> {
    move |value| {
        let number = value.get_ref().as_integer();
        let number = number.and_then(|number| i64::from_str_radix(number.as_str(), number.radix()).ok());
        let number = number.filter(|number| range.contains(number)).and_then(|number| number.try_into().ok());
        number.ok_or_else(|| {
            let unit = if unit.is_empty() { String::new() } else { format!(" ({unit})") };
            Refused::new(value, format!("an integer from {} to {}{unit}", range.start(), range.end()))
        })
    }
}

/// `pids.max`: -1 for none, else up to the kernel's PID_MAX_LIMIT.
pub(crate) fn pids(value: &Value<'_>) -> Result<i64, Refused> {
    match number(-1..=4_194_304, "")(value) {
        Ok(number) if number != 0 => Ok(number),
        _ => Err(Refused::new(value, "-1 (no limit) or an integer from 1 to 4194304")),
    }
}

/// An array whose elements `element` understands.
pub(crate) fn list<T>(
    allowed: &str,
    element: impl Fn(&Value<'_>) -> Result<T, Refused>,
) -> impl Fn(&Value<'_>) -> Result<Vec<T>, Refused> {
    move |value| {
        let array = value.get_ref().as_array();
        array.ok_or_else(|| Refused::new(value, allowed))?.iter().map(&element).collect()
    }
}

/// `None` for an empty string, so that a drop-in can take a value back.
pub(crate) fn optional<T>(
    parse: impl Fn(&Value<'_>) -> Result<T, Refused>,
) -> impl Fn(&Value<'_>) -> Result<Option<T>, Refused> {
    move |value| {
        if value.get_ref().as_str() == Some("") {
            return Ok(None);
        }
        parse(value).map(Some).map_err(|refused| Refused {
            allowed: format!("{}, or \"\" for none", refused.allowed),
            ..refused
        })
    }
}

/// An absolute path without `..`.
pub(crate) fn absolute_path(value: &Value<'_>) -> Result<PathBuf, Refused> {
    string(value, "an absolute path without \"..\"", |text| {
        clean_path(text).filter(|path| path.is_absolute())
    })
}

/// An absolute path of a directory that podvisor fills and empties: never `/` itself.
pub(crate) fn own_directory(value: &Value<'_>) -> Result<PathBuf, Refused> {
    string(value, "an absolute path without \"..\", and not / itself", |text| {
        clean_path(text).filter(|path| path.is_absolute() && path.file_name().is_some())
    })
}

/// Path of a unix socket: `sun_path` of unix(7) has room for 107 bytes and the final NUL.
pub(crate) fn socket_path(value: &Value<'_>) -> Result<PathBuf, Refused> {
    string(value, "an absolute path without \"..\" of at most 107 bytes", |text| {
        clean_path(text).filter(|path| path.is_absolute() && path.file_name().is_some() && text.len() <= 107)
    })
}

/// A program: an absolute path, or a bare name for PATH. A path relative to the daemon's working directory is
/// neither.
pub(crate) fn program(value: &Value<'_>) -> Result<PathBuf, Refused> {
    string(value, "an absolute path without \"..\", or a bare name that is looked up in PATH", |text| {
        clean_path(text)
            .filter(|path| path.is_absolute() || path.components().count() == 1 && !text.contains('/'))
    })
}

fn clean_path(text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    let clean = !text.is_empty()
        && !text.contains(char::is_control)
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    clean.then(|| path.to_owned())
}

/// A command line argument.
pub(crate) fn argument(value: &Value<'_>) -> Result<String, Refused> {
    string(value, "a string that is not empty and has no NUL", |text| {
        (!text.is_empty() && !text.contains('\0')).then(|| text.to_owned())
    })
}

/// An annotation name, or a prefix ending in `*`.
pub(crate) fn annotation(value: &Value<'_>) -> Result<String, Refused> {
    string(value, "an annotation's name, or a prefix ending in *", |text| {
        let name = text.strip_suffix('*').unwrap_or(text);
        let fine = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        (!text.is_empty() && name.chars().all(fine)).then(|| text.to_owned())
    })
}

/// A handler's name, as the API server accepts it in a RuntimeClass: an RFC 1123 label.
pub(crate) const HANDLER_NAME: &str =
    "at most 63 lowercase letters, digits and \"-\", beginning and ending with a letter or digit";

/// See [`HANDLER_NAME`].
pub(crate) fn is_handler_name(name: &str) -> bool {
    let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !name.is_empty()
        && name.len() <= 63
        && name.chars().all(fine)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// The name of a handler; whether it exists is checked when all files are read.
pub(crate) fn handler_name(value: &Value<'_>) -> Result<String, Refused> {
    let allowed = format!("the name of a handler: {HANDLER_NAME}");
    string(value, &allowed, |text| is_handler_name(text).then(|| text.to_owned()))
}

/// The id of an installed guest; "" for the current one.
pub(crate) fn guest_id(value: &Value<'_>) -> Result<String, Refused> {
    let digits =
        |text: &str| text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    string(
        value,
        "the id of a guest (16 hex digits, see podvisor guest list), or \"\" for the current one",
        |text| (text.is_empty() || digits(text)).then(|| text.to_owned()),
    )
}

/// What tracing's filter understands, without its span syntax: levels, and `target=level`. A bare word that is
/// no level would be taken for a target and switch everything else off, so it is refused.
pub(crate) fn log_filter(value: &Value<'_>) -> Result<String, Refused> {
    let allowed = "off, error, warn, info, debug or trace, or a list like info,podvisor::pod=debug";
    let level = |text: &str| {
        ["off", "error", "warn", "info", "debug", "trace"]
            .iter()
            .any(|level| level.eq_ignore_ascii_case(text))
    };
    let target =
        |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-:".contains(c));
    string(value, allowed, |text| {
        let fine = text.split(',').all(|part| match part.trim().split_once('=') {
            None => level(part.trim()),
            Some((name, wanted)) => target(name) && level(wanted),
        });
        fine.then(|| text.to_owned())
    })
}

/// Address and port.
pub(crate) fn socket_address(value: &Value<'_>) -> Result<SocketAddr, Refused> {
    string(value, "an address and port like 127.0.0.1:0 or [::1]:10010", |text| text.parse().ok())
}

/// A cgroup path or a slice.
pub(crate) fn cgroup(value: &Value<'_>) -> Result<String, Refused> {
    string(value, "a cgroup path without \"..\" (and not the root), or the name of a systemd slice", |text| {
        clean_path(text).filter(|path| path.file_name().is_some()).map(|_| text.to_owned())
    })
}

/// An image reference, or nothing. The image store parses it; this only refuses what can be none.
pub(crate) fn image_reference(value: &Value<'_>) -> Result<String, Refused> {
    string(
        value,
        "an image reference like registry.k8s.io/pause:3.10.2, or \"\" for the built-in pause",
        |text| {
            let fine =
                text.len() <= 1024 && text.chars().all(|c| c.is_ascii_graphic()) && !text.contains("://");
            fine.then(|| text.to_owned())
        },
    )
}

/// A registry without scheme and path.
pub(crate) fn registry(value: &Value<'_>) -> Result<String, Refused> {
    string(value, "a registry like docker.io or registry.example:5000, without scheme and path", |text| {
        let fine = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
        (!text.is_empty() && text.chars().all(fine)).then(|| text.to_owned())
    })
}

/// Name of a network interface: the kernel's `dev_valid_name` and IFNAMSIZ.
pub(crate) fn interface(value: &Value<'_>) -> Result<String, Refused> {
    string(value, "an interface name: 1 to 15 printable characters without \"/\" and \":\"", |text| {
        let fine = text.len() <= 15
            && !["", ".", ".."].contains(&text)
            && text.chars().all(|c| c.is_ascii_graphic() && c != '/' && c != ':' && c != '%');
        fine.then(|| text.to_owned())
    })
}

/// At most one range per address family.
pub(crate) fn subnets(value: &Value<'_>) -> Result<Vec<(IpAddr, u8)>, Refused> {
    let allowed = "an array with at most one IPv4 and one IPv6 range, like [\"10.88.0.0/16\"]";
    let array = value.get_ref().as_array().ok_or_else(|| Refused::new(value, allowed))?;
    let mut ranges: Vec<(IpAddr, u8)> = Vec::new();
    for element in array {
        let range = subnet(element)?;
        if ranges.iter().any(|(address, _)| address.is_ipv4() == range.0.is_ipv4()) {
            return Err(Refused::new(element, "at most one IPv4 and one IPv6 range"));
        }
        ranges.push(range);
    }
    Ok(ranges)
}

/// A range in CIDR notation that has room for a gateway and pods: IPv4 /8 to /29, IPv6 /16 to /124.
fn subnet(value: &Value<'_>) -> Result<(IpAddr, u8), Refused> {
    let allowed = "a range of unicast addresses, IPv4 with a prefix from 8 to 29 or IPv6 from 16 to 124, like 10.88.0.0/16";
    let (address, prefix) = string(value, allowed, |text| {
        let (address, prefix) = text.split_once('/')?;
        let digits = !prefix.is_empty() && prefix.len() <= 3 && prefix.bytes().all(|b| b.is_ascii_digit());
        Some((address.parse::<IpAddr>().ok()?, prefix.parse::<u8>().ok().filter(|_| digits)?))
    })?;
    let (network, fine) = match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
            let network = Ipv4Addr::from_bits(address.to_bits() & mask);
            let unicast = !address.is_loopback()
                && !address.is_link_local()
                && address.octets()[0] != 0
                && address.octets()[0] < 224;
            (IpAddr::V4(network), unicast && (8..=29).contains(&prefix))
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0);
            let network = Ipv6Addr::from_bits(address.to_bits() & mask);
            let unicast = !address.is_loopback()
                && !address.is_unspecified()
                && !address.is_multicast()
                && !address.is_unicast_link_local()
                && address.to_ipv4_mapped().is_none();
            (IpAddr::V6(network), unicast && (16..=124).contains(&prefix))
        }
    };
    if !fine {
        return Err(Refused::new(value, allowed));
    }
    if network != address {
        return Err(Refused::new(value, format!("the range itself without host bits: {network}/{prefix}")));
    }
    Ok((network, prefix))
}
