//! A shell that is spoken with over exec, attach and port-forward: how long a line is on its way there and back, and how much comes through.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{AttachRequest, ExecRequest, PortForwardRequest};
use podvisor_tests::stream::{STDIN, STDOUT, Session};
use podvisor_tests::{ask, eventually};

use super::{remove, running};
use crate::subject::Subject;
use crate::wire::Sample;

/// Answers 0 with an empty line, and every other number with so many blocks of 64 KiB and one.
const SERVER: &str =
    "while read n; do test $n = 0 || dd if=/dev/zero bs=65536 count=$n 2>/dev/null; echo; done";
/// The first process of a pid namespace ignores signals that it does not handle.
const OBEY: &str = "trap 'exit 0' TERM; ";
const PORT: u16 = 8080;
const BLOCKS: usize = 1600;
/// Blocks asked for at once of an attached shell: a container never waits for somebody who is attached to podvisor, so who is 1 MiB behind is
/// sent away.
const ATTACHED_BLOCKS: usize = 8;
const ROUND_TRIPS: u32 = 50;
/// Both directions of a forwarded port.
const DATA: u8 = 0;

pub(super) async fn run(subject: &Subject, round: u32) -> Result<Vec<Sample>> {
    let mut runtime = subject.cri.runtime.clone();
    let mut config = ask::script("c", &format!("{OBEY}{SERVER}"));
    config.stdin = true;
    let (pod, container) = running(subject, &format!("streams{round}"), &config).await?;
    let listen = format!("{OBEY}nc -lk -p {PORT} -e sh -c '{SERVER}' & wait");
    let (listener, id) = running(subject, &format!("listens{round}"), &ask::script("c", &listen)).await?;
    eventually("nc listens", || async {
        let listening = ["grep", "-q", ":1F90 ", "/proc/net/tcp", "/proc/net/tcp6"];
        let code = subject.cri.exec(&id, &listening, 10).await?.exit_code;
        ensure!(code == 0, "grep ended with {code}");
        Ok(())
    })
    .await?;
    let mut samples = Vec::new();
    let command = ["sh", "-c", SERVER].map(str::to_owned).to_vec();
    let request = ExecRequest {
        container_id: container.clone(),
        cmd: command,
        stdin: true,
        stdout: true,
        ..ExecRequest::default()
    };
    let session = Session::open(&runtime.exec(request).await?.into_inner().url).await?;
    samples.extend(measure("exec", session, STDIN, STDOUT, BLOCKS).await?);
    let request = AttachRequest {
        container_id: container.clone(),
        stdin: true,
        stdout: true,
        ..AttachRequest::default()
    };
    let session = Session::open(&runtime.attach(request).await?.into_inner().url).await?;
    samples.extend(measure("attach", session, STDIN, STDOUT, ATTACHED_BLOCKS).await?);
    let request = PortForwardRequest { pod_sandbox_id: listener.clone(), port: vec![PORT.into()] };
    let mut session = Session::open(&runtime.port_forward(request).await?.into_inner().url).await?;
    // Data and errors begin with the port's number each.
    for _ in 0..2 {
        session.next().await?.context("the end before the port's number")?;
    }
    samples.extend(measure("port-forward", session, DATA, DATA, BLOCKS).await?);
    remove(subject, &pod).await?;
    remove(subject, &listener).await?;
    Ok(samples)
}

async fn measure(what: &str, mut session: Session, to: u8, from: u8, blocks: usize) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let series = format!("{what}, there and back");
    for number in 0..=ROUND_TRIPS {
        let began = Instant::now();
        session.send(to, b"0\n").await?;
        take(&mut session, from, 1).await.context(series.clone())?;
        // The first one waits until the shell runs.
        if number > 0 {
            samples.push(Sample::milliseconds(&series, began.elapsed()));
        }
    }
    let began = Instant::now();
    let (pieces, piece) = (BLOCKS / blocks, blocks * 65_536 + 1);
    for _ in 0..pieces {
        session.send(to, format!("{blocks}\n").as_bytes()).await?;
        take(&mut session, from, piece).await.with_context(|| format!("{what} of {piece} bytes"))?;
    }
    #[allow(clippy::cast_precision_loss)] // 100 MB
    let rate = (pieces * piece) as f64 / 1e6 / began.elapsed().as_secs_f64();
    samples.push(Sample::new(&format!("{what}, throughput"), "MB/s", rate));
    Ok(samples)
}

/// Waits for so many bytes of a channel.
async fn take(session: &mut Session, from: u8, count: usize) -> Result<()> {
    let mut rest = count;
    while rest > 0 {
        let (channel, bytes) =
            session.next().await?.with_context(|| format!("it ended {rest} bytes early"))?;
        ensure!(channel == from, "channel {channel} says {}", String::from_utf8_lossy(&bytes));
        rest = rest.checked_sub(bytes.len()).context("more bytes than were asked for")?;
    }
    Ok(())
}
