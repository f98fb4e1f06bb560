//! Slices and scopes over D-Bus, for hosts where systemd owns the cgroup tree. For the daemon only; needs a tokio runtime.
//!
//! Interface: org.freedesktop.systemd1(5). A method that starts or stops something answers with a job; the job is done when the signal
//! `JobRemoved` says so. Only the system bus is used: on systemd's private socket the sender of a message is no unique name, which zbus
//! refuses to read. A host with systemd but without D-Bus needs the cgroupfs driver.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::{Mutex, broadcast};
use tokio::task::AbortHandle;
use zbus::message::Type;
use zbus::{Connection, MessageStream, OwnedObjectPath, Variant};

const BUS_NAME: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// How long one job may take; systemd's own default for starting and stopping a unit is 90 s.
const JOB_WITHIN: Duration = Duration::from_secs(100);

/// Jobs that may end unseen while a waiter is not running.
const JOBS_QUEUED: usize = 1024;

/// Why systemd did not do it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SystemdError {
    /// The system bus did not answer, or systemd not on it.
    #[error("cannot reach systemd over the system D-Bus")]
    Connect(#[source] Box<zbus::Error>),
    /// A method call failed; the source holds systemd's words.
    #[error("systemd refused {method} for {unit}")]
    Call {
        /// D-Bus method.
        method: &'static str,
        /// The unit it was about.
        unit: String,
        /// The answer.
        #[source]
        source: Box<zbus::Error>,
    },
    /// The job was accepted and did not end well.
    #[error("systemd's job for {unit} ended as {result:?}")]
    Job {
        /// The unit it was about.
        unit: String,
        /// `failed`, `timeout`, `canceled`, `dependency`, `skipped`, …
        result: String,
    },
    /// No end of the job was seen in time.
    #[error("systemd's job for {unit} did not end within {} s", JOB_WITHIN.as_secs())]
    Timeout {
        /// The unit it was about.
        unit: String,
    },
    /// The connection broke while a job was under way.
    #[error("lost the connection to systemd while its job for {unit} was under way")]
    Lost {
        /// The unit it was about.
        unit: String,
    },
}

impl SystemdError {
    /// The last part of the D-Bus error name, e.g. `NoSuchUnit`.
    fn reply_name(&self) -> Option<&str> {
        let Self::Call { source, .. } = self else { return None };
        let zbus::Error::MethodError(name, ..) = source.as_ref() else { return None };
        name.as_str().rsplit('.').next()
    }

    /// A unit of that name is there.
    pub fn is_unit_exists(&self) -> bool {
        self.reply_name() == Some("UnitExists")
    }

    fn is_no_such_unit(&self) -> bool {
        self.reply_name() == Some("NoSuchUnit")
    }
}

type Result<T> = std::result::Result<T, SystemdError>;

/// A transient scope: a unit around processes that somebody else started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// `NAME.scope`.
    pub name: String,
    /// `NAME.slice` that it is put into.
    pub slice: String,
    /// For people who look at `systemctl status`.
    pub description: String,
    /// Its first processes, as the caller sees them; at least one.
    pub pids: Vec<u32>,
}

/// Connection to systemd, made when it is first needed and again when it broke.
#[derive(Debug, Default)]
pub struct Systemd {
    live: Mutex<Option<Arc<Live>>>,
}

#[derive(Debug)]
struct Live {
    connection: Connection,
    /// Path and result of every job that ends.
    jobs: broadcast::Sender<(OwnedObjectPath, String)>,
    reader: AbortHandle,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

type Properties<'a> = Vec<(&'a str, Variant<'a>)>;

impl Systemd {
    /// Nothing is connected yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a scope with `Delegate=yes`: systemd leaves the cgroups below it to us, and its limits alone. A failed scope of
    /// the same name, left from an earlier run, is replaced; a living one is an error ([`SystemdError::is_unit_exists`]).
    pub async fn start_scope(&self, scope: &Scope) -> Result<()> {
        match self.start_scope_once(scope).await {
            Err(error) if error.is_unit_exists() => {
                self.reset_failed(&scope.name).await?;
                self.start_scope_once(scope).await
            }
            result => result,
        }
    }

    async fn start_scope_once(&self, scope: &Scope) -> Result<()> {
        let properties: Properties<'_> = vec![
            ("Description", Variant::from(scope.description.as_str())),
            ("Slice", Variant::from(scope.slice.as_str())),
            ("Delegate", Variant::from(true)),
            ("PIDs", Variant::from(scope.pids.clone())),
            // Not stopped by shutdown.target before kubelet has ended its pods, and needs nothing to be up.
            ("DefaultDependencies", Variant::from(false)),
            // A scope whose process was killed must not stay behind as failed.
            ("CollectMode", Variant::from("inactive-or-failed")),
            // DefaultTasksMax would be a limit nobody asked for.
            ("TasksMax", Variant::from(u64::MAX)),
        ];
        let aux: Vec<(&str, Properties<'_>)> = Vec::new();
        let body = (scope.name.as_str(), "fail", properties, aux);
        self.job("StartTransientUnit", &scope.name, &body).await
    }

    /// Starts a slice, so that its cgroup exists; fine when it is active. systemd knows every slice by its name, without a unit file.
    pub async fn ensure_slice(&self, name: &str) -> Result<()> {
        self.job("StartUnit", name, &(name, "replace")).await
    }

    /// Stops a unit and forgets its failure; fine when there is none of that name.
    pub async fn stop_unit(&self, name: &str) -> Result<()> {
        match self.job("StopUnit", name, &(name, "replace")).await {
            Err(error) if error.is_no_such_unit() => return Ok(()),
            result => result?,
        }
        self.reset_failed(name).await
    }

    async fn reset_failed(&self, name: &str) -> Result<()> {
        match self.live().await?.call("ResetFailedUnit", name, &(name,)).await {
            Err(error) if !error.is_no_such_unit() => Err(error),
            _ => Ok(()),
        }
    }

    async fn job<B>(&self, method: &'static str, unit: &str, body: &B) -> Result<()>
    where
        B: serde::Serialize + zbus::DynamicType + Sync,
    {
        let live = self.live().await?;
        // Before the call: the job may be gone before its path is known here.
        let mut ended = live.jobs.subscribe();
        let reply = live.call(method, unit, body).await?;
        let path: OwnedObjectPath = reply.body().deserialize().map_err(|source| SystemdError::Call {
            method,
            unit: unit.into(),
            source: Box::new(source),
        })?;
        let wait = async {
            loop {
                match ended.recv().await {
                    Ok((job, result)) if job == path => return Ok(result),
                    // What was missed is found by the deadline; that many jobs at once are not seen in practice.
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => {
                        return Err(SystemdError::Lost { unit: unit.into() });
                    }
                }
            }
        };
        let result = tokio::select! {
            result = tokio::time::timeout(JOB_WITHIN, wait) => {
                result.unwrap_or_else(|_| Err(SystemdError::Timeout { unit: unit.into() }))?
            }
            () = live.connection.closed() => return Err(SystemdError::Lost { unit: unit.into() }),
        };
        if result == "done" { Ok(()) } else { Err(SystemdError::Job { unit: unit.into(), result }) }
    }

    async fn live(&self) -> Result<Arc<Live>> {
        // Held while connecting on purpose: everybody who comes meanwhile needs that connection.
        let mut live = self.live.lock().await;
        if let Some(live) = live.as_ref().filter(|live| !live.connection.is_closed()) {
            return Ok(Arc::clone(live));
        }
        let connection =
            Connection::system().await.map_err(|source| SystemdError::Connect(Box::new(source)))?;
        let connected = Arc::new(Live::start(connection).await?);
        *live = Some(Arc::clone(&connected));
        Ok(connected)
    }

    /// Over a connection that the caller made.
    #[cfg(test)]
    async fn over(connection: Connection) -> Self {
        let live = Live::start(connection).await.unwrap();
        Self { live: Mutex::new(Some(Arc::new(live))) }
    }
}

impl Live {
    async fn start(connection: Connection) -> Result<Self> {
        let failed = |source: zbus::Error| SystemdError::Connect(Box::new(source));
        let (jobs, _) = broadcast::channel(JOBS_QUEUED);
        // A task of its own: a message stream that is not read all the time stalls the whole connection.
        let stream = MessageStream::from(&connection);
        let reader = tokio::spawn(read_jobs(stream, jobs.clone())).abort_handle();
        let live = Self { connection, jobs, reader };
        if live.connection.is_bus() {
            let rule = format!("type='signal',sender='{BUS_NAME}',interface='{MANAGER}',member='JobRemoved'");
            let bus = "org.freedesktop.DBus";
            live.connection
                .call_method(Some(bus), "/org/freedesktop/DBus", Some(bus), "AddMatch", &(rule,))
                .await
                .map_err(failed)?;
        }
        // Without a subscriber systemd sends no job signals to the bus.
        let subscribed =
            live.connection.call_method(Some(BUS_NAME), PATH, Some(MANAGER), "Subscribe", &()).await;
        match subscribed {
            Ok(_) => {}
            Err(zbus::Error::MethodError(name, ..)) if name.as_str().ends_with(".AlreadySubscribed") => {}
            Err(error) => return Err(failed(error)),
        }
        Ok(live)
    }

    async fn call<B>(&self, method: &'static str, unit: &str, body: &B) -> Result<zbus::Message>
    where
        B: serde::Serialize + zbus::DynamicType + Sync,
    {
        let reply = self.connection.call_method(Some(BUS_NAME), PATH, Some(MANAGER), method, body);
        let failed = |source| SystemdError::Call { method, unit: unit.into(), source: Box::new(source) };
        match tokio::time::timeout(JOB_WITHIN, reply).await {
            Ok(reply) => reply.map_err(failed),
            Err(_) => Err(SystemdError::Timeout { unit: unit.into() }),
        }
    }
}

/// `JobRemoved(u id, o job, s unit, s result)`
async fn read_jobs(mut stream: MessageStream, jobs: broadcast::Sender<(OwnedObjectPath, String)>) {
    while let Some(message) = stream.next().await {
        let Ok(message) = message else { continue };
        let header = message.header();
        let is_job = message.message_type() == Type::Signal
            && header.interface().is_some_and(|name| name.as_str() == MANAGER)
            && header.member().is_some_and(|name| name.as_str() == "JobRemoved");
        if is_job
            && let Ok((_, job, _, result)) =
                message.body().deserialize::<(u32, OwnedObjectPath, String, String)>()
        {
            // Nobody waiting is fine.
            let _ = jobs.send((job, result));
        }
    }
}

#[cfg(test)]
mod tests;
