//! Images made of real trees, seen by the kernel and by erofs-utils.

#![allow(missing_docs)]

mod debian;
mod guest;
mod hostile;
mod layers;
mod place;
mod random;
mod tree;
