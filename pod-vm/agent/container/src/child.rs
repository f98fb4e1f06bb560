//! What the new process does before it is the container's program. Each step that fails is reported by name.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{During, Failed, Step};
use crate::launch::Io;
use crate::namespaces::{self, Opened};
use crate::options::Propagation;
use crate::plan::Plan;
use crate::process::ProcessPlan;
use crate::report::{self, Report};
use crate::{credentials, filesystem, root, sys, terminal};

/// The child's ends of what connects it with the caller.
#[derive(Debug)]
pub(crate) struct Connections<'a> {
    pub(crate) report: BorrowedFd<'a>,
    pub(crate) io: &'a Io,
}

/// Becomes the first process of a container; never returns.
pub(crate) fn first(plan: &Plan, opened: &Opened, connections: &Connections<'_>) -> ! {
    let prepared = prepare_container(plan, opened, connections);
    finish(prepared, &plan.process, connections, true)
}

/// Becomes one more process of the container whose first process is `init`; never returns.
pub(crate) fn another(
    process: &ProcessPlan,
    init: &OwnedFd,
    user_namespace: bool,
    connections: &Connections<'_>,
) -> ! {
    let prepared = (|| {
        sys::default_signals();
        namespaces::join_all(init, user_namespace)?;
        if user_namespace {
            namespaces::become_root()?;
        }
        rustix::process::setsid().during(|| "make a session".into())?;
        prepare_process(process, connections, false)
    })();
    finish(prepared, process, connections, false)
}

fn prepare_container(plan: &Plan, opened: &Opened, connections: &Connections<'_>) -> Step<Program> {
    sys::default_signals();
    if plan.namespaces.makes(libc::CLONE_NEWUSER) {
        // The caller writes the maps and then a byte.
        wait_for_byte(connections.report)?;
        namespaces::become_root()?;
    }
    namespaces::enter(opened)?;
    rustix::process::setsid().during(|| "make a session".into())?;
    if let Some(hostname) = &plan.hostname {
        rustix::system::sethostname(hostname.as_bytes()).during(|| "set the host name".into())?;
    }
    if let Some(domainname) = &plan.domainname {
        rustix::system::setdomainname(domainname.as_bytes()).during(|| "set the domain name".into())?;
    }
    build_root(plan)?;
    for (name, value) in &plan.sysctls {
        filesystem::write_sysctl(name, value)?;
    }
    let program = prepare_process(&plan.process, connections, true)?;
    root::protect(plan)?;
    Ok(program)
}

/// The container's tree, from its root file system to the pivot.
fn build_root(plan: &Plan) -> Step {
    let open = |path: &Path| {
        rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    };
    let old = open(Path::new("/")).during(|| "open the root".into())?;
    // Only where a volume has to pass mounts, in or also back out, what it is a copy of may.
    let outside = match plan.propagation {
        Propagation::Unbindable => Propagation::Private,
        asked => asked,
    };
    filesystem::set_propagation(&old, outside, true).during(|| "set the propagation of mounts".into())?;
    // With the propagation that they have now.
    let sources: Vec<_> = plan.mounts.iter().map(filesystem::source).collect::<Step<_>>()?;
    let failed = || format!("use {} as the root file system", plan.root.display());
    let tree = filesystem::copy_of_open(open(&plan.root).during(failed)?, true).during(failed)?;
    filesystem::set_propagation(&tree, Propagation::Private, true).during(failed)?;
    // pivot_root(2) wants a mount point whose parent is not shared; and nobody else is to see what is put there.
    filesystem::set_propagation(&old, Propagation::Private, false).during(failed)?;
    filesystem::attach(&tree, &old).during(failed)?;
    let root = tree;
    for (mount, source) in plan.mounts.iter().zip(sources) {
        filesystem::mount(root.as_fd(), mount, source)?;
    }
    root::devices(root.as_fd(), plan)?;
    filesystem::pivot(&root)
}

/// What is to be executed.
#[derive(Debug)]
struct Program {
    path: CString,
    environment: Vec<CString>,
}

/// Streams, terminal, identity and the program's path.
fn prepare_process(process: &ProcessPlan, connections: &Connections<'_>, first: bool) -> Step<Program> {
    match connections.io {
        Io::Streams { stdin, stdout, stderr } => {
            for (stream, number) in [(stdin, 0), (stdout, 1), (stderr, 2)] {
                sys::become_standard(stream.as_fd(), number)
                    .during(|| "connect the standard streams".into())?;
            }
            for stream in [stdin, stdout, stderr] {
                // So that the program can open its own /dev/stdout again; pipes refuse nothing here.
                let uid = rustix::fs::Uid::from_raw(process.uid);
                let _ = rustix::fs::fchown(stream, Some(uid), None);
            }
        }
        Io::Terminal => {
            if let Some(master) = terminal::open(process, first)? {
                report::send(connections.report, &Report::Terminal(master))
                    .during(|| "hand over the terminal".into())?;
            }
        }
    }
    if first {
        enter_directory(process, true)?;
    }
    Ok(Program { path: CString::default(), environment: environment(process) })
}

/// A missing working directory is made, as every runtime does.
fn enter_directory(process: &ProcessPlan, make: bool) -> Step {
    let failed = || format!("change to the working directory {}", process.directory.display());
    if make && let Err(Errno::NOENT) = rustix::fs::access(&process.directory, rustix::fs::Access::EXISTS) {
        std::fs::create_dir_all(&process.directory).during(failed)?;
    }
    rustix::process::chdir(&process.directory).during(failed)
}

/// The environment, with HOME from the container's /etc/passwd where it has none.
fn environment(process: &ProcessPlan) -> Vec<CString> {
    let mut environment = process.environment.clone();
    let has_home = environment.iter().any(|entry| entry.to_bytes().starts_with(b"HOME="));
    if !has_home {
        let home = passwd().and_then(|passwd| home_of(&passwd, process.uid));
        let home = home.filter(|home| !home.is_empty()).unwrap_or_else(|| "/".to_owned());
        environment.extend(CString::new(format!("HOME={home}")));
    }
    environment
}

/// The container's /etc/passwd, whatever an image has put there: no fifo holds the child up, no huge file fills it.
fn passwd() -> Option<String> {
    use std::io::Read;
    const LIMIT: u64 = 4 << 20;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::open("/etc/passwd", flags, Mode::empty()).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    file.take(LIMIT).read_to_string(&mut text).ok()?;
    Some(text)
}

fn home_of(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2)?.parse() == Ok(uid)).then(|| fields.get(5).map(|home| (*home).to_owned()))?
    })
}

/// Identity, then waits for the start where there is one, then the program.
fn finish(prepared: Step<Program>, process: &ProcessPlan, connections: &Connections<'_>, first: bool) -> ! {
    let outcome: Step = prepared.and_then(|mut program| {
        // Before the filter, which may know no call as young as this.
        sys::close_others_on_exec().during(|| "let descriptors be closed".into())?;
        credentials::take_on(process)?;
        // As the user: the directory may be one that root cannot enter (NFS), and one that the user cannot is an error.
        enter_directory(process, false)?;
        program.path = find(&process.arguments[0], &program.environment)?;
        if first {
            report::send(connections.report, &Report::Ready).during(|| "report".into())?;
            wait_for_byte(connections.report)?;
        }
        credentials::seal(process)?;
        let error = sys::execute(&program.path, &process.arguments, &program.environment);
        Err(error).during(|| format!("execute {}", program.path.to_string_lossy()))
    });
    if let Err(Failed(text)) = outcome {
        // Nobody left to tell: the caller sees the end of the process.
        let _ = report::send(connections.report, &Report::Failed(text));
    }
    sys::exit_now(127)
}

/// Reads one byte; the end of the socket means that the caller has given up.
fn wait_for_byte(socket: BorrowedFd<'_>) -> Step {
    loop {
        match rustix::io::read(socket, &mut [0; 1]) {
            Ok(1..) => return Ok(()),
            Ok(0) => sys::exit_now(125),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).during(|| "wait for the start".into()),
        }
    }
}

/// The program's file: as given when it has a slash, else in PATH of its environment (execvp(3)).
fn find(program: &CStr, environment: &[CString]) -> Step<CString> {
    use rustix::fs::{Access, AtFlags, accessat};
    let usable = |path: &Path| -> Result<(), Errno> {
        let status = rustix::fs::stat(path)?;
        if rustix::fs::FileType::from_raw_mode(status.st_mode) == rustix::fs::FileType::Directory {
            return Err(Errno::ISDIR);
        }
        match accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) {
            // A filter that is older than faccessat2(2) forbids to ask: execve(2) will tell.
            Err(Errno::PERM | Errno::NOSYS) => Ok(()),
            answer => answer,
        }
    };
    let name = program.to_string_lossy().into_owned();
    if program.to_bytes().contains(&b'/') {
        usable(Path::new(std::ffi::OsStr::from_bytes(program.to_bytes())))
            .during(|| format!("execute {name:?}"))?;
        return Ok(program.to_owned());
    }
    let path = environment.iter().find_map(|entry| entry.to_bytes().strip_prefix(b"PATH="));
    let mut refused = None;
    for directory in path.unwrap_or_default().split(|byte| *byte == b':') {
        let directory = if directory.is_empty() { b"." } else { directory };
        let candidate: PathBuf =
            [std::ffi::OsStr::from_bytes(directory), std::ffi::OsStr::from_bytes(program.to_bytes())]
                .iter()
                .collect();
        match usable(&candidate) {
            Ok(()) => return CString::new(candidate.as_os_str().as_bytes()).during(|| name.clone()),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(error) => refused = Some(error),
        }
    }
    match refused {
        Some(error) => Err(error).during(|| format!("execute {name:?}")),
        None => Err(Failed(format!("exec: {name:?}: executable file not found in $PATH"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_comes_from_the_users_line() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33:web:/var/www:/bin/sh\n";
        assert_eq!(home_of(passwd, 33).as_deref(), Some("/var/www"));
        assert_eq!(home_of(passwd, 7), None);
    }
}
