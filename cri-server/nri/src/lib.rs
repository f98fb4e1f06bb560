//! Node Resource Interface: plugins of the node that see every pod and container and may change what is created.
//!
//! ```text
//! daemon ── hooks ──▶ Nri ── in order of index ──▶ Plugin ── ttRPC over the multiplexer ──▶ plugin's process
//!    ▲                 │ collect: conflicts          ▲
//!    └── Runtime ◀─────┴── updates, evictions ───────┘ UpdateContainers
//! ```
//!
//! | file | idea |
//! |---|---|
//! | `set.rs` | all plugins: hooks in their order, who joins and who leaves |
//! | `plugin.rs` | one plugin: registration and calls |
//! | `launch.rs` | plugins that podvisor starts |
//! | `connection.rs`, `frame.rs` | ttRPC in both directions on one socket |
//! | `collect.rs`, `owners.rs` | what several plugins ask for, and conflicts between them; pure |
//! | `adjust.rs` | what they ask for, applied to an OCI spec; pure |
//! | `describe.rs` | an OCI spec as plugins see it; pure |
//! | `runtime.rs` | what the daemon provides |
//!
//! Invariants:
//! - Hooks run one after the other, each at all plugins in the order of their indexes, so that plugins see one history.
//! - A plugin that says no makes the operation fail. A plugin that is silent, gone or garbled is dropped, and the operation goes on
//!   without it; only what a validator could not look at fails.
//! - A plugin that joins hears of everything once: either it is in its synchronisation, or its hook comes later.
//! - Nothing that a plugin sends makes podvisor panic or hold more than a bounded amount of memory.
//!
//! Decisions:
//! - *ttRPC is written here*, some 300 lines. Crate `ttrpc` takes over a whole socket, while NRI's are streams of a multiplexer with a
//!   client on one and a server on the other; and its messages are those of crate `protobuf`, a second implementation beside prost.
//! - *An adjustment is applied to the spec's JSON form*, which is then read as a check of everything a plugin said. That
//!   needs no setter for each of a hundred fields.
//! - *Of eviction* the Go implementation has only the messages; here it stops the container.
//! - *WebAssembly plugins are not run*; a file with one is refused with that reason.

mod adjust;
mod collect;
mod connection;
mod describe;
mod event;
mod frame;
mod launch;
mod owners;
mod plugin;
mod runtime;
mod set;

pub use adjust::{AdjustError, Host, adjust, adjust_resources};
pub use collect::{CollectError, overlay};
pub use connection::CallError;
pub use describe::{describe, describe_resources};
pub use launch::LaunchError;
pub use owners::Conflict;
pub use plugin::RegisterError;
pub use podvisor_proto::nri as api;
pub use runtime::{Boxed, Inventory, Runtime};
pub use set::{Adjusted, Nri, Options, Refused, Updated};
