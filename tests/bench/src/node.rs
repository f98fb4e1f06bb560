//! One subject in its sandbox, which does what it is told until the front hangs up.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use podvisor_critest::peer;
use podvisor_critest::registry::{Access, Registry};
use podvisor_tests::images::BUSYBOX;
use tokio::runtime::Runtime;

use crate::bare::Bare;
use crate::boot::Boot;
use crate::images;
use crate::subject::{Name, Subject};
use crate::unpack::unpack;
use crate::wire::{Line, Order, Ready, Report, Sample};
use crate::workload::{Whole, Workload};

pub(crate) fn serve(name: Name, socket: &Path, images: &Path) -> Result<()> {
    let stream =
        UnixStream::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
    let mut line = Line::new(stream);
    let mut worker = Worker::start(name, images)?;
    line.say(&Ready { subject: name, version: worker.version()? })?;
    while let Some(Order { workload, round }) = line.hear()? {
        let outcome =
            worker.run(workload, round).map_err(|error| format!("{error:#}\n{}", worker.log_tail()));
        if outcome.is_err() {
            worker.clear();
        }
        line.say(&Report { outcome })?;
    }
    worker.end()
}

enum Worker {
    Daemon { runtime: Runtime, subject: Box<Subject>, _registry: Registry },
    Bare { runtime: Bare, images: PathBuf },
    Boot(Boot),
}

impl Worker {
    fn start(name: Name, images: &Path) -> Result<Self> {
        match name {
            Name::Runc | Name::Crun => {
                return Ok(Self::Bare { runtime: Bare::new(name)?, images: images.to_owned() });
            }
            Name::Qemu => return Ok(Self::Boot(Boot::new()?)),
            _ => {}
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
            Self::Bare { runtime, .. } => runtime.version(),
            Self::Boot(_) => Boot::version(),
        }
    }

    fn run(&mut self, workload: Workload, round: u32) -> Result<Vec<Sample>> {
        match self {
            Self::Daemon { runtime, subject, .. } => runtime.block_on(Box::pin(workload.run(subject, round))),
            Self::Boot(boot) => boot.run(),
            Self::Bare { runtime, images } => match (workload, workload.image()) {
                (Workload::Pod, _) => runtime.pod(round),
                (Workload::AtOnce, _) => runtime.at_once(10),
                (_, Some(Whole { repository, tag, series })) => {
                    let time = unpack(&images::layers(images, repository, tag)?)?;
                    Ok(vec![Sample::new(series, "s", time.as_secs_f64())])
                }
                _ => bail!("an OCI runtime alone cannot do this"),
            },
        }
    }

    fn log_tail(&self) -> String {
        match self {
            Self::Daemon { subject, .. } => subject.log_tail(),
            _ => String::new(),
        }
    }

    /// Removes what work that has failed has left, as far as that can be done.
    fn clear(&self) {
        if let Self::Daemon { runtime, subject, .. } = self
            && let Err(error) = runtime.block_on(remove_pods(subject))
        {
            eprintln!("removing what is left: {error:#}");
        }
    }

    fn end(self) -> Result<()> {
        match self {
            Self::Daemon { runtime, subject, .. } => {
                runtime.block_on(remove_pods(&subject))?;
                podvisor_tests::world::remove_pod_cgroups();
                subject.end()?;
            }
            Self::Bare { .. } => peer::remove_network(),
            Self::Boot(_) => {}
        }
        Ok(())
    }
}

async fn remove_pods(subject: &Subject) -> Result<()> {
    for pod in subject.cri.pods().await? {
        subject.cri.stop_pod(&pod.id).await?;
        subject.cri.remove_pod(&pod.id).await?;
    }
    Ok(())
}
