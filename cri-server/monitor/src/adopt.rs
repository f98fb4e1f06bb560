//! Adopt: from here on the monitor belongs to one pod and outlives the daemon.

use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use podvisor_proto::monitor::Adopt;

use crate::console::ListeningSocket;
use crate::failure::{Failure, check_absolute, check_id};
use crate::monitor::{Monitor, Pod};
use crate::poll::{Interest, Token, Watch};
use crate::verbs::{Answer, Answered};

const SOCKET: &str = "monitor.sock";

pub(crate) fn adopt(monitor: &mut Monitor, request: Adopt) -> Answered {
    check_id("pod_id", &request.pod_id)?;
    check_absolute("run_dir", &request.run_dir)?;
    check_absolute("state_dir", &request.state_dir)?;
    let network_namespace =
        (!request.network_namespace.is_empty()).then(|| PathBuf::from(&request.network_namespace));
    if network_namespace.is_some() {
        check_absolute("network_namespace", &request.network_namespace)?;
    }
    if let Some(pod) = &monitor.pod {
        // A daemon that did not get the first answer asks again.
        if pod.id == request.pod_id && pod.run_dir == Path::new(&request.run_dir) {
            return Ok(Answer::DONE);
        }
        return Err(Failure::wrong_state(format!("this monitor belongs to pod {}", pod.id)));
    }
    // A daemon that died right after this request knows of no adoption when it starts again: it must find the socket, or no
    // monitor. Had it lived until the socket is there, it would find that.
    if !monitor.daemon_is_there() {
        return Err(Failure::wrong_state("the daemon has gone"));
    }
    let run_dir = PathBuf::from(request.run_dir);
    let state_dir = PathBuf::from(request.state_dir);
    for directory in [&run_dir, &state_dir] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| Failure::system(format!("make {}", directory.display()), error))?;
    }
    let listener = listen(&run_dir)
        .map_err(|error| Failure::system(format!("listen on {}", run_dir.join(SOCKET).display()), error))?;
    let mut listener_watch = Watch::new(Token::Listener);
    listener_watch
        .set(&monitor.poller, &listener.socket, Some(Interest::READ))
        .map_err(|error| Failure::system("watch the pod's socket", error))?;
    leave_daemon(monitor, &run_dir).map_err(|error| {
        Failure::system(format!("open the monitor's log in {}", run_dir.display()), error)
    })?;
    monitor.pod =
        Some(Pod { id: request.pod_id, run_dir, state_dir, network_namespace, listener, listener_watch });
    Ok(Answer::DONE)
}

/// The socket appears under its name when it can be connected to by root alone, and takes the place of one that an
/// earlier monitor left behind.
fn listen(run_dir: &Path) -> io::Result<ListeningSocket> {
    let new = format!(".{SOCKET}.{}", std::process::id());
    let _ = std::fs::remove_file(run_dir.join(&new));
    let mut listener = ListeningSocket::bind(run_dir, &new)?;
    std::fs::set_permissions(&listener.path, std::fs::Permissions::from_mode(0o600))?;
    let path = run_dir.join(SOCKET);
    std::fs::rename(&listener.path, &path)?;
    listener.path = path;
    Ok(listener)
}

/// Cuts what ties the monitor to the daemon that started it.
fn leave_daemon(monitor: &mut Monitor, run_dir: &Path) -> io::Result<()> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    monitor.journal.open(run_dir)
}
