//! `podvisor guest`: the commands, on a kernel of Debian (`make kernels`). What comes out is booted in the tests of podvisor-guest.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::daemon_program;
use podvisor_critest::{project_dir, target_dir};
use podvisor_tests::Fixture;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("guests::are_built_listed_checked_and_removed", are_built_listed_checked_and_removed);
}

async fn are_built_listed_checked_and_removed(f: &mut Fixture) -> Result<()> {
    let package = target_dir().join("kernels/bookworm/package");
    let kernel = only(&package.join("boot"), "vmlinuz-")?;
    let modules = only(&package.join("lib/modules"), "")?;
    let agent = f.node.path("agent");
    compile(&agent, 7)?;
    let configuration = f.node.configuration_file();
    let guest = |arguments: &[&OsStr]| -> Result<Output> {
        let mut command = Command::new(daemon_program());
        command.arg("--config").arg(&configuration).arg("guest").args(arguments);
        command.output().with_context(|| format!("{command:?}"))
    };
    let build = |agent: &Path, more: &[&str]| {
        let mut arguments: Vec<&OsStr> = vec!["build".as_ref(), "--kernel".as_ref(), kernel.as_ref()];
        arguments.extend::<[&OsStr; 4]>([
            "--modules".as_ref(),
            modules.as_ref(),
            "--agent".as_ref(),
            agent.as_ref(),
        ]);
        arguments.extend(more.iter().map(|word| OsStr::new(*word)));
        guest(&arguments)
    };
    let words = |words: &[&str]| guest(&words.iter().map(OsStr::new).collect::<Vec<_>>());

    let empty = said(&words(&["list"])?, true)?;
    ensure!(empty.contains("podvisor guest build"), "{empty}");
    let missing = said(&build(Path::new("/nowhere/agent"), &[])?, false)?;
    ensure!(missing.contains("/nowhere/agent is no file") && missing.contains("--agent"), "{missing}");
    let nothing = said(&words(&["build"])?, false)?;
    ensure!(nothing.contains("--debian") && nothing.contains("--kernel"), "{nothing}");

    let built = said(&build(&agent, &[])?, true)?;
    ensure!(built.contains("packing ") && built.contains("is installed: kernel 6.1."), "{built}");
    ensure!(!built.contains('\r'), "control characters where there is no terminal: {built:?}");
    let first = id(&built)?;
    let again = said(&build(&agent, &[])?, true)?;
    ensure!(again.contains("was there already") && id(&again)? == first, "{again}");

    compile(&agent, 8)?;
    let other = said(&build(&agent, &["--keep-current", "--module", "xfs"])?, true)?;
    let second = id(&other)?;
    ensure!(second != first && other.contains(&format!("after `podvisor guest use {second}`")), "{other}");
    let list = said(&words(&["list"])?, true)?;
    ensure!(list.contains(&format!("* {first}")) && list.contains(&format!("  {second}")), "{list}");

    let refused = said(&words(&["remove", &first])?, false)?;
    ensure!(refused.contains("podvisor guest use"), "{refused}");
    said(&words(&["use", &second])?, true)?;
    said(&words(&["remove", &first])?, true)?;
    let unknown = said(&words(&["remove", &first])?, false)?;
    ensure!(unknown.contains("there is no guest"), "{unknown}");

    let good = said(&words(&["verify"])?, true)?;
    ensure!(good.contains(&format!("{second}: good")), "{good}");
    let file = f.node.path("root/guests").join(&second).join("kernel");
    let mut content = fs::read(&file).with_context(|| file.display().to_string())?;
    content[5000] ^= 1;
    fs::write(&file, content)?;
    let bad = said(&words(&["verify", &second])?, false)?;
    ensure!(bad.contains("kernel: sha256"), "{bad}");
    let repaired = said(&build(&agent, &["--module", "xfs"])?, true)?;
    ensure!(id(&repaired)? == second, "{repaired}");
    said(&words(&["verify", &second])?, true)?;
    Ok(())
}

/// A first process that speaks a version of the protocol.
fn compile(to: &Path, protocol: u32) -> Result<()> {
    let source = fs::read_to_string(project_dir().join("pod-vm/guest/tests/init.c"))?;
    let changed = source.replace(".long 7\\n", &format!(".long {protocol}\\n"));
    ensure!(protocol == 7 || changed != source, "the program has no protocol to replace");
    let file = to.with_extension("c");
    fs::write(&file, changed)?;
    let status = Command::new("cc").args(["-static", "-Os", "-s", "-o"]).arg(to).arg(&file).status()?;
    ensure!(status.success(), "cc: {status}");
    Ok(())
}

/// The one entry whose name begins so.
fn only(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory)
        .with_context(|| format!("{}: `make kernels` fetches it", directory.display()))?;
    let names = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let mut fitting = names
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)));
    fitting.next().with_context(|| format!("{} has no {prefix}", directory.display()))
}

/// All that a command said; it must have ended as expected.
fn said(output: &Output, well: bool) -> Result<String> {
    let text = [&output.stdout[..], &output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    ensure!(output.status.success() == well, "{}: {text}", output.status);
    Ok(text)
}

/// The id in `guest ID is installed`.
fn id(text: &str) -> Result<String> {
    let id = text.lines().find_map(|line| line.strip_prefix("guest ")?.split(' ').next());
    id.map(str::to_owned).with_context(|| format!("no id in {text}"))
}
