//! Layers as they come from builders, from attackers and from broken disks.

mod damage;
mod hostile;
mod ordinary;
mod removal;
mod scratch;
mod tarball;
