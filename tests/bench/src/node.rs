//! One subject in its sandbox, which does what it is told until the front hangs up.

use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use podvisor_critest::registry::{Access, Registry};
use podvisor_tests::images::BUSYBOX;
use tokio::runtime::Runtime;

use crate::bare::Bare;
use crate::subject::{Name, Subject};
use crate::wire::{Line, Order, Ready, Report, Sample};
use crate::workload::Workload;

pub(crate) fn serve(name: Name, socket: &Path, images: &Path) -> Result<()> {
    let stream =
        UnixStream::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
    let mut line = Line::new(stream);
    let worker = Worker::start(name, images)?;
    line.say(&Ready { subject: name, version: worker.version()? })?;
    while let Some(Order { workload, round }) = line.hear()? {
        let outcome =
            worker.run(workload, round).map_err(|error| format!("{error:#}\n{}", worker.log_tail()));
        line.say(&Report { outcome })?;
    }
    worker.end()
}

enum Worker {
    Daemon { runtime: Runtime, subject: Box<Subject>, _registry: Registry },
    Bare(Bare),
}

impl Worker {
    fn start(name: Name, images: &Path) -> Result<Self> {
        if name.is_bare() {
            return Ok(Self::Bare(Bare::new(name)?));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let registry = Registry::start(images, Access::ReadOnly)?;
        let subject = runtime.block_on(async {
            let subject = Subject::start(name, registry.address())?;
            subject.cri.pull(BUSYBOX).await.with_context(|| subject.log_tail())?;
            anyhow::Ok(subject)
        })?;
        Ok(Self::Daemon { runtime, subject: Box::new(subject), _registry: registry })
    }

    fn version(&self) -> Result<String> {
        match self {
            Self::Daemon { runtime, subject, .. } => runtime.block_on(subject.version()),
            Self::Bare(bare) => bare.version(),
        }
    }

    fn run(&self, workload: Workload, round: u32) -> Result<Vec<Sample>> {
        match self {
            Self::Daemon { runtime, subject, .. } => runtime.block_on(workload.run(subject, round)),
            Self::Bare(bare) if workload == Workload::Pod => bare.pod(round),
            Self::Bare(_) => bail!("an OCI runtime alone cannot do this"),
        }
    }

    fn log_tail(&self) -> String {
        match self {
            Self::Daemon { subject, .. } => subject.log_tail(),
            Self::Bare(_) => String::new(),
        }
    }

    /// Removes what is left of pods.
    fn end(self) -> Result<()> {
        let Self::Daemon { runtime, subject, .. } = self else { return Ok(()) };
        runtime.block_on(async {
            for pod in subject.cri.pods().await? {
                subject.cri.stop_pod(&pod.id).await?;
                subject.cri.remove_pod(&pod.id).await?;
            }
            anyhow::Ok(())
        })?;
        podvisor_tests::world::remove_pod_cgroups();
        subject.end()
    }
}
