//! `podvisor shell`: the node's operator in a pod's guest.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Options, VM, daemon_program};
use podvisor_critest::target_dir;
use podvisor_tests::Fixture;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add_with("vm_shell::leads_into_the_guest", Options::default(), leads_into_the_guest);
}

/// Runs one of the daemon's commands, with something to read.
fn podvisor(f: &Fixture, arguments: &[&str], input: &str) -> Result<Output> {
    let mut command = Command::new(daemon_program());
    command.arg("--config").arg(f.node.configuration_file()).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("{command:?}"))?;
    child.stdin.take().context("no input")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

/// What a script has said between its marks. The terminal echoes the script too, where the sum has not been made.
fn answer(text: &str) -> Result<String> {
    let mut parts = text.split('<').filter_map(|part| part.split_once(" 42>"));
    let (answer, _) = parts.next().with_context(|| text.to_owned())?;
    Ok(answer.to_owned())
}

async fn leads_into_the_guest(f: &mut Fixture) -> Result<()> {
    let package = target_dir().join("kernels/bookworm/package");
    let only = |directory: &Path, start: &str| -> Result<String> {
        let names = std::fs::read_dir(directory)?.flatten().map(|entry| entry.path());
        let found = names.filter(|path| {
            path.file_name().is_some_and(|it| it.as_encoded_bytes().starts_with(start.as_bytes()))
        });
        Ok(found.last().context("none")?.display().to_string())
    };
    let kernel = only(&package.join("boot"), "vmlinuz-")?;
    let modules = only(&package.join("lib/modules"), "")?;
    let agent = target_dir().join("release/podvisor-agent").display().to_string();
    let shell = target_dir().join("critest/contents/busybox-static/files/bin/busybox").display().to_string();
    let build = ["guest", "build", "--kernel", &kernel, "--modules", &modules, "--agent", &agent];
    let built = podvisor(f, &[&build[..], &["--shell", &shell]].concat(), "")?;
    ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));

    let config = f.ask_pod("pod");
    std::fs::create_dir_all(&config.log_directory)?;
    let pod = f.cri.run_pod_by(&config, VM).await?;
    // It is the guest's own, not a container's: the agent is its first process.
    let script = "read kernel </proc/sys/kernel/osrelease; read first </proc/1/comm; echo \"<$kernel $first $((6 * 7))>\"; exit\n";
    let said = podvisor(f, &["shell", &pod[..8]], script)?;
    let text = String::from_utf8_lossy(&said.stdout);
    ensure!(said.status.success(), "{text} {}", String::from_utf8_lossy(&said.stderr));
    let told = answer(&text)?;
    ensure!(told.starts_with("6.1.") && told.ends_with(" init"), "{told}");

    // All of the agent, in a guest whose every page of it counts.
    let script = "while read key value rest; do [ \"$key\" = VmRSS: ] && echo \"<$value $((6 * 7))>\"; done </proc/1/status; exit\n";
    let said = podvisor(f, &["shell", &pod], script)?;
    let resident: u64 = answer(&String::from_utf8_lossy(&said.stdout))?.parse()?;
    ensure!(resident < 4096, "the agent has {resident} KiB resident");

    let none = podvisor(f, &["shell", "0000000000"], "")?;
    ensure!(!none.status.success() && String::from_utf8_lossy(&none.stderr).contains("crictl pods"));
    Ok(())
}
