//! Containers that are written down: paused, and running again whatever happens. In place of CRIU the runtime does what the test tells it.
#![allow(missing_docs)]

mod lab;

use std::fs;
use std::process::Command;

use lab::{Lab, Pod, Spec, run, run_in_guest, until};
use podvisor_proto::monitor::{
    CheckpointContainer, DeleteContainer, ErrorCode, KillContainer, ResumeContainer, request::Verb,
};

fn checkpoint(lab: &Lab, id: &str, timeout_ms: u32) -> Verb {
    let path = |name: &str| lab.directory.join(name).display().to_string();
    Verb::CheckpointContainer(CheckpointContainer {
        container_id: id.into(),
        image_path: path("images"),
        work_path: path("work"),
        timeout_ms,
    })
}

fn resume(id: &str) -> Verb {
    Verb::ResumeContainer(ResumeContainer { container_id: id.into() })
}

fn kill(id: &str) -> Verb {
    Verb::KillContainer(KillContainer { container_id: id.into(), signal: 9, all: true })
}

/// A pod whose runtime says each verb in the file `calls`, and does `checkpoint` in place of that one.
fn pod(lab: &Lab, checkpoint: &str) -> Pod {
    let mut pod = lab.pod();
    let (runc, calls) = (pod.runtime.clone(), lab.directory.join("calls"));
    pod.runtime = lab.script(
        "recording",
        &format!(
            "for verb; do case $verb in create|start|delete|pause|checkpoint|resume) break;; esac; done\n\
             if [ $verb = checkpoint ]; then echo \"$@\" >{}; {checkpoint}; fi\n\
             [ $verb = checkpoint ] || {runc} \"$@\" || exit\n\
             echo $verb >>{}",
            lab.directory.join("arguments").display(),
            calls.display()
        ),
    );
    pod.run("c1", &Spec::waiting());
    pod
}

/// The verbs that the runtime has done since the container was started.
fn calls(lab: &Lab) -> Vec<String> {
    let text = fs::read_to_string(lab.directory.join("calls")).unwrap();
    text.lines().skip(2).map(str::to_owned).collect()
}

fn status(id: &str) -> String {
    let output = Command::new("runc").args(["--root", "/run/lab/runc", "state", id]).output().unwrap();
    let state: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    state["status"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn paused_until_it_is_resumed() {
    run(|lab| {
        let mut pod = pod(lab, "true");
        pod.daemon.done(checkpoint(lab, "c1", 0));
        assert_eq!(calls(lab), ["pause", "checkpoint"]);
        let arguments = fs::read_to_string(lab.directory.join("arguments")).unwrap();
        let wanted = "checkpoint --image-path /run/lab/images --work-path /run/lab/work --leave-running \
                      --file-locks --tcp-established c1\n";
        assert!(arguments.ends_with(wanted), "{arguments}");
        assert_eq!(status("c1"), "paused");
        let (code, error) = pod.daemon.refused(checkpoint(lab, "c1", 0));
        assert_eq!(code, ErrorCode::WrongState, "{error:?}");
        pod.daemon.done(resume("c1"));
        assert_eq!(status("c1"), "running");
        pod.daemon.done(resume("c1"));
        assert_eq!(calls(lab), ["pause", "checkpoint", "resume"]);
        // And once more.
        pod.daemon.done(checkpoint(lab, "c1", 0));
        pod.daemon.done(resume("c1"));
        pod.delete("c1");
    });
}

#[test]
fn what_fails_is_told_when_it_runs_again() {
    run(|lab| {
        let mut pod = pod(lab, "echo 'criu failed: type DUMP errno 0' >&2; exit 1");
        let (code, error) = pod.daemon.refused(checkpoint(lab, "c1", 0));
        assert_eq!(
            (code, error.runtime_log.as_str()),
            (ErrorCode::RuntimeFailed, "criu failed: type DUMP errno 0")
        );
        assert_eq!(status("c1"), "running");
        assert_eq!(calls(lab), ["pause", "resume"]);

        pod.create("c2", &Spec::waiting());
        assert_eq!(pod.daemon.refused(checkpoint(lab, "c2", 0)).0, ErrorCode::WrongState);
        assert_eq!(pod.daemon.refused(checkpoint(lab, "c3", 0)).0, ErrorCode::NotFound);
        assert_eq!(pod.daemon.refused(resume("c3")).0, ErrorCode::NotFound);
        let relative = CheckpointContainer {
            container_id: "c1".into(),
            image_path: "images".into(),
            work_path: "/work".into(),
            timeout_ms: 0,
        };
        assert_eq!(pod.daemon.refused(Verb::CheckpointContainer(relative)).0, ErrorCode::Invalid);
    });
}

#[test]
fn resumed_when_its_client_is_gone() {
    run(|lab| {
        let mut pod = pod(lab, "true");
        let mut client = pod.connect();
        client.done(checkpoint(lab, "c1", 0));
        assert_eq!(status("c1"), "paused");
        drop(client);
        until("it runs again", || status("c1") == "running");

        // While it is being written down.
        let gate = lab.directory.join("gate");
        let waiting = format!("touch {0}.reached; while [ ! -e {0} ]; do sleep 0.01; done", gate.display());
        pod.delete("c1");
        let mut pod = self::pod(lab, &waiting);
        let mut client = pod.connect();
        client.send(checkpoint(lab, "c1", 0));
        until("it is being written", || lab.directory.join("gate.reached").exists());
        drop(client);
        // Another client's, afterwards: the first one has been given up by then.
        pod.list();
        fs::write(&gate, "").unwrap();
        until("it runs again", || status("c1") == "running");
        until("it is over", || pod.daemon.ask(checkpoint(lab, "c1", 0)).is_ok());
        pod.daemon.done(resume("c1"));
    });
}

#[test]
fn a_time_limit_for_each() {
    run(|lab| {
        let gate = lab.directory.join("gate");
        let waiting = format!("while [ ! -e {} ]; do sleep 0.01; done", gate.display());
        let mut pod = pod(lab, &waiting);
        // Who waits is told at once; what writes is left to come to its end.
        let (code, error) = pod.daemon.refused(checkpoint(lab, "c1", 500));
        assert_eq!(code, ErrorCode::Timeout, "{error:?}");
        assert!(error.detail.contains("within 500 ms"), "{error:?}");
        assert_eq!(calls(lab), ["pause"]);
        let resuming = pod.daemon.send(resume("c1"));
        fs::write(&gate, "").unwrap();
        pod.daemon.result(resuming).unwrap();
        assert_eq!(status("c1"), "running");
        // Nobody comes for what is written.
        pod.daemon.done(checkpoint(lab, "c1", 1500));
        until("it runs again", || status("c1") == "running");
        assert_eq!(calls(lab), ["pause", "checkpoint", "resume", "pause", "checkpoint", "resume"]);
    });
}

#[test]
fn a_container_that_is_to_die_dies() {
    run(|lab| {
        let mut pod = pod(lab, "touch /run/lab/reached; sleep 7777");
        let writing = pod.daemon.send(checkpoint(lab, "c1", 0));
        until("it is being written", || lab.directory.join("reached").exists());
        let mut other = pod.connect();
        other.done(kill("c1"));
        assert_eq!(pod.daemon.result(writing).unwrap_err().code(), ErrorCode::WrongState);
        assert_eq!(pod.exit("c1").code, 137);
        pod.delete("c1");

        // One that is held, and one that is deleted.
        let mut pod = self::pod(lab, "true");
        pod.daemon.done(checkpoint(lab, "c1", 0));
        pod.daemon.done(kill("c1"));
        assert_eq!(pod.exit("c1").code, 137);
        pod.delete("c1");
        pod.run("c2", &Spec::waiting());
        pod.daemon.done(checkpoint(lab, "c2", 0));
        pod.daemon.done(Verb::DeleteContainer(DeleteContainer { container_id: "c2".into() }));
        assert_eq!(pod.containers(), []);
    });
}

#[test]
fn resumed_at_the_second_try() {
    run(|lab| {
        let mut pod = pod(lab, "true");
        let broken = lab.script("broken", "exit 1");
        pod.daemon.done(checkpoint(lab, "c1", 0));
        let working = lab.directory.join("recording");
        let aside = lab.directory.join("aside");
        fs::rename(&working, &aside).unwrap();
        fs::rename(broken, &working).unwrap();
        assert_eq!(pod.daemon.refused(resume("c1")).0, ErrorCode::RuntimeFailed);
        assert_eq!(status("c1"), "paused");
        fs::rename(&aside, &working).unwrap();
        until("it runs again", || status("c1") == "running");
    });
}

/// The hypervisor of the test below.
#[test]
fn plays_a_program() {
    lab::fake::play();
}

#[test]
fn not_in_a_guest() {
    run_in_guest(|lab| {
        let mut pod = lab.pod();
        pod.run("c1", &Spec::waiting());
        assert_eq!(pod.daemon.refused(checkpoint(lab, "c1", 0)).0, ErrorCode::Unsupported);
    });
}
