//! CRI logs: what a container writes is in them, all of it, once, in lines.
#![allow(missing_docs)]

mod lab;

use std::fs;
use std::io::Read;
use std::process::Command;

use lab::{Pod, Spec, private_memory, until};
use podvisor_proto::monitor::{Attach, ErrorCode, ProcessState, ReopenLog, request::Verb};
use rustix::mount::{MountFlags, mount};

/// 4 MB in lines that say which they are.
const LINES: usize = 600_000;
const ROTATIONS: usize = 20;

fn attach(stdin: bool, stdout: bool) -> Verb {
    Verb::Attach(Attach { container_id: "c1".into(), stdin, stdout, stderr: false })
}

fn reopen(id: &str) -> Verb {
    Verb::ReopenLog(ReopenLog { container_id: id.into() })
}

/// Joins what a log says to what was written.
fn content(lines: &[String], stream: &str) -> String {
    let mut text = String::new();
    for line in lines {
        let (name, rest) = line.split_once(' ').expect("a stream");
        if name == stream {
            let (tag, rest) = rest.split_once(' ').expect("a tag");
            text.push_str(rest);
            match tag {
                "F" => text.push('\n'),
                "P" => {}
                other => panic!("tag {other}"),
            }
        }
    }
    text
}

fn lines_streams_and_a_last_line_without_newline(lab: &mut lab::Lab) {
    use std::os::unix::fs::PermissionsExt;
    let mut pod = lab.pod();
    let script = "printf 'one\\n\\nthree\\n'; printf 'err' >&2; head -c 40000 /dev/zero | busybox tr '\\0' x; printf '\\nlast'";
    assert_eq!(pod.run_to_end("c1", &Spec::shell(script)).code, 0);
    let lines = pod.log_lines("c1");
    assert_eq!(content(&lines, "stdout"), format!("one\n\nthree\n{}\nlast", "x".repeat(40_000)));
    assert_eq!(content(&lines, "stderr"), "err");
    assert!(lines.contains(&"stdout P last".to_owned()) && lines.contains(&"stderr P err".to_owned()));
    let partial: Vec<usize> =
        lines.iter().filter_map(|line| line.strip_prefix("stdout P x")).map(str::len).collect();
    assert_eq!(partial, [16 * 1024 - 1, 16 * 1024 - 1]);
    assert_eq!(fs::metadata(pod.log("c1")).unwrap().permissions().mode() & 0o777, 0o640);
}

fn a_terminal_is_logged_as_stdout(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    let exit = pod.run_to_end("c1", &Spec::shell("echo out; echo err >&2; exit 4").terminal());
    assert_eq!(exit.code, 4);
    let lines = pod.log_lines("c1");
    assert_eq!(lines, ["stdout F out\r", "stdout F err\r"]);
    assert!(
        fs::read_dir(&pod.run_dir)
            .unwrap()
            .flatten()
            .all(|it| !it.file_name().to_string_lossy().contains("tty"))
    );
}

fn a_flood_is_complete_across_rotations(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    pod.run("c1", &Spec::shell("while read from to; do seq $from $to; done").stdin(true));
    let mut input = pod.connect();
    input.open(attach(true, false));
    let log = pod.log("c1");
    let mut parts = Vec::new();
    for from in (1..LINES).step_by(LINES / ROTATIONS) {
        input.stdin(format!("{from} {}\n", from + LINES / ROTATIONS - 1).as_bytes());
        // Somewhere in the middle of it, as soon as it has begun.
        until("it has begun", || fs::metadata(&log).is_ok_and(|it| it.len() > 0));
        let part = log.with_extension(format!("{}.log", parts.len()));
        fs::rename(&log, &part).expect("rotate");
        parts.push(part);
        pod.daemon.done(reopen("c1"));
        assert!(log.exists());
    }
    input.stdin(b"");
    assert_eq!(pod.exit("c1").code, 0);
    parts.push(log);
    let mut expected = 1;
    for part in parts {
        for line in fs::read_to_string(&part).unwrap_or_default().lines() {
            let (_, rest) = line.split_once(' ').unwrap();
            assert_eq!(rest, format!("stdout F {expected}"), "in {}", part.display());
            expected += 1;
        }
    }
    assert_eq!(expected, LINES + 1);
}

fn reopening_what_is_not_open(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    assert_eq!(pod.daemon.refused(reopen("nobody")).0, ErrorCode::NotFound);
    pod.run_to_end("c1", &Spec::new(&["true"]));
    assert_eq!(pod.daemon.refused(reopen("c1")).0, ErrorCode::WrongState);
    // The new file cannot be made: the old one stays in use.
    pod.run(
        "c2",
        &Spec::shell("trap 'echo after; exit 0' TERM; echo before; while :; do sleep 1000 & wait; done"),
    );
    until("the trap is set", || !pod.log_lines("c2").is_empty());
    let log = pod.log("c2");
    let rotated = log.with_extension("rotated");
    fs::rename(&log, &rotated).unwrap();
    fs::create_dir(&log).unwrap();
    assert_eq!(pod.daemon.refused(reopen("c2")).0, ErrorCode::System);
    terminate(&mut pod, "c2");
    let text = fs::read_to_string(rotated).unwrap();
    assert!(text.contains("F before\n") && text.contains("F after\n"), "{text:?}");
}

fn terminate(pod: &mut Pod, id: &str) {
    let kill = podvisor_proto::monitor::KillContainer { container_id: id.into(), signal: 15, all: false };
    pod.daemon.done(Verb::KillContainer(kill));
    assert_eq!(pod.exit(id).code, 0);
}

fn a_log_that_cannot_be_made_is_an_error(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    let mut request = pod.container("c1", &Spec::new(&["true"]));
    request.log_path = "/proc/no/such.log".into();
    let (code, error) = pod.daemon.refused(Verb::CreateContainer(request));
    assert_eq!(code, ErrorCode::System);
    assert!(error.detail.contains("/proc/no/such.log"), "{error:?}");
    assert_eq!(pod.containers(), []);
    // Without a log.
    let mut request = pod.container("c1", &Spec::shell("echo nowhere"));
    request.log_path.clear();
    pod.daemon.ask(Verb::CreateContainer(request)).unwrap();
    pod.start("c1");
    assert_eq!(pod.exit("c1").code, 0);
    assert_eq!(pod.daemon.refused(reopen("c1")).0, ErrorCode::WrongState);
}

fn a_full_disk_loses_lines_and_never_stops_the_container(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    small_disk(&pod, "c1");
    // Twice what fits, and then, told by its input, a little more.
    let script = "seq 1 20000; echo full >&2; cat; echo end";
    pod.run("c1", &Spec::shell(script).stdin(true));
    let mut client = pod.connect();
    client.open(attach(true, true));
    // The container came to its `cat`, however much of its output was lost: it takes input.
    client.stdin(b"hello\n");
    client.stdout_until("hello\n");
    // Answered when everything before it is written, or lost.
    pod.daemon.done(reopen("c1"));
    let full = fs::read_to_string(pod.log("c1")).unwrap();
    assert!(full.ends_with('\n'), "no torn line: {:?}", &full[full.len() - 50..]);
    let kept = full.lines().count();
    assert!(kept > 100 && kept < 20_000, "{kept}");
    // The operator makes room.
    fs::remove_file(pod.log("c1").with_file_name("ballast")).unwrap();
    client.stdin(b"room\n");
    client.stdin(b"");
    assert_eq!(pod.exit("c1").code, 0);
    let lines = pod.log_lines("c1");
    assert_eq!(lines[kept - 1], format!("stdout F {kept}"));
    assert!(
        lines[kept].starts_with("stderr F [podvisor: ") && lines[kept].contains("No space left"),
        "{lines:?}"
    );
    assert!(lines.ends_with(&["stdout F room".into(), "stdout F end".into()]), "{:?}", lines.last());
}

/// A log directory on a disk of half a megabyte, half of it used by something else.
fn small_disk(pod: &Pod, id: &str) {
    let directory = pod.log(id).parent().unwrap().to_owned();
    fs::create_dir_all(&directory).unwrap();
    mount("tmpfs", &directory, "tmpfs", MountFlags::empty(), c"size=512k").unwrap();
    fs::write(directory.join("ballast"), vec![0; 256 * 1024]).unwrap();
}

fn a_disk_that_hangs_holds_back_only_its_container(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    // A pipe that nobody empties is a disk that does not answer.
    let log = pod.log("c1");
    fs::create_dir_all(log.parent().unwrap()).unwrap();
    assert!(Command::new("mkfifo").arg(&log).status().unwrap().success());
    let mut reader = fs::OpenOptions::new().read(true).write(true).open(&log).unwrap();
    pod.run("c1", &Spec::shell("seq 400000; echo end"));
    // It waits in a write, and the monitor's memory does not grow with what it would like to write.
    until("the container waits", || {
        let pid = pod.list()[0].pid;
        fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default().contains("pipe")
            || fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") S "))
    });
    // The loop answers, and other containers come and go.
    let mut events = pod.subscribe();
    let mut other = pod.container("c2", &Spec::waiting());
    other.log_path.clear();
    pod.daemon.ask(Verb::CreateContainer(other)).unwrap();
    pod.start("c2");
    assert_eq!(pod.state("c2"), Some(ProcessState::Running));
    assert!(private_memory(pod.child.id()) < 8 << 20);
    let mut text = String::new();
    let mut buffer = vec![0; 64 * 1024];
    while !text.ends_with("stdout F end\n") {
        let count = reader.read(&mut buffer).unwrap();
        text.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    assert_eq!(text.lines().count(), 400_001);
    assert_eq!(events.exited().0, "c1");
}

crate::on_both! {
    lines_streams_and_a_last_line_without_newline
    a_terminal_is_logged_as_stdout
    a_flood_is_complete_across_rotations
    reopening_what_is_not_open
    a_log_that_cannot_be_made_is_an_error
    a_full_disk_loses_lines_and_never_stops_the_container
    a_disk_that_hangs_holds_back_only_its_container
}
