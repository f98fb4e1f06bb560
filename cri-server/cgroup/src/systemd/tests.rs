//! What goes over the wire, against a peer that answers as org.freedesktop.systemd1(5) says.

use std::os::unix::net::UnixStream;

use zbus::connection::Builder;
use zbus::{Guid, ObjectPath, OwnedVariant};

use super::*;

/// What the peer is to do with a job: refuse it with an error, or end it with a result.
#[derive(Clone, Copy)]
enum Answer {
    Error(&'static str),
    Result(&'static str),
    HangUp,
}

type Aux = Vec<(String, Vec<(String, OwnedVariant)>)>;
type Sent = Vec<(String, zbus::Message)>;

/// A peer that gives `answers` to the calls that start jobs, one after the other. Yields all calls it saw.
async fn peer(server: UnixStream, answers: Vec<Answer>) -> Sent {
    let connection = Builder::unix_stream(server).server(Guid::generate()).p2p().build().await.unwrap();
    let mut stream = MessageStream::from(&connection);
    let mut answers = answers.into_iter();
    let mut sent = Vec::new();
    while let Some(Ok(message)) = stream.next().await {
        if message.message_type() != Type::MethodCall {
            continue;
        }
        let header = message.header();
        let member = header.member().unwrap().to_string();
        assert_eq!(header.interface().unwrap().as_str(), MANAGER);
        assert_eq!(header.path().unwrap().as_str(), PATH);
        sent.push((member.clone(), message.clone()));
        if member == "Subscribe" || member == "ResetFailedUnit" {
            connection.reply(&header, &()).await.unwrap();
            continue;
        }
        match answers.next().expect("a call that the test does not expect") {
            Answer::Error(name) => {
                let name = format!("{BUS_NAME}.{name}");
                connection.reply_error(&header, name.as_str(), &("no",)).await.unwrap();
            }
            Answer::Result(result) => {
                let job = ObjectPath::try_from(format!("{PATH}/job/{}", sent.len())).unwrap();
                let other = ObjectPath::try_from(format!("{PATH}/job/999")).unwrap();
                connection.reply(&header, &(&job,)).await.unwrap();
                for (path, result) in [(&other, "failed"), (&job, result)] {
                    let body = (1_u32, path, "any.unit", result);
                    connection.emit_signal(None::<()>, PATH, MANAGER, "JobRemoved", &body).await.unwrap();
                }
            }
            Answer::HangUp => break,
        }
    }
    sent
}

/// Runs `client` against a peer; its result, and the calls but for Subscribe.
fn with_peer<T, F>(answers: Vec<Answer>, client: impl FnOnce(Systemd) -> F) -> (T, Sent)
where
    F: Future<Output = T>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = tokio::spawn(peer(theirs, answers));
        let connection = Builder::unix_stream(ours).p2p().build().await.unwrap();
        let result = client(Systemd::over(connection).await).await;
        let mut sent = peer.await.unwrap();
        assert_eq!(sent.remove(0).0, "Subscribe");
        (result, sent)
    })
}

fn scope() -> Scope {
    Scope {
        name: "podvisor-monitor-x.scope".into(),
        slice: "podvisor.slice".into(),
        description: "monitor of pod x".into(),
        pids: vec![41, 42],
    }
}

#[test]
fn scope_is_started_with_its_processes() {
    let (result, sent) =
        with_peer(vec![Answer::Result("done")], async |systemd| systemd.start_scope(&scope()).await);
    result.unwrap();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].0, "StartTransientUnit");
    let body = sent[0].1.body();
    assert_eq!(body.signature().to_string(), "(ssa(sv)a(sa(sv)))");
    let (name, mode, properties, aux): (String, String, Vec<(String, OwnedVariant)>, Aux) =
        body.deserialize().unwrap();
    assert_eq!((name.as_str(), mode.as_str(), aux.len()), ("podvisor-monitor-x.scope", "fail", 0));
    let property = |wanted: &str| properties.iter().find(|(name, _)| name == wanted).unwrap().1.clone();
    assert_eq!(String::try_from(property("Slice")).unwrap(), "podvisor.slice");
    assert_eq!(Vec::<u32>::try_from(property("PIDs")).unwrap(), [41, 42]);
    assert!(bool::try_from(property("Delegate")).unwrap());
    assert_eq!(u64::try_from(property("TasksMax")).unwrap(), u64::MAX);
}

#[test]
fn failed_scope_of_the_same_name_is_replaced_once() {
    let answers = vec![Answer::Error("UnitExists"), Answer::Result("done")];
    let (result, sent) = with_peer(answers, async |systemd| systemd.start_scope(&scope()).await);
    result.unwrap();
    let calls: Vec<_> = sent.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(calls, ["StartTransientUnit", "ResetFailedUnit", "StartTransientUnit"]);

    let answers = vec![Answer::Error("UnitExists"), Answer::Error("UnitExists")];
    let (result, _) = with_peer(answers, async |systemd| systemd.start_scope(&scope()).await);
    assert!(result.unwrap_err().is_unit_exists());
}

#[test]
fn job_that_fails_is_an_error() {
    for result in ["failed", "timeout", "canceled", "dependency"] {
        let (error, _) =
            with_peer(vec![Answer::Result(result)], async |systemd| systemd.ensure_slice("a.slice").await);
        assert!(
            matches!(error.unwrap_err(), SystemdError::Job { unit, result: seen } if unit == "a.slice" && seen == result)
        );
    }
}

#[test]
fn stopping_what_is_not_there_is_fine() {
    let (result, _) =
        with_peer(vec![Answer::Error("NoSuchUnit")], async |systemd| systemd.stop_unit("a.scope").await);
    result.unwrap();
    let (result, sent) =
        with_peer(vec![Answer::Result("done")], async |systemd| systemd.stop_unit("a.scope").await);
    result.unwrap();
    assert_eq!(sent.last().unwrap().0, "ResetFailedUnit");
    let (result, _) =
        with_peer(vec![Answer::Error("AccessDenied")], async |systemd| systemd.stop_unit("a.scope").await);
    assert!(matches!(result.unwrap_err(), SystemdError::Call { method: "StopUnit", .. }));
}

#[test]
fn broken_connection_is_told() {
    let (result, _) = with_peer(vec![Answer::HangUp], async |systemd| systemd.stop_unit("a.scope").await);
    assert!(result.is_err());
}
