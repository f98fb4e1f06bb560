//! What plugins get to see and change: the daemon's part of the bargain.

use std::future::Future;
use std::pin::Pin;

use podvisor_proto::nri::{Container, ContainerEviction, ContainerUpdate, PodSandbox};

/// A future behind a trait object.
pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Everything there is, of which plugins have been told, or would have been if there had been any.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Pods.
    pub pods: Vec<PodSandbox>,
    /// Containers.
    pub containers: Vec<Container>,
}

/// The container runtime, as plugins know it.
pub trait Runtime: Send + Sync + 'static {
    /// Name and version.
    fn version(&self) -> (String, String);

    /// Waits until the inventory can be trusted, after a start.
    fn settled(&self) -> Boxed<'_, ()>;

    /// What there is. No hook runs meanwhile; must not wait for one.
    fn inventory(&self) -> Boxed<'_, Inventory>;

    /// Changes containers and evicts others. The answer is what could not be changed, and the first reason.
    fn apply(
        &self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<ContainerEviction>,
    ) -> Boxed<'_, (Vec<ContainerUpdate>, Option<String>)>;
}
