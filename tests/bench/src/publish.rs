//! What the project shows of a run: the README's section, the table of everything, the plots.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use podvisor_critest::project_dir;

use crate::front::Outcome;
use crate::{goals, plot, table, timeline};

const BEGIN: &str = "<!-- What follows is written by `make bench PUBLISH=1`. -->\n";
const END: &str = "<!-- What it has written ends here. -->\n";
/// Below the project's directory.
const FOLDER: &str = "tests/bench/results";

/// Writes all of it into the source tree.
pub(crate) fn publish(outcome: &Outcome) -> Result<()> {
    let folder = project_dir().join(FOLDER);
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    for entry in fs::read_dir(&folder)? {
        fs::remove_file(entry?.path())?;
    }
    let plots = plot::draw(&folder, outcome)?;
    let machine = machine()?;
    let all = format!(
        "# Everything that `make bench` measured\n\n{machine}\n\n{}\n\n## The life of a pod, step by step\n\n{}",
        table::markdown(outcome),
        timeline::markdown(&outcome.samples)
    );
    fs::write(folder.join("README.md"), all)?;
    let mut section = format!("{machine} Everything is in `{FOLDER}/`.\n\n");
    section += &goals::markdown(&outcome.samples);
    section += "\nWhere a peer is ahead, by medians:\n\n";
    let ahead = goals::ahead(&outcome.samples);
    section += if ahead.is_empty() { "- nowhere\n" } else { &ahead };
    section += "\n";
    for name in plots {
        // Writing to a string cannot fail.
        let _ = writeln!(section, "![{name}]({FOLDER}/{name}.svg)");
    }
    let readme = project_dir().join("README.md");
    let text = fs::read_to_string(&readme)?;
    let (before, rest) = text.split_once(BEGIN).context("README.md has no place for results")?;
    let (_, after) = rest.split_once(END).context("README.md has no end of the results")?;
    fs::write(&readme, format!("{before}{BEGIN}{section}{END}{after}"))?;
    Ok(())
}

/// When, on what kind of machine, and by what command.
fn machine() -> Result<String> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("reading {path}"));
    let date = Command::new("date").args(["-u", "+%F"]).output()?;
    ensure!(date.status.success(), "date has failed");
    let date = String::from_utf8_lossy(&date.stdout).trim().to_owned();
    let processors = read("/proc/cpuinfo")?;
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let model = model.trim_start_matches(['\t', ' ', ':']);
    let count = std::thread::available_parallelism()?;
    let memory = read("/proc/meminfo")?;
    let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
    let kib: u64 = memory.trim().trim_end_matches(" kB").parse()?;
    let release = read("/proc/sys/kernel/osrelease")?;
    let kernel: Vec<&str> = release.trim().split(['.', '-']).take(2).collect();
    Ok(format!(
        "Measured on {date} by `make bench PUBLISH=1`, on a virtual machine with {count} processors ({model}) and {} GiB, Linux {}, images \
         and layers on a tmpfs.",
        kib.div_ceil(1 << 20),
        kernel.join(".")
    ))
}
