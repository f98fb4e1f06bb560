//! What a test starts from: a node with its daemon, a client, and the images; and what has to be gone at its end.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use podvisor_critest::node::{Daemon, Node, Options};
use podvisor_proto::cri::{ContainerConfig, PodSandboxConfig};

use crate::cri::Cri;
use crate::images::{BUSYBOX, HOST, TestImages};
use crate::world::{self, World};
use crate::wrapper::Wrapper;
use crate::{ask, eventually};

/// A node of the test's own.
#[derive(Debug)]
pub struct Fixture {
    /// A client of the daemon.
    pub cri: Cri,
    /// The registry behind the mirror.
    pub images: Arc<TestImages>,
    /// Directories and configuration.
    pub node: Node,
    daemon: Option<Daemon>,
    /// What was on the machine before the daemon's first start.
    pub before: World,
}

/// A pod that runs, with what it was made from.
#[derive(Debug, Clone)]
pub struct Pod {
    /// The sandbox's id.
    pub id: String,
    /// What it was made from.
    pub config: PodSandboxConfig,
    /// Of its node.
    pub cri: Cri,
}

impl Fixture {
    /// A node with the default handler and a running daemon.
    pub fn new(images: &Arc<TestImages>) -> Result<Self> {
        Self::with(images, Options::default())
    }

    /// The same with other options; the mirror is filled in.
    pub fn with(images: &Arc<TestImages>, options: Options) -> Result<Self> {
        let node = Node::new(&Options {
            mirrored: vec![HOST.to_owned()],
            mirror: Some(images.registry().address()),
            ..options
        })?;
        let before = World::now();
        let daemon = node.start()?;
        let cri = Cri::new(&node.socket())?;
        Ok(Self { cri, images: Arc::clone(images), node, daemon: Some(daemon), before })
    }

    /// Starts the daemon again after [`Fixture::kill`] or [`Fixture::stop`].
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.daemon.is_none(), "the daemon runs already");
        self.daemon = Some(self.node.start()?);
        Ok(())
    }

    /// The same with more in the daemon's environment.
    pub fn start_with(&mut self, environment: &[(&str, &str)]) -> Result<()> {
        ensure!(self.daemon.is_none(), "the daemon runs already");
        self.daemon = Some(self.node.start_with(environment)?);
        Ok(())
    }

    /// Adds to the daemon's configuration, and starts the daemon again.
    pub fn configure(&mut self, name: &str, text: &str) -> Result<()> {
        let directory = self.node.path("config.toml.d");
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(format!("{name}.toml")), text)?;
        self.stop()?;
        self.start()
    }

    /// Adds handler `faulty`: runc behind a script that is told what to fail.
    pub fn faulty_runtime(&mut self) -> Result<Wrapper> {
        let runc = podvisor_critest::tools_dir().join("runc");
        let wrapper = Wrapper::runtime(&self.node.path("faulty"), &runc)?;
        let program = crate::wrapper::quoted(wrapper.program());
        self.configure(
            "faulty",
            &format!(
                "[runtime.handlers.faulty]\ntype = \"oci\"\npath = {program}\n[limits]\nruntime_timeout = 2\n"
            ),
        )?;
        Ok(wrapper)
    }

    /// Starts the daemon, which dies at a failure point (of a debug build).
    pub fn start_armed(&mut self, point: &str) -> Result<()> {
        ensure!(self.daemon.is_none(), "the daemon runs already");
        self.daemon = Some(self.node.start_with(&[(podvisor_fault::VARIABLE, point)])?);
        Ok(())
    }

    /// Whether the daemon has died of SIGKILL by itself: it is given a moment for that. Any other end is an error.
    pub fn has_died(&mut self, milliseconds: u64) -> Result<bool> {
        use std::os::unix::process::ExitStatusExt;
        let Ok(status) = self.daemon()?.wait(Duration::from_millis(milliseconds)) else { return Ok(false) };
        self.daemon = None;
        ensure!(status.signal() == Some(9), "the daemon ended with {status}\n{}", self.node.log_tail(40));
        Ok(true)
    }

    /// SIGKILL for the daemon.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().context("the daemon does not run")?.kill()
    }

    /// SIGTERM for the daemon, which has to end well.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.daemon.take().context("the daemon does not run")?.stop()?;
        ensure!(status.success(), "after SIGTERM the daemon ended with {status}");
        Ok(())
    }

    /// What a power cut and a new start of the machine leave: files, and nothing that runs or is mounted. `/run` is
    /// kept too, as on a machine where it is no tmpfs.
    pub fn reboot(&mut self) -> Result<()> {
        self.kill()?;
        World::now().end_processes_since(&self.before);
        World::now().unmount_since(&self.before)?;
        self.node.remove_network();
        self.node.reboot()?;
        self.start()
    }

    /// The running daemon.
    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().context("the daemon does not run")
    }

    /// Where pods have their logs.
    pub fn logs(&self) -> PathBuf {
        self.node.path("logs")
    }

    /// A pod's configuration; see [`ask::pod`].
    pub fn ask_pod(&self, name: &str) -> PodSandboxConfig {
        ask::pod(name, &self.logs())
    }

    /// Runs a pod of that name.
    pub async fn pod(&self, name: &str) -> Result<Pod> {
        self.run(self.ask_pod(name)).await
    }

    /// Runs a pod of that configuration.
    pub async fn run(&self, config: PodSandboxConfig) -> Result<Pod> {
        if !Path::new(&config.log_directory).exists() {
            fs::create_dir_all(&config.log_directory).context("making the pod's log directory")?;
        }
        let id = self.cri.run_pod(&config).await.context("RunPodSandbox")?;
        Ok(Pod { id, config, cri: self.cri.clone() })
    }

    /// A pod with one running container.
    pub async fn running(&self, name: &str, container: &ContainerConfig) -> Result<(Pod, String)> {
        self.cri.pull(BUSYBOX).await.context("PullImage")?;
        let pod = self.pod(name).await?;
        let id = pod.start(container).await?;
        Ok((pod, id))
    }

    /// Removes every pod, stops the daemon, and fails if anything is left of them.
    pub async fn finish(mut self) -> Result<()> {
        let result = self.clear().await;
        result
            .with_context(|| format!("clearing up; the daemon's log ends with\n{}\n", self.node.log_tail(60)))
    }

    async fn clear(&mut self) -> Result<()> {
        for pod in self.cri.pods().await.context("ListPodSandbox")? {
            self.cri.stop_pod(&pod.id).await.context("StopPodSandbox")?;
            self.cri.remove_pod(&pod.id).await.context("RemovePodSandbox")?;
        }
        let containers = self.cri.containers().await.context("ListContainers")?;
        ensure!(containers.is_empty(), "containers outlived their pods: {containers:?}");
        eventually("mounts, namespaces and cgroups of the pods go", || async {
            World::now().things_since(&self.before)
        })
        .await?;
        self.stop()?;
        eventually("the processes go", || async { World::now().processes_since(&self.before) }).await?;
        world::remove_pod_cgroups();
        Ok(())
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.daemon.take();
        // Only a failed test has some; the next one is not to meet them.
        World::now().end_processes_since(&self.before);
        let _ = World::now().unmount_since(&self.before);
        world::remove_pod_cgroups();
    }
}

impl Pod {
    /// A pod that was made by other means.
    pub fn known(id: &str, config: &PodSandboxConfig, cri: &Cri) -> Self {
        Self { id: id.to_owned(), config: config.clone(), cri: cri.clone() }
    }

    /// Creates a container.
    pub async fn create(&self, config: &ContainerConfig) -> Result<String> {
        self.cri.create(&self.id, config, &self.config).await.context("CreateContainer")
    }

    /// Creates a container and starts it.
    pub async fn start(&self, config: &ContainerConfig) -> Result<String> {
        let id = self.create(config).await?;
        self.cri.start(&id).await.context("StartContainer")?;
        Ok(id)
    }

    /// Runs a script in a container to its end; its standard output and exit code.
    pub async fn script(&self, name: &str, text: &str) -> Result<(String, i32)> {
        let id = self.start(&ask::script(name, text)).await?;
        let status = self.cri.wait_exited(&id).await?;
        Ok((self.log(&format!("{name}.log"))?.stdout(), status.exit_code))
    }

    /// A container's log.
    pub fn log(&self, file: &str) -> Result<Log> {
        let path = Path::new(&self.config.log_directory).join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Log::parse(&text)
    }
}

/// Lines that a counting container writes: `prefix` and each number.
pub fn numbered(prefix: &str, numbers: std::ops::Range<usize>) -> String {
    numbers.fold(String::new(), |text, number| text + &format!("{prefix}{number}\n"))
}

/// A log in CRI format: `TIME STREAM TAGS CONTENT` per line (the tag is `F` for a full line, `P` for a part).
#[derive(Debug, Default)]
pub struct Log {
    lines: Vec<(String, bool, String)>,
}

impl Log {
    fn parse(text: &str) -> Result<Self> {
        let mut log = Self::default();
        ensure!(text.is_empty() || text.ends_with('\n'), "the log's last line has no end");
        for line in text.lines() {
            let fields: Vec<&str> = line.splitn(4, ' ').collect();
            let [time, stream, tag, content] = fields[..] else { bail!("no line in CRI format: {line:?}") };
            ensure!(time.len() >= 20 && time.as_bytes()[10] == b'T', "no RFC 3339 time: {line:?}");
            ensure!(["stdout", "stderr"].contains(&stream), "no stream: {line:?}");
            ensure!(["F", "P"].contains(&tag), "no tag: {line:?}");
            log.lines.push((stream.to_owned(), tag == "F", content.to_owned()));
        }
        Ok(log)
    }

    fn of(&self, wanted: &str) -> String {
        let mut text = String::new();
        for (_, full, content) in self.lines.iter().filter(|(stream, _, _)| stream == wanted) {
            text.push_str(content);
            if *full {
                text.push('\n');
            }
        }
        text
    }

    /// What the container wrote to its standard output.
    pub fn stdout(&self) -> String {
        self.of("stdout")
    }

    /// What the container wrote to its standard error.
    pub fn stderr(&self) -> String {
        self.of("stderr")
    }

    /// How many of its lines are parts of longer ones.
    pub fn parts(&self) -> usize {
        self.lines.iter().filter(|(_, full, _)| !full).count()
    }
}
