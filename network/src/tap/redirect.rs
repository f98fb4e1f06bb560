//! What joins an interface and a tap: tc(8) filters at their clsact queueing disciplines.
//!
//! Wire facts: include/uapi/linux/pkt_sched.h, pkt_cls.h, tc_act/tc_mirred.h. Only the classifiers u32 and bpf and the action mirred are
//! used, which every distribution's kernel has, and small ones too. The last filter drops, which needs no action: the program of a bpf
//! classifier in direct-action mode is its own.

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rustix::io::Errno;

use crate::netlink::{Batch, Client, Refusal, attribute, nested};

const RTM_NEWQDISC: u16 = 36;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_U32_INDEV: u16 = 8;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const TC_U32_TERMINAL: u8 = 1;
const TCA_EGRESS_REDIR: u32 = 1;
/// The packet is not this hook's any more.
const TC_ACT_STOLEN: u32 = 4;
const TC_ACT_SHOT: u32 = 2;
/// Of a clsact queueing discipline: itself, and where its filters hang.
const CLSACT: u32 = 0xffff_fff1;
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const ETH_P_ALL: u16 = 3;
/// "pv": behind filters that a plugin may have put there.
const PREFERENCE: u16 = 0x7076;

/// `struct tcmsg`.
fn header(index: u32, handle: u32, parent: u32, information: u32) -> Vec<u8> {
    let mut message = vec![0; 4];
    for number in [index, handle, parent, information] {
        message.extend_from_slice(&number.to_ne_bytes());
    }
    message
}

/// A filter's header: its preference and the protocols that it sees.
fn filter(index: u32, hook: u32, preference: u16) -> Vec<u8> {
    header(index, 0, hook, u32::from(preference) << 16 | u32::from(ETH_P_ALL.to_be()))
}

fn text(kind: u16, value: &str, to: &mut Vec<u8>) {
    attribute(kind, format!("{value}\0").as_bytes(), to);
}

/// A filter of the kind u32 for every packet (which came from the interface `from`), with a redirection or none.
fn u32_filter(mut message: Vec<u8>, from: Option<&str>, redirect_to: Option<u32>) -> Vec<u8> {
    text(TCA_KIND, "u32", &mut message);
    nested(TCA_OPTIONS, &mut message, |to| {
        // `struct tc_u32_sel` with one key that fits everything: no bit of the first four bytes has to be set.
        let mut selector = [0; 16 + 16];
        (selector[0], selector[2]) = (TC_U32_TERMINAL, 1);
        attribute(TCA_U32_SEL, &selector, to);
        if let Some(from) = from {
            text(TCA_U32_INDEV, from, to);
        }
        if let Some(index) = redirect_to {
            nested(TCA_U32_ACT, to, |to| nested(1, to, |to| redirection(index, to)));
        }
    });
    message
}

/// The action mirred: out of another interface.
fn redirection(index: u32, to: &mut Vec<u8>) {
    text(TCA_ACT_KIND, "mirred", to);
    nested(TCA_ACT_OPTIONS, to, |to| {
        // `struct tc_mirred`: index, capabilities, verdict, two counters; what to do, with which interface.
        let fields = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, index];
        attribute(TCA_MIRRED_PARMS, &fields.map(u32::to_ne_bytes).concat(), to);
    });
}

/// Drops every packet.
fn drop_filter(mut message: Vec<u8>) -> Vec<u8> {
    text(TCA_KIND, "bpf", &mut message);
    nested(TCA_OPTIONS, &mut message, |to| {
        // One `struct sock_filter`: return the verdict (BPF_RET | BPF_K).
        let program = [&6_u16.to_ne_bytes()[..], &[0, 0], &TC_ACT_SHOT.to_ne_bytes()].concat();
        attribute(TCA_BPF_OPS_LEN, &1_u16.to_ne_bytes(), to);
        attribute(TCA_BPF_OPS, &program, to);
        attribute(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes(), to);
    });
    message
}

/// Joins an interface with a tap (names and indices), both ways.
pub(super) fn join(client: &Client, interface: (&str, u32), tap: (&str, u32)) -> Result<(), Refusal> {
    for (name, index) in [interface, tap] {
        // What an earlier attempt has left would hold the packets up, or duplicate them.
        if !add_clsact(client, name, index)? {
            for (hook, preference) in [(INGRESS, PREFERENCE), (EGRESS, PREFERENCE), (EGRESS, PREFERENCE + 1)]
            {
                remove_filter(client, name, filter(index, hook, preference))?;
            }
        }
    }
    let ((name, index), (tap_name, tap_index)) = (interface, tap);
    let mut batch = Batch::default();
    let mut add = |what: String, message: &[u8]| {
        batch.raw(Some(what), RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, message);
    };
    add(
        format!("letting pass what leaves {name} from {tap_name}"),
        &u32_filter(filter(index, EGRESS, PREFERENCE), Some(tap_name), None),
    );
    add(format!("dropping what else leaves {name}"), &drop_filter(filter(index, EGRESS, PREFERENCE + 1)));
    add(
        format!("redirecting {name} to {tap_name}"),
        &u32_filter(filter(index, INGRESS, PREFERENCE), None, Some(tap_index)),
    );
    add(
        format!("redirecting {tap_name} to {name}"),
        &u32_filter(filter(tap_index, INGRESS, PREFERENCE), None, Some(index)),
    );
    client.run(&batch)
}

/// Gives the interface a place for filters; `false` when it had one.
fn add_clsact(client: &Client, name: &str, index: u32) -> Result<bool, Refusal> {
    let mut message = header(index, CLSACT_HANDLE, CLSACT, 0);
    text(TCA_KIND, "clsact", &mut message);
    let mut batch = Batch::default();
    batch.raw(
        Some(format!("adding a clsact queueing discipline to {name}")),
        RTM_NEWQDISC,
        NLM_F_CREATE | NLM_F_EXCL,
        &message,
    );
    match client.run(&batch) {
        Ok(()) => Ok(true),
        Err(refusal) if refusal.is(Errno::EXIST) => Ok(false),
        Err(refusal) => Err(refusal),
    }
}

fn remove_filter(client: &Client, name: &str, message: Vec<u8>) -> Result<(), Refusal> {
    let mut batch = Batch::default();
    batch.raw(Some(format!("removing an earlier filter of {name}")), RTM_DELTFILTER, 0, &message);
    match client.run(&batch) {
        Err(refusal) if !refusal.is(Errno::NOENT) => Err(refusal),
        _ => Ok(()),
    }
}
