//! Container events for GetContainerEvents: one broadcast channel; a reader that falls behind is told so by the end of its stream
//! and lists again, as kubelet's evented PLEG does.

use std::sync::Arc;

use podvisor_proto::cri;
use tokio::sync::broadcast;

/// Where events are announced.
#[derive(Debug)]
pub(crate) struct Events {
    sender: broadcast::Sender<Arc<cri::ContainerEventResponse>>,
}

impl Default for Events {
    fn default() -> Self {
        // Kubelet reads at once; the room is for a burst while it is busy. It is made in advance, for pointers.
        Self { sender: broadcast::channel(1024).0 }
    }
}

impl Events {
    pub(crate) fn announce(&self, event: cri::ContainerEventResponse) {
        // Nobody listening is the normal case.
        let _ = self.sender.send(Arc::new(event));
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.sender.receiver_count() > 0
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Arc<cri::ContainerEventResponse>> {
        self.sender.subscribe()
    }
}
