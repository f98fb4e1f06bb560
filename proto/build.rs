//! Compiles the protocol files with protox, so that no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=cri");
    println!("cargo::rerun-if-changed=monitor");

    tonic_prost_build::configure().compile_fds(protox::compile(["cri/api.proto"], ["."])?)?;
    prost_build::Config::new().compile_fds(protox::compile(["monitor/monitor.proto"], ["."])?)?;
    Ok(())
}
