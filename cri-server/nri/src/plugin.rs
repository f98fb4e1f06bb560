//! One plugin: how it introduces itself, and how it is called.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use podvisor_proto::nri::{
    ConfigureRequest, ConfigureResponse, Container, ContainerUpdate, CreateContainerRequest,
    CreateContainerResponse, Empty, Event, LinuxResources, PodSandbox, RegisterPluginRequest,
    StartContainerRequest, StateChangeEvent, StopContainerRequest, StopContainerResponse, SynchronizeRequest,
    SynchronizeResponse, UpdateContainerRequest, UpdateContainerResponse, UpdateContainersRequest,
    UpdateContainersResponse, UpdatePodSandboxRequest, ValidateContainerAdjustmentRequest,
    ValidateContainerAdjustmentResponse,
};
use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use crate::connection::{Answer, CallError, Connection, Refusal, Serve, UNIMPLEMENTED, printable};
use crate::event::{Events, method};
use crate::frame::LONGEST_MESSAGE;
use crate::launch::Child;
use crate::runtime::Runtime;

/// The version of NRI that is spoken, as the Go module counts.
const NRI_VERSION: &str = "v0.12.0";

/// How plugins are talked to.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// From the connection until the plugin has registered.
    pub(crate) registration: Duration,
    /// Each call.
    pub(crate) request: Duration,
}

/// Two digits and a name: the digits say when a plugin is called, the lower the earlier.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PluginName {
    pub(crate) index: String,
    pub(crate) base: String,
}

impl PluginName {
    pub(crate) fn new(index: &str, base: &str) -> Result<Self, RegisterError> {
        let index_is_one = index.len() == 2 && index.bytes().all(|byte| byte.is_ascii_digit());
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
        if !index_is_one {
            return Err(RegisterError::Index(printable(index)));
        }
        if base.is_empty() || base.len() > 255 || !base.chars().all(allowed) {
            return Err(RegisterError::Name(printable(base)));
        }
        Ok(Self { index: index.to_owned(), base: base.to_owned() })
    }

    /// From a file's name.
    pub(crate) fn parse(file: &str) -> Result<Self, RegisterError> {
        let (index, base) = file.split_once('-').unwrap_or((file, ""));
        Self::new(index, base)
    }
}

impl std::fmt::Display for PluginName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.index, self.base)
    }
}

/// Why somebody who connected did not become a plugin.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The index is wrong.
    #[error("plugin index {0:?} is not two digits")]
    Index(String),
    /// The name is wrong.
    #[error("plugin name {0:?} is not letters, digits, '-', '_', '.' and '+'")]
    Name(String),
    /// It did not register.
    #[error("it did not register within {} ms", .0.as_millis())]
    Late(Duration),
    /// It closed its connection first.
    #[error("it went away before it had registered: {0}")]
    Gone(Arc<str>),
    /// It subscribed to an event that does not exist.
    #[error("it subscribed to events that do not exist: {0:#x}")]
    Events(i32),
    /// It did not take its configuration.
    #[error("it was not configured")]
    Configure(#[source] CallError),
}

/// A plugin that has registered and is configured.
#[derive(Debug)]
pub(crate) struct Plugin {
    pub(crate) name: PluginName,
    pub(crate) events: Events,
    pub(crate) connection: Connection,
    limit: Duration,
    /// If podvisor has started it. Ends with this.
    _child: Option<Child>,
}

impl Plugin {
    /// Waits until who has connected has registered, and configures it. `name`: what it is called if podvisor has started it.
    pub(crate) async fn register(
        socket: UnixStream,
        given: Option<PluginName>,
        child: Option<Child>,
        configuration: String,
        (runtime, limits): (Arc<dyn Runtime>, &Limits),
    ) -> Result<Self, RegisterError> {
        let (sender, registered) = oneshot::channel();
        let sender = Mutex::new(Some(sender));
        let served = runtime.clone();
        let serve: Serve = Box::new(move |method, payload| match method {
            "RegisterPlugin" => Some(register(&sender, &payload)),
            "UpdateContainers" => Some(update(served.clone(), payload)),
            _ => None,
        });
        let connection = Connection::over(socket, serve);
        let registered = async {
            tokio::select! {
                registered = registered => registered.map_err(|_| RegisterError::Gone("it closed its connection".into())),
                why = connection.closed() => Err(RegisterError::Gone(why)),
            }
        };
        let said = tokio::time::timeout(limits.registration, registered)
            .await
            .map_err(|_| RegisterError::Late(limits.registration))??;
        let name = match given {
            Some(name) => name,
            None => PluginName::new(&said.plugin_idx, &said.plugin_name)?,
        };
        let milliseconds = |limit: Duration| i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        let (runtime_name, runtime_version) = runtime.version();
        let request = ConfigureRequest {
            config: configuration,
            runtime_name,
            runtime_version,
            registration_timeout: milliseconds(limits.registration),
            request_timeout: milliseconds(limits.request),
            nri_version: NRI_VERSION.into(),
        };
        let answer: ConfigureResponse =
            connection.call("Configure", &request, limits.request).await.map_err(RegisterError::Configure)?;
        let events = Events::parse(answer.events).ok_or(RegisterError::Events(answer.events))?;
        tracing::info!(plugin = %name, nri = printable(&said.nri_version), "an NRI plugin has registered");
        Ok(Self { name, events, connection, limit: limits.request, _child: child })
    }

    async fn call<Q: Message, A: Message + Default>(
        &self,
        method: &'static str,
        request: &Q,
    ) -> Result<A, CallError> {
        self.connection.call(method, request, self.limit).await
    }

    /// Tells it what there is, in as many messages as it takes; the answer to the last counts.
    pub(crate) async fn synchronize(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
    ) -> Result<Vec<ContainerUpdate>, CallError> {
        let mut parts = split(pods, containers).into_iter().peekable();
        let mut updates = Vec::new();
        while let Some(mut part) = parts.next() {
            part.more = parts.peek().is_some();
            let answer: SynchronizeResponse = self.call("Synchronize", &part).await?;
            if part.more && !answer.more {
                // An older plugin takes each message for the whole.
                return Err(CallError::Garbled { method: "Synchronize" });
            }
            updates = answer.update;
        }
        Ok(updates)
    }

    /// Tells of an event to which there is no answer.
    pub(crate) async fn tell(
        &self,
        event: Event,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) -> Result<(), CallError> {
        let Some(method) = method(event).filter(|_| self.events.has(event)) else { return Ok(()) };
        // The requests of all these events have the same two fields.
        let request = StartContainerRequest { pod: Some(pod.clone()), container: container.cloned() };
        match self.call::<_, Empty>(method, &request).await {
            // A plugin from before version 0.12 hears of it by another call.
            Err(CallError::Answered { code: UNIMPLEMENTED, .. }) => {
                let event = event as i32;
                let StartContainerRequest { pod, container } = request;
                self.call("StateChange", &StateChangeEvent { event, pod, container }).await.map(|Empty {}| ())
            }
            told => told.map(|Empty {}| ()),
        }
    }

    pub(crate) async fn update_pod(&self, request: &UpdatePodSandboxRequest) -> Result<(), CallError> {
        if !self.events.has(Event::UpdatePodSandbox) {
            return Ok(());
        }
        self.call("UpdatePodSandbox", request).await.map(|Empty {}| ())
    }

    pub(crate) async fn create(
        &self,
        pod: &PodSandbox,
        container: &Container,
    ) -> Result<CreateContainerResponse, CallError> {
        if !self.events.has(Event::CreateContainer) {
            return Ok(CreateContainerResponse::default());
        }
        let request = CreateContainerRequest { pod: Some(pod.clone()), container: Some(container.clone()) };
        self.call("CreateContainer", &request).await
    }

    pub(crate) async fn validate(
        &self,
        request: &ValidateContainerAdjustmentRequest,
    ) -> Result<ValidateContainerAdjustmentResponse, CallError> {
        self.call("ValidateContainerAdjustment", request).await
    }

    pub(crate) async fn update(
        &self,
        pod: &PodSandbox,
        container: &Container,
        resources: &LinuxResources,
    ) -> Result<UpdateContainerResponse, CallError> {
        if !self.events.has(Event::UpdateContainer) {
            return Ok(UpdateContainerResponse::default());
        }
        let request = UpdateContainerRequest {
            pod: Some(pod.clone()),
            container: Some(container.clone()),
            linux_resources: Some(resources.clone()),
        };
        self.call("UpdateContainer", &request).await
    }

    pub(crate) async fn stop(
        &self,
        pod: &PodSandbox,
        container: &Container,
    ) -> Result<StopContainerResponse, CallError> {
        if !self.events.has(Event::StopContainer) {
            return Ok(StopContainerResponse::default());
        }
        let request = StopContainerRequest { pod: Some(pod.clone()), container: Some(container.clone()) };
        self.call("StopContainer", &request).await
    }

    /// Lets it know that podvisor ends. It need not answer.
    pub(crate) async fn shut_down(&self) {
        let _: Result<Empty, _> = self.call("Shutdown", &Empty {}).await;
        self.connection.close("podvisor ends");
    }
}

type Registered = Mutex<Option<oneshot::Sender<RegisterPluginRequest>>>;

fn register(registered: &Registered, payload: &Bytes) -> Answer {
    let outcome = match RegisterPluginRequest::decode(payload.clone()) {
        Err(_) => Err(Refusal::invalid("this is no RegisterPluginRequest")),
        Ok(request) => match registered.lock().expect("no panic under this lock").take() {
            None => Err(Refusal::invalid("the plugin has registered already")),
            Some(sender) => {
                // Who waited is gone when it took too long.
                let _ = sender.send(request);
                Ok(Empty {}.encode_to_vec().into())
            }
        },
    };
    Box::pin(std::future::ready(outcome))
}

fn update(runtime: Arc<dyn Runtime>, payload: Bytes) -> Answer {
    Box::pin(async move {
        let Ok(UpdateContainersRequest { update, evict }) = UpdateContainersRequest::decode(payload) else {
            return Err(Refusal::invalid("this is no UpdateContainersRequest"));
        };
        let (failed, error) = runtime.apply(update, evict).await;
        match error {
            Some(error) if failed.iter().any(|update| !update.ignore_failure) => {
                Err(Refusal::internal(error))
            }
            _ => Ok(UpdateContainersResponse { failed }.encode_to_vec().into()),
        }
    })
}

/// Messages that each fit into ttRPC's limit, with room for the envelope.
fn split(pods: Vec<PodSandbox>, containers: Vec<Container>) -> Vec<SynchronizeRequest> {
    const ROOM: usize = LONGEST_MESSAGE - 4096;
    let mut parts = vec![SynchronizeRequest::default()];
    let mut used = 0;
    let mut place = |length: usize, parts: &mut Vec<SynchronizeRequest>| {
        // Tag and length of the entry.
        used += length + 8;
        if used > ROOM
            && parts.last().is_some_and(|part| !part.pods.is_empty() || !part.containers.is_empty())
        {
            parts.push(SynchronizeRequest::default());
            used = length + 8;
        }
    };
    for pod in pods {
        place(pod.encoded_len(), &mut parts);
        parts.last_mut().expect("never empty").pods.push(pod);
    }
    for container in containers {
        place(container.encoded_len(), &mut parts);
        parts.last_mut().expect("never empty").containers.push(container);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_begin_with_two_digits() {
        for (file, good) in [
            ("00-a", true),
            ("99-a.b+c_d-e", true),
            ("9-a", false),
            ("aa-b", false),
            ("10", false),
            ("10-", false),
            ("10-a b", false),
            ("10-é", false),
            ("١٢-a", false),
            ("", false),
        ] {
            assert_eq!(PluginName::parse(file).is_ok(), good, "{file}");
        }
        assert!(PluginName::parse("05-z").unwrap() < PluginName::parse("10-a").unwrap());
    }

    #[test]
    fn a_long_synchronisation_is_split() {
        let pod = |id: usize| PodSandbox { id: id.to_string(), ..PodSandbox::default() };
        let large = |id: usize| Container {
            id: id.to_string(),
            args: vec!["x".repeat(1 << 20)],
            ..Container::default()
        };
        assert_eq!(split(vec![], vec![]).len(), 1);
        let parts = split((0..10).map(pod).collect(), (0..10).map(large).collect());
        assert!(parts.len() > 2);
        assert!(parts.iter().all(|part| part.encoded_len() <= LONGEST_MESSAGE - 1024));
        assert_eq!(parts.iter().map(|part| part.pods.len()).sum::<usize>(), 10);
        assert_eq!(parts.iter().map(|part| part.containers.len()).sum::<usize>(), 10);
    }
}
