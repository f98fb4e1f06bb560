//! What the project has set itself, beside what was measured.

use std::fmt::Write as _;

use crate::samples::Samples;
use crate::subject::Name;
use crate::table::digits;
use crate::wire::Series;

/// A series on a node with so many pods, or on one where that is not asked.
type Of = (&'static str, Option<u32>);

/// What a figure is held against.
#[derive(Debug, Clone, Copy)]
enum Bound {
    /// A number of its unit.
    AtMost(f64),
    /// So many times that of another subject in the series of the same name, and more.
    Beside { other: Name, times: f64, more: f64 },
    /// So many times that of the better peer.
    BetterPeer { times: f64 },
    /// So many times its own with fewer pods.
    Growth { from: u32, times: f64 },
}

/// The median of podvisor's, or its 99th percentile.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Statistic {
    Median,
    P99,
}

struct Goal {
    what: &'static str,
    of: Of,
    subject: Name,
    statistic: Statistic,
    bound: Bound,
}

const fn goal(what: &'static str, of: Of, bound: Bound) -> Goal {
    Goal { what, of, subject: Name::Podvisor, statistic: Statistic::Median, bound }
}

const POD: &str = "a pod's processes and the daemon for it, private";
const PEAK: &str = "pull, memory at its peak over before";
const RESTART: &str = "restart until every answer is right";
const RUNC: Name = Name::Runc;
const P99: Statistic = Statistic::P99;
/// What the peers' plugins and runc keep from a goal is done without them as well, so that it shows what is podvisor's own.
const BUILTIN: Name = Name::PodvisorBuiltin;

const GOALS: [Goal; 22] = [
    goal("start of a pod", ("start", None), Bound::Beside { other: RUNC, times: 1.0, more: 20.0 }),
    Goal {
        subject: BUILTIN,
        ..goal(
            "start of a pod with crun and the network of podvisor",
            ("start", None),
            Bound::Beside { other: Name::Crun, times: 1.0, more: 20.0 },
        )
    },
    goal("ten at once", ("10 at once", None), TEN),
    Goal {
        subject: BUILTIN,
        ..goal("ten at once with crun and the network of podvisor", ("10 at once", None), TEN)
    },
    goal("ExecSync", ("ExecSync", None), Bound::Beside { other: RUNC, times: 1.0, more: 10.0 }),
    goal("stop of a pod that obeys", ("stop", None), STOP),
    Goal {
        subject: BUILTIN,
        ..goal("stop of a pod that obeys with crun and the network of podvisor", ("stop", None), STOP)
    },
    goal("removal of a pod", ("remove", None), Bound::BetterPeer { times: 0.5 }),
    goal("pull", ("pull", None), Bound::BetterPeer { times: 0.5 }),
    goal("pull", ("pull", None), Bound::Beside { other: RUNC, times: 1.5, more: 0.0 }),
    goal("memory of a pull at its peak", (PEAK, None), Bound::AtMost(64.0)),
    Goal {
        statistic: P99,
        ..goal("ListPodSandbox while pods come and go", ("ListPodSandbox", Some(200)), Bound::AtMost(5.0))
    },
    Goal {
        statistic: P99,
        ..goal("ListContainers while pods come and go", ("ListContainers", Some(200)), Bound::AtMost(5.0))
    },
    goal(
        "log per second of processor",
        ("log, per processor second", None),
        Bound::BetterPeer { times: 2.0 },
    ),
    goal("the idle daemon's memory", ("the daemon, PSS", Some(0)), Bound::AtMost(12.0)),
    goal("memory of a pod", (POD, Some(200)), Bound::AtMost(1024.0)),
    goal("restart", (RESTART, Some(200)), Bound::AtMost(1000.0)),
    goal("processor when idle", ("idle, processor", Some(100)), Bound::AtMost(0.1)),
    goal("wake-ups when idle", ("idle, woken up", Some(100)), Bound::AtMost(0.1)),
    Goal {
        subject: Name::PodvisorVm,
        ..goal(
            "start of a pod in a translated machine, beside a bare boot",
            ("RunPodSandbox", None),
            Bound::Beside { other: Name::Qemu, times: 1.3, more: 0.0 },
        )
    },
    goal("ListPodSandbox grows no faster than pods", ("ListPodSandbox", Some(200)), GROWS),
    goal("PodSandboxStatus does not grow", ("PodSandboxStatus", Some(200)), FLAT),
];

const TEN: Bound = Bound::BetterPeer { times: 1.0 / 3.0 };
const STOP: Bound = Bound::BetterPeer { times: 0.25 };
const GROWS: Bound = Bound::Growth { from: 50, times: 4.0 };
/// Half more is what the machine's noise makes of the same.
const FLAT: Bound = Bound::Growth { from: 10, times: 1.5 };

/// Markdown: a row per goal, with its figure and whether it is met.
pub(crate) fn markdown(samples: &Samples) -> String {
    let mut text = "| goal | at most | figure | met |\n|---|---|---|---|\n".to_owned();
    for goal in GOALS {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}", row(samples, &goal));
    }
    let _ = writeln!(text, "{}", growth(samples));
    text
}

fn row(samples: &Samples, Goal { what, of, subject, statistic, bound }: &Goal) -> String {
    let mut what = (*what).to_owned();
    if let Some(pods) = of.1 {
        let _ = write!(what, ", {pods} pods");
    }
    if *statistic == Statistic::P99 {
        what += ", 99th percentile";
    }
    let series = samples.find(of.0, of.1);
    let measured = series.and_then(|series| Some((series, samples.summary(series, *subject)?)));
    let Some((series, summary)) = measured else { return format!("| {what} | | not measured | |") };
    let ours = if *statistic == Statistic::P99 { summary.p99 } else { summary.median };
    let unit = &series.unit;
    let (bound, how) = limit(samples, series, *subject, *bound);
    let Some(bound) = bound else {
        return format!("| {what} | {how} | {} {unit} | not compared |", digits(ours));
    };
    let met = if series.is_better(bound, ours) { "**no**" } else { "yes" };
    format!("| {what} | {} {unit} ({how}) | {} {unit} | {met} |", digits(bound), digits(ours))
}

/// The number that a bound comes to, and what it is made of.
fn limit(samples: &Samples, series: &Series, subject: Name, bound: Bound) -> (Option<f64>, String) {
    match bound {
        Bound::AtMost(most) => (Some(most), "fixed".to_owned()),
        Bound::Beside { other, times, more } => {
            let of = samples.median(series, other);
            let more_of = if more > 0.0 { format!(" + {more:.0}") } else { String::new() };
            let times_of = if times > 1.0 { format!("{times} × ") } else { String::new() };
            let how = format!("{times_of}{} alone{more_of}", other.as_str());
            (of.map(|of| of * times + more), how)
        }
        Bound::BetterPeer { times } => match samples.better_peer(series) {
            Some((peer, of)) => (Some(of * times), format!("{} × {}'s", digits(times), peer.as_str())),
            None => (None, format!("{} × the better peer's", digits(times))),
        },
        Bound::Growth { from, times } => {
            let of = samples.find(&series.name, Some(from)).and_then(|less| samples.median(less, subject));
            (of.map(|of| of * times), format!("{times} × that with {from}"))
        }
    }
}

/// Whether any figure of podvisor's grows faster than what there is more of, between the last two numbers that it was measured at.
fn growth(samples: &Samples) -> String {
    let mut worst: Option<(f64, String)> = None;
    for series in samples.figures() {
        let Some((count, what)) = &series.among else { continue };
        let less = samples.series.iter().filter(|other| {
            other.name == series.name
                && other.among.as_ref().is_some_and(|(less, of)| of == what && (1..*count).contains(less))
        });
        let Some(before) = less.max_by_key(|other| other.among.as_ref().map(|(count, _)| *count)) else {
            continue;
        };
        let (Some(here), Some(there), Some((from, _))) =
            (samples.median(series, Name::Podvisor), samples.median(before, Name::Podvisor), &before.among)
        else {
            continue;
        };
        let factor = here / there / (f64::from(*count) / f64::from(*from));
        if there > 0.0 && worst.as_ref().is_none_or(|(most, _)| factor > *most) {
            worst = Some((factor, format!("{series} after {from}")));
        }
    }
    match worst {
        Some((factor, series)) => format!(
            "| nothing grows faster than pods or images | 1 × | {} × ({series}) | {} |",
            digits(factor),
            if factor <= 1.0 { "yes" } else { "**no**" }
        ),
        None => "| nothing grows faster than pods or images | | not measured | |".to_owned(),
    }
}

/// Where a peer's median is better than podvisor's, as a list.
pub(crate) fn ahead(samples: &Samples) -> String {
    let mut text = String::new();
    for series in samples.figures() {
        let (Some(ours), Some((peer, theirs))) =
            (samples.median(series, Name::Podvisor), samples.better_peer(series))
        else {
            continue;
        };
        if series.is_better(theirs, ours) {
            let (unit, peer) = (&series.unit, peer.as_str());
            let _ = writeln!(text, "- {series}: {} {unit}, {peer} {} {unit}", digits(ours), digits(theirs));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Sample;

    fn samples(values: &[(Name, &str, Option<u32>, f64)]) -> Samples {
        let mut samples = Samples::default();
        for (subject, series, pods, value) in values {
            let sample = Sample::new(series, "ms", *value);
            samples.add(*subject, if let Some(pods) = pods { sample.among(*pods, "pods") } else { sample });
        }
        samples
    }

    fn met(samples: &Samples, what: &str) -> String {
        let text = markdown(samples);
        let row = text.lines().find(|line| line.starts_with(&format!("| {what}"))).unwrap();
        row.split('|').nth(4).unwrap().trim().to_owned()
    }

    #[test]
    fn beside_a_limit_and_the_better_peer() {
        let of = |ours, stop| {
            samples(&[
                (Name::Podvisor, "start", None, ours),
                (Name::Runc, "start", None, 40.0),
                (Name::Podvisor, "stop", None, stop),
                (Name::Containerd, "stop", None, 100.0),
                (Name::Crio, "stop", None, 60.0),
            ])
        };
        assert_eq!(met(&of(60.0, 15.0), "start of a pod"), "yes");
        assert_eq!(met(&of(60.1, 15.0), "start of a pod"), "**no**");
        assert_eq!(met(&of(60.0, 15.0), "stop of a pod"), "yes");
        assert_eq!(met(&of(60.0, 15.1), "stop of a pod"), "**no**");
    }

    #[test]
    fn without_peers_nothing_is_compared_with_them() {
        let ours = samples(&[(Name::Podvisor, "stop", None, 10.0)]);
        assert_eq!(met(&ours, "stop of a pod"), "not compared");
        assert_eq!(met(&ours, "ExecSync"), "");
    }

    #[test]
    fn growth_beside_what_there_is_more_of() {
        let of =
            |more| samples(&[(Name::Podvisor, "x", Some(50), 1.0), (Name::Podvisor, "x", Some(200), more)]);
        assert_eq!(met(&of(4.0), "nothing grows"), "yes");
        assert_eq!(met(&of(4.1), "nothing grows"), "**no**");
    }

    #[test]
    fn a_peer_is_ahead() {
        let of = samples(&[(Name::Podvisor, "x", None, 2.0), (Name::Crio, "x", None, 1.0)]);
        assert_eq!(ahead(&of), "- x: 2.00 ms, crio 1.00 ms\n");
    }
}
