//! What a compiler does not hold: directions between crates, sizes and names of files, nothing unfinished, nothing of
//! one machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The root of the source tree.
fn top() -> PathBuf {
    podvisor_critest::project_dir()
}

/// Every file that is, or is about to be, in the repository, with its path from the top.
fn tracked() -> Vec<String> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(top())
        .output()
        .expect("git lists the files");
    assert!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    let list = String::from_utf8(output.stdout).expect("paths are text");
    // A file that was removed and is not committed yet is listed and not there.
    list.split_terminator('\0').filter(|path| top().join(path).is_file()).map(str::to_owned).collect()
}

fn rust_files() -> Vec<(String, String)> {
    tracked()
        .into_iter()
        .filter(|path| Path::new(path).extension().is_some_and(|end| end == "rs"))
        .map(|path| (path.clone(), read(&path)))
        .collect()
}

fn read(path: &str) -> String {
    fs::read_to_string(top().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn report(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

/// Workspace crates that each crate may use, besides those that may be used everywhere. What is not listed may use
/// none: a new edge is a decision, and is written down here.
const MAY_USE: &[(&str, &[&str])] = &[
    // Leaves.
    ("podvisor-proto", &[]),
    ("podvisor-config", &[]),
    ("podvisor-fault", &[]),
    ("podvisor-cgroup", &[]),
    ("podvisor-checkpoint", &[]),
    ("podvisor-registry", &[]),
    ("podvisor-unpack", &[]),
    ("podvisor-erofs", &[]),
    ("podvisor-network", &[]),
    ("podvisor-guest", &[]),
    // Behind a hostile guest: nothing of ours but what it is.
    ("podvisor-fs", &[]),
    ("podvisor-spec", &["podvisor-proto"]),
    ("podvisor-streaming", &["podvisor-proto"]),
    ("podvisor-image-store", &["podvisor-erofs", "podvisor-fault", "podvisor-registry", "podvisor-unpack"]),
    ("podvisor-nri", &["podvisor-proto"]),
    ("podvisor-seccomp", &[]),
    // Containers in a guest, by the kernel alone.
    ("podvisor-container", &["podvisor-cgroup"]),
    ("podvisor-agent", &["podvisor-cgroup", "podvisor-container", "podvisor-proto"]),
    // Devices of virtual machines, and what drives the machines: one process each.
    ("podvisor-virtio", &[]),
    ("podvisor-hypervisor", &["podvisor-proto"]),
    ("podvisor-qemu", &["podvisor-hypervisor", "podvisor-proto", "podvisor-virtio"]),
    ("podvisor-vmm", &["podvisor-hypervisor", "podvisor-proto", "podvisor-virtio"]),
    // Whatever reads what others have written.
    ("podvisor-fuzz", &["podvisor-guest", "podvisor-hypervisor", "podvisor-proto", "podvisor-virtio"]),
    // One per pod, small: the protocol and cgroups, nothing else.
    ("podvisor-monitor", &["podvisor-proto", "podvisor-cgroup"]),
    // The daemon joins the parts; it never links a virtual machine monitor.
    (
        "podvisor",
        &[
            "podvisor-cgroup",
            "podvisor-checkpoint",
            "podvisor-config",
            "podvisor-fault",
            "podvisor-guest",
            "podvisor-image-store",
            "podvisor-network",
            "podvisor-nri",
            "podvisor-proto",
            "podvisor-registry",
            "podvisor-seccomp",
            "podvisor-spec",
            "podvisor-streaming",
        ],
    ),
    // The tools of the tests start the daemon as a process.
    ("podvisor-critest", &[]),
    ("podvisor-tests", &["podvisor-critest", "podvisor-fault", "podvisor-proto"]),
    ("podvisor-compare", &["podvisor-critest", "podvisor-proto", "podvisor-tests"]),
];

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(top())
        .output()
        .expect("cargo describes the workspace");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

#[test]
fn crates_depend_in_one_direction() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let may_use: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let members: Vec<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let mut found = Vec::new();
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        let Some(allowed) = may_use.get(name) else {
            found.push(format!("{name} is not in this test's list"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let used = dependency["name"].as_str().expect("a name");
            // Tests may use what they need to compare with, but never the daemon.
            let for_tests = dependency["kind"] == "dev" && used != "podvisor";
            if members.contains(&used) && !allowed.contains(&used) && !for_tests {
                found.push(format!("{name} → {used}"));
            }
        }
    }
    report("dependencies between crates that the layout does not have", &found);
}

/// The part of a file before its tests.
fn without_tests(text: &str) -> &str {
    text.split("\n#[cfg(test)]").next().unwrap_or(text)
}

#[test]
fn files_have_one_idea_each() {
    const LONGEST: usize = 800;
    // May only shrink.
    const LONGER: [&str; 0] = [];
    let is_test = |path: &str| path.contains("/tests/") || path.ends_with("/tests.rs");
    let found: Vec<String> = rust_files()
        .iter()
        .filter(|(path, _)| !is_test(path) && !LONGER.contains(&path.as_str()))
        .map(|(path, text)| (path, without_tests(text).lines().count()))
        .filter(|(_, lines)| *lines > LONGEST)
        .map(|(path, lines)| format!("{path}: {lines} lines"))
        .collect();
    report("files with more than 800 lines besides tests", &found);
}

#[test]
fn every_file_says_what_it_is_for() {
    let found: Vec<String> = rust_files()
        .into_iter()
        .filter(|(path, text)| {
            !text.starts_with("//!") && !path.contains("/wire/") && !path.ends_with("/tests.rs")
        })
        .map(|(path, _)| path)
        .collect();
    report("files that do not begin with `//!`", &found);
}

#[test]
fn names_say_what_is_in_them() {
    const EMPTY_WORDS: [&str; 12] = [
        "util", "utils", "common", "base", "manager", "managers", "handler", "handlers", "helper", "helpers",
        "inner", "misc",
    ];
    // `Handler` alone is Kubernetes' word for a way of running pods, and stays.
    const EMPTY_ENDINGS: [&str; 6] = ["Manager", "Helper", "Helpers", "Util", "Utils", "Inner"];
    let mut found = Vec::new();
    for path in tracked() {
        let path = Path::new(&path);
        for part in path.with_extension("").components() {
            let part = part.as_os_str().to_string_lossy();
            if part.split(['-', '_', '.']).any(|word| EMPTY_WORDS.contains(&word)) {
                found.push(path.display().to_string());
            }
        }
    }
    for (path, text) in rust_files() {
        for (number, line) in text.lines().enumerate() {
            let mut words = line.split_whitespace().skip_while(|word| word.starts_with("pub"));
            let (Some(kind), Some(name)) = (words.next(), words.next()) else { continue };
            if !["struct", "enum", "trait", "type"].contains(&kind) {
                continue;
            }
            let name: String = name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if EMPTY_ENDINGS.iter().any(|ending| name.ends_with(ending)) {
                found.push(format!("{path}:{}: {name}", number + 1));
            }
        }
    }
    report("names that do not say what they provide", &found);
}

#[test]
fn nothing_is_unfinished() {
    // In two parts, so that this file is not found.
    let marks = [["todo", "!("], ["unimplemented", "!("], ["FIX", "ME"], ["XX", "X"], ["HA", "CK"]]
        .map(|m| m.concat());
    let found = lines_with(&rust_files(), &marks);
    report("unfinished places", &found);
}

fn lines_with(files: &[(String, String)], marks: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, text) in files {
        for (number, line) in text.lines().enumerate() {
            if marks.iter().any(|mark| line.contains(mark.as_str())) {
                found.push(format!("{path}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    found
}

#[test]
fn unsafe_code_says_why_it_is_sound() {
    let mut found = Vec::new();
    for (path, text) in rust_files() {
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let opens =
                code.contains("unsafe {") || code.contains("unsafe impl") || code.contains("unsafe extern");
            let above = &lines[at.saturating_sub(8)..at];
            if opens && !above.iter().any(|line| line.contains("SAFETY:")) && !path.ends_with("/tidy.rs") {
                found.push(format!("{path}:{}: {}", at + 1, line.trim()));
            }
        }
    }
    report("unsafe code without a SAFETY comment above it", &found);
}

#[test]
fn every_crate_keeps_unsafe_code_out() {
    let workspace = read("Cargo.toml");
    let denied = ["unsafe_code = \"deny\"", "unsafe_code = \"forbid\""];
    assert!(denied.iter().any(|line| workspace.contains(line)), "the workspace's lints allow unsafe code");
    let mut found = Vec::new();
    for package in metadata()["packages"].as_array().expect("packages") {
        let manifest = package["manifest_path"].as_str().expect("a path");
        let text = fs::read_to_string(manifest).expect("the manifest is there");
        let inherits = text.contains("[lints]\nworkspace = true");
        if !inherits && !denied.iter().any(|line| text.contains(line)) {
            found.push(manifest.to_owned());
        }
    }
    report("crates that take no lints from the workspace and set none of their own", &found);
}

#[test]
fn nothing_names_one_machine() {
    // In two parts, so that this file is not found.
    let marks = [
        ["/wo", "rk/"],
        ["/ro", "ot/."],
        ["/ro", "ot/go"],
        ["/home/", "user"],
        ["proxy.golang", ".org"],
        ["deb.deb", "ian.org"],
        ["index.crates", ".io"],
        ["static.crates", ".io"],
    ]
    .map(|mark| mark.concat());
    let files: Vec<(String, String)> = tracked()
        .into_iter()
        .filter_map(|path| Some((path.clone(), fs::read_to_string(top().join(&path)).ok()?)))
        .collect();
    report("paths or hosts of one machine", &lines_with(&files, &marks));
}

#[test]
fn the_top_level_has_only_its_folders() {
    const FOLDERS: [&str; 8] =
        ["config", "cri-server", "critest", "image-store", "network", "pod-vm", "proto", "tests"];
    const FILES: [&str; 8] = [
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "Makefile",
        "README.md",
        "clippy.toml",
        "rust-toolchain.toml",
        "rustfmt.toml",
    ];
    let mut found: Vec<String> = tracked()
        .into_iter()
        .filter(|path| {
            let (first, rest) = path.split_once('/').map_or((path.as_str(), None), |(a, b)| (a, Some(b)));
            let known = if rest.is_some() { FOLDERS.contains(&first) } else { FILES.contains(&first) };
            !known && !first.starts_with('.')
        })
        .collect();
    found.dedup();
    report("unexpected files at the top", &found);
}
