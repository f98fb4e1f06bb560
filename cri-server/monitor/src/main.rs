//! One process per pod: stdio, CRI logs, exit records. Outlives the daemon.

fn main() {}
