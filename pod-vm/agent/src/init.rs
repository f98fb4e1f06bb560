//! The pod's init: PID 1 of a pid namespace that the pod's containers share.

use podvisor_container::{Cgroup, PodNamespaces, Running, start_init};
use podvisor_proto::agent::{self as wire, Exit, ProcessState, Started, reply};
use rustix::process::Pid;

use crate::agent::Agent;
use crate::container::PARENT;
use crate::failure::Failure;
use crate::verbs::Answered;

/// What it is called in lists and events.
pub(crate) const NAME: &str = "init";

/// The init, as long as the pod lives.
#[derive(Debug)]
pub(crate) struct Init {
    running: Running,
    cgroup: Cgroup,
    exit: Option<Exit>,
}

impl Init {
    /// While it runs.
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.exit.is_none().then_some(self.running.pid)
    }

    pub(crate) fn describe(&self) -> wire::Process {
        let state = if self.exit.is_none() { ProcessState::Running } else { ProcessState::Exited };
        let pid = self.pid().map_or(0, Pid::as_raw_pid);
        wire::Process { id: NAME.to_owned(), state: state.into(), pid, exit: self.exit }
    }

    pub(crate) fn kill(&self) {
        let _ = self.cgroup.place().kill();
    }
}

impl Agent {
    pub(crate) fn start_init(&mut self) -> Answered {
        if self.pod.init.is_some() {
            return Err(Failure::exists("the pod has an init"));
        }
        let place = self.cgroups.cgroup(&format!("{PARENT}/{NAME}"));
        let cgroup = Cgroup::create(place, &oci_spec::runtime::LinuxResources::default())?;
        let user = self.pod.namespaces.as_ref().map(PodNamespaces::user);
        let running = start_init(&cgroup, user.as_deref()).inspect_err(|_| {
            let _ = cgroup.place().remove();
        })?;
        let pid = running.pid.as_raw_pid();
        self.pod.init = Some(Init { running, cgroup, exit: None });
        Ok(Some(reply::Result::Started(Started { pid })))
    }

    /// With it end all processes of its namespace; each container tells its own end.
    pub(crate) fn init_ended(&mut self, exit: Exit) {
        if let Some(init) = &mut self.pod.init {
            init.exit = Some(exit);
            self.tell_exit(NAME, exit);
        }
    }
}
