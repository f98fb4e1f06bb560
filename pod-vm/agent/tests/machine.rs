//! The agent as the first process of virtual machines, with both of Debian's kernels.

mod guest;

use guest::{Machine, Suite, shell};
use podvisor_proto::agent::request::Verb;
use podvisor_proto::agent::{Shutdown, Stats, reply};
use podvisor_proto::hypervisor::EndReason;

/// Each test with each kernel.
macro_rules! with_both_kernels {
    ($($test:ident)*) => {
        mod kernel_6_1 {
            $(#[test] fn $test() { super::$test(super::Suite::Bookworm, "6.1."); })*
        }
        mod kernel_6_12 {
            $(#[test] fn $test() { super::$test(super::Suite::Backports, "6.12."); })*
        }
    };
}

with_both_kernels! {
    a_pod_from_its_start_to_its_end
}

fn a_pod_from_its_start_to_its_end(suite: Suite, version: &str) {
    let mut machine = Machine::new(suite);
    println!("answered after {:?}, listening after {} ms", machine.took, machine.hello.ready_ns / 1_000_000);
    assert!(machine.hello.kernel_release.starts_with(version), "{}", machine.hello.kernel_release);
    let (output, exit) = machine.run_on_root("c1", &shell("uname -r; echo $$; hostname; exit 3"));
    assert_eq!((output.lines().next(), exit.code), (Some(machine.hello.kernel_release.as_str()), 3));
    let reply::Result::Stats(stats) = machine.ask(Verb::Stats(Stats::default())).unwrap() else { panic!() };
    let used = stats.guest.unwrap();
    println!(
        "agent {} KiB, available {} of {} KiB",
        used.agent_rss >> 10,
        used.memory_available >> 10,
        used.memory_total >> 10
    );
    assert!(used.agent_rss < 4 << 20, "the agent takes {} KiB", used.agent_rss >> 10);
    machine.done(Verb::Shutdown(Shutdown {}));
    assert_eq!(machine.ended().reason(), EndReason::PowerOff);
}
