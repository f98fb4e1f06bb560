//! The Container Device Interface (CNCF, SPEC.md, versions 0.3.0 to 1.1.0): what a vendor's file says about devices, and what it does to a
//! container's spec. Where the files are, and in what form, is the daemon's business.

mod apply;
mod document;
mod name;

pub use apply::{HostNode, apply};
pub use document::{CdiError, ContainerEdits, Device, Document};
pub use name::{is_class, is_qualified};

/// Prefix of container annotations whose values are device names divided by commas: how devices came before the CRI had a field for them.
pub const ANNOTATION_PREFIX: &str = "cdi.k8s.io/";
