//! A container's output on its way to its CRI log: cut into lines, stamped, appended to the file.

pub(crate) mod file;
pub(crate) mod lines;
pub(crate) mod pace;
pub(crate) mod timestamp;
