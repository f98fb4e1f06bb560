//! Which signal stops a container, and signals' names.

use oci_spec::image::ImageConfiguration;
use podvisor_proto::cri;

use crate::error::PodError;

/// The signal that stops the container: of the request, else of the image, else SIGTERM.
pub(super) fn stop_signal(
    config: &cri::ContainerConfig,
    image: &ImageConfiguration,
) -> Result<i32, PodError> {
    // Values of the CRI's enumeration are not the kernel's numbers; its names are.
    let asked = cri::Signal::try_from(config.stop_signal).map_err(|_| {
        PodError::invalid("config.stop_signal", format!("{} is no signal", config.stop_signal))
    })?;
    if asked != cri::Signal::RuntimeDefault {
        return signal_number(asked.as_str_name())
            .ok_or_else(|| PodError::invalid("config.stop_signal", "no such signal on Linux"));
    }
    let named = image.config().as_ref().and_then(|config| config.stop_signal().clone());
    Ok(named.and_then(|name| signal_number(&name)).unwrap_or(15))
}

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`.
pub(crate) fn signal_number(name: &str) -> Option<i32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    // signal(7): glibc keeps 32 and 33 for itself.
    const RTMIN: i32 = 34;
    const RTMAX: i32 = 64;
    if let Ok(number) = name.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = name.to_ascii_uppercase();
    // The CRI's names begin with SIGNAL_.
    let name = name.strip_prefix("SIGNAL_").unwrap_or(&name);
    let name = name.strip_prefix("SIG").unwrap_or(name);
    let realtime = |offset: Option<&str>, base: i32, sign: i32| {
        let offset = offset?;
        let offset =
            if offset.is_empty() { 0 } else { offset.trim_start_matches(['+', '-']).parse().ok()? };
        Some(base + sign * offset).filter(|number| (RTMIN..=RTMAX).contains(number))
    };
    match name {
        "CLD" => Some(17),
        "POLL" => Some(29),
        "IOT" => Some(6),
        _ => NAMES
            .iter()
            .position(|known| *known == name)
            .and_then(|index| i32::try_from(index + 1).ok())
            .or_else(|| realtime(name.strip_prefix("RTMINPLUS").or(name.strip_prefix("RTMIN")), RTMIN, 1))
            .or_else(|| realtime(name.strip_prefix("RTMAXMINUS").or(name.strip_prefix("RTMAX")), RTMAX, -1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        for (name, number) in [
            ("SIGTERM", Some(15)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMAX-1", Some(63)),
            ("SIGRTMINPLUS3", Some(37)),
            ("SIGRTMIN", Some(34)),
            ("0", None),
            ("65", None),
            ("SIGNOTHING", None),
            ("SIGRTMIN+31", None),
        ] {
            assert_eq!(signal_number(name), number, "{name}");
        }
    }

    #[test]
    fn every_signal_of_the_cri_has_a_number() {
        for value in 1..80 {
            if let Ok(signal) = cri::Signal::try_from(value) {
                assert!(signal_number(signal.as_str_name()).is_some(), "{}", signal.as_str_name());
            }
        }
    }
}
