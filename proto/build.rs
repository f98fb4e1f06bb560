//! Compiles the protocol files with protox, so that no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=cri");
    println!("cargo::rerun-if-changed=agent");
    println!("cargo::rerun-if-changed=hypervisor");
    println!("cargo::rerun-if-changed=monitor");
    println!("cargo::rerun-if-changed=nri");

    tonic_prost_build::configure()
        // Its Debug is in lib.rs: the derived one would print passwords.
        .skip_debug([".runtime.v1.AuthConfig"])
        .compile_fds(protox::compile(["cri/service.proto"], ["."])?)?;
    prost_build::Config::new().compile_fds(protox::compile(["agent/agent.proto"], ["."])?)?;
    prost_build::Config::new().compile_fds(protox::compile(["hypervisor/hypervisor.proto"], ["."])?)?;
    prost_build::Config::new()
        .extern_path(".podvisor.agent.v1", "crate::agent")
        .extern_path(".podvisor.hypervisor.v1", "crate::hypervisor")
        .compile_fds(protox::compile(["monitor/monitor.proto"], ["."])?)?;
    prost_build::Config::new()
        // In the order of their names: what is sent and what is logged is the same each time.
        .btree_map(["."])
        .compile_fds(protox::compile(["nri/nri.proto", "nri/ttrpc.proto"], ["."])?)?;
    Ok(())
}
