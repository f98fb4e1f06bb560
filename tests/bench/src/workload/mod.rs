//! What is measured, one file each: work that a subject does once per order.

mod at_once;
mod grow;
mod images;
mod log;
mod pod;
mod pull;
mod streams;
mod timeline;

use anyhow::Result;
use podvisor_proto::cri::ContainerConfig;
use serde::{Deserialize, Serialize};

use crate::subject::{Name, Subject};
use crate::wire::Sample;
pub(crate) use pull::Whole;

/// What.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// A pod with one container from RunPodSandbox to RemovePodSandbox.
    Pod,
    /// Ten of them at once, and what they take in memory.
    AtOnce,
    /// Fifty of them at once.
    FiftyAtOnce,
    /// A node from no pod to 200: answers, memory, restarts of the daemon, and what it does when there is nothing to do.
    Grow,
    /// A container that writes lines as fast as they are taken.
    Log,
    /// Exec, attach and port-forward: there and back, and how much goes through.
    Streams,
    /// An image of eight layers.
    Pull,
    /// The same in zstd.
    PullZstd,
    /// Eight layers that cannot be compressed.
    PullRandom,
    /// An image of which half the layers are there.
    PullHalf,
    /// Ten images at the same time, which share most of their layers.
    PullTen,
    /// A node with up to a hundred images.
    Images,
    /// A pod in a virtual machine.
    Machine,
    /// Ten of them at once.
    MachinesAtOnce,
    /// The steps of a pod's life.
    Timeline,
}

impl Workload {
    pub(crate) const ALL: [Self; 15] = [
        Self::Pod,
        Self::AtOnce,
        Self::FiftyAtOnce,
        Self::Grow,
        Self::Log,
        Self::Streams,
        Self::Pull,
        Self::PullZstd,
        Self::PullRandom,
        Self::PullHalf,
        Self::PullTen,
        Self::Images,
        Self::Machine,
        Self::MachinesAtOnce,
        Self::Timeline,
    ];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::AtOnce => "at-once",
            Self::FiftyAtOnce => "fifty-at-once",
            Self::Grow => "grow",
            Self::Log => "log",
            Self::Streams => "streams",
            Self::Pull => "pull",
            Self::PullZstd => "pull-zstd",
            Self::PullRandom => "pull-random",
            Self::PullHalf => "pull-half",
            Self::PullTen => "pull-ten",
            Self::Images => "images",
            Self::Machine => "machine",
            Self::MachinesAtOnce => "machines-at-once",
            Self::Timeline => "timeline",
        }
    }

    /// How often it is done when the quickest is done `rounds` times. What is done more than once is done one more time before that, which
    /// is not counted.
    pub(crate) fn rounds(self, rounds: u32) -> u32 {
        match self {
            Self::Pod => rounds,
            Self::AtOnce | Self::Streams | Self::Pull | Self::PullZstd | Self::Machine => rounds.div_ceil(4),
            Self::PullRandom | Self::PullHalf | Self::PullTen => rounds.div_ceil(7),
            Self::FiftyAtOnce | Self::Log => rounds.div_ceil(20),
            Self::Grow | Self::Images | Self::MachinesAtOnce | Self::Timeline => 1,
        }
    }

    /// Who does it.
    pub(crate) fn takes(self, name: Name) -> bool {
        let daemons = matches!(name, Name::Podvisor | Name::Containerd | Name::Crio);
        let machines = name == Name::PodvisorVm;
        match self {
            Self::Pod | Self::AtOnce => !machines && name != Name::Qemu,
            // The OCI runtime's place is taken by a program that unpacks layers and does nothing else.
            Self::Pull | Self::PullZstd | Self::PullRandom => daemons || name == Name::Runc,
            Self::Machine => machines || name == Name::Qemu,
            Self::MachinesAtOnce => machines,
            Self::Timeline => name.is_ours(),
            _ => daemons,
        }
    }

    /// The image that it pulls as a whole.
    pub(crate) fn image(self) -> Option<Whole> {
        match self {
            Self::Pull => Some(pull::GZIP),
            Self::PullZstd => Some(pull::ZSTD),
            Self::PullRandom => Some(pull::INCOMPRESSIBLE),
            _ => None,
        }
    }

    pub(crate) async fn run(self, subject: &mut Subject, round: u32) -> Result<Vec<Sample>> {
        match self {
            Self::Pod | Self::Machine => pod::run(subject, round).await,
            Self::AtOnce | Self::MachinesAtOnce => at_once::run(subject, 10).await,
            Self::FiftyAtOnce => at_once::run(subject, 50).await,
            Self::Grow => Box::pin(grow::run(subject)).await,
            Self::Log => log::run(subject, round).await,
            Self::Streams => streams::run(subject, round).await,
            Self::Pull => pull::whole(subject, pull::GZIP).await,
            Self::PullZstd => pull::whole(subject, pull::ZSTD).await,
            Self::PullRandom => pull::whole(subject, pull::INCOMPRESSIBLE).await,
            Self::PullHalf => pull::half(subject).await,
            Self::PullTen => pull::ten(subject).await,
            Self::Images => images::run(subject).await,
            Self::Timeline => timeline::run(subject).await,
        }
    }
}

/// Runs a pod of that name with one running container; their ids.
async fn running(subject: &Subject, name: &str, container: &ContainerConfig) -> Result<(String, String)> {
    let config = podvisor_tests::ask::pod(name, subject.logs());
    std::fs::create_dir_all(&config.log_directory)?;
    let pod = Box::pin(subject.cri.run_pod(&config)).await?;
    let container = as_kubelet(container.clone());
    let id = Box::pin(subject.cri.create(&pod, &container, &config)).await?;
    subject.cri.start(&id).await?;
    Ok((pod, id))
}

/// With the name that the user has written beside the image's own, as kubelet sends it: CRI-O checks signatures by it.
fn as_kubelet(mut container: ContainerConfig) -> ContainerConfig {
    if let Some(image) = &mut container.image {
        image.user_specified_image.clone_from(&image.image);
    }
    container
}

async fn remove(subject: &Subject, pod: &str) -> Result<()> {
    subject.cri.stop_pod(pod).await?;
    Ok(subject.cri.remove_pod(pod).await?)
}
