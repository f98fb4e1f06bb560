//! What is measured, one file each: work that a subject does once per order.

mod at_once;
mod lists;
mod log;
mod pod;
mod pull;

use anyhow::Result;
use podvisor_proto::cri::ContainerConfig;
use serde::{Deserialize, Serialize};

use crate::subject::Subject;
use crate::wire::Sample;

/// What.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// A pod with one container from RunPodSandbox to RemovePodSandbox.
    Pod,
    /// Ten of them at once, and what they take in memory.
    AtOnce,
    /// Lists and status while pods come and go.
    Lists,
    /// A container that writes lines as fast as they are taken.
    Log,
    /// An image of eight layers.
    Pull,
    /// The same in zstd.
    PullZstd,
}

impl Workload {
    pub(crate) const ALL: [Self; 6] =
        [Self::Pod, Self::AtOnce, Self::Lists, Self::Log, Self::Pull, Self::PullZstd];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::AtOnce => "at-once",
            Self::Lists => "lists",
            Self::Log => "log",
            Self::Pull => "pull",
            Self::PullZstd => "pull-zstd",
        }
    }

    /// How often it is done when the quickest is done `rounds` times. What is done more than once is done one more time before that, which
    /// is not counted.
    pub(crate) fn rounds(self, rounds: u32) -> u32 {
        match self {
            Self::Pod => rounds,
            Self::AtOnce | Self::Log | Self::Pull | Self::PullZstd => rounds.div_ceil(4),
            Self::Lists => 1,
        }
    }

    /// Whether an OCI runtime alone can do it.
    pub(crate) fn has_limit(self) -> bool {
        self == Self::Pod
    }

    /// Whether it pulls more than small images.
    pub(crate) fn needs_application(self) -> bool {
        matches!(self, Self::Pull | Self::PullZstd)
    }

    pub(crate) async fn run(self, subject: &Subject, round: u32) -> Result<Vec<Sample>> {
        match self {
            Self::Pod => pod::run(subject, round).await,
            Self::AtOnce => at_once::run(subject, round).await,
            Self::Lists => lists::run(subject).await,
            Self::Log => log::run(subject, round).await,
            Self::Pull => pull::run(subject, crate::images::APPLICATION, "pull").await,
            Self::PullZstd => pull::run(subject, crate::images::APPLICATION_ZSTD, "pull zstd").await,
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
