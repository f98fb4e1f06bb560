//! A monitor that dies of being adopted: it answers like a real one as long as it waits for a pod. This program itself in the place of
//! podvisor-monitor, as often as a test wants it.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use podvisor_critest::node::daemon_program;
use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{HelloReply, PROTOCOL_VERSION, Reply, Request};
use podvisor_tests::Fixture;
use podvisor_tests::wrapper::quoted;
use prost::Message;
use rustix::process::{Signal, getpid, kill_process};

/// The first argument that makes this program such a monitor.
pub(crate) const VERB: &str = "dying-monitor";

/// The next `count` monitors of a daemon that is started anew will die.
pub(crate) fn install(f: &mut Fixture, count: u32) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let place = f.node.path("monitors");
    fs::create_dir_all(&place)?;
    for number in 0..count {
        fs::write(place.join(format!("dying.{number}")), "")?;
    }
    let script = place.join("monitor");
    let text = format!(
        "#!/bin/sh\nfor one in {}/dying.*; do\n    rm \"$one\" 2>/dev/null && exec {} {VERB}\ndone\nexec {} \"$@\"\n",
        quoted(&place),
        quoted(&std::env::current_exe()?),
        quoted(&daemon_program().with_file_name("podvisor-monitor")),
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    f.configure("monitor", &format!("[runtime]\nmonitor = {}\n", quoted(&script)))?;
    Ok(place)
}

/// Serves the connection that a monitor is started with.
pub(crate) fn main() -> Result<()> {
    let mut daemon = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    loop {
        let mut length = [0; 4];
        daemon.read_exact(&mut length)?;
        let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
        daemon.read_exact(&mut bytes)?;
        let request = Request::decode(bytes.as_slice())?;
        match request.verb {
            Some(Verb::Hello(_)) => {
                let hello = HelloReply {
                    protocol_version: PROTOCOL_VERSION,
                    pid: std::process::id().cast_signed(),
                    ..HelloReply::default()
                };
                let reply = Reply { id: request.id, result: Some(Answer::Hello(hello)) }.encode_to_vec();
                daemon.write_all(&u32::try_from(reply.len())?.to_le_bytes())?;
                daemon.write_all(&reply)?;
            }
            Some(Verb::Adopt(adopt)) => die(Path::new(&adopt.run_dir))?,
            other => bail!("not expected: {other:?}"),
        }
    }
}

/// As late as possible: with the pod's socket in its place, and a second one that is not.
fn die(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)?;
    let socket = directory.join("monitor.sock");
    let _ = fs::remove_file(&socket);
    let _listeners = [
        UnixListener::bind(&socket)?,
        UnixListener::bind(directory.join(format!(".monitor.sock.{}", std::process::id())))?,
    ];
    kill_process(getpid(), Signal::KILL).context("dying")
}
