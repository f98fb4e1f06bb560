//! The images that Kubernetes' own tests run in pods, by the list that they print: stand-ins from Debian's programs and Kubernetes' own
//! modules, with everything in them that the tests call.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use podvisor_critest::contents;
use podvisor_critest::image::Image;
use podvisor_critest::layer::Files;
use podvisor_critest::registry::Registry;
use podvisor_critest::target_dir;
use serde_json::json;

use crate::images::{self, PATH, Wanted, alone, kubeadms, packed, program};

/// Where the tests' own images are, below kubeadm's repository.
const TESTS: &str = "e2e-test-images/";

/// Accounts of agnhost's own, which tests of supplementary groups look for.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n\
     user-defined-in-image:x:1000:1000::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\nnobody:x:65534:\nuser-defined-in-image:x:1000:\n\
     group-defined-in-image:x:50000:user-defined-in-image\n";

/// A program, or another file, that `tests/kubernetes/build conformance` makes.
pub(crate) fn conformance_program(name: &str) -> PathBuf {
    target_dir().join("kubernetes/conformance").join(name)
}

fn read(name: &str) -> Result<Vec<u8>> {
    let file = conformance_program(name);
    fs::read(&file).with_context(|| format!("reading {}", file.display()))
}

/// Starts a registry with everything that a cluster and the tests pull.
pub(crate) fn serve() -> Result<Registry> {
    let listed = Command::new(conformance_program("e2e.test")).arg("--list-images").output();
    let listed = listed.context("running e2e.test (`tests/kubernetes/build conformance` makes it)")?;
    ensure!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let listed = String::from_utf8(listed.stdout)?;
    let tests = listed.split_whitespace().filter(|name| is_made(name)).map(str::to_owned);
    let names: BTreeSet<String> = kubeadms()?.into_iter().chain(tests).collect();
    let wanted = names.iter().map(|name| Wanted::parse(name)).collect::<Result<Vec<_>>>()?;
    let contents = [
        "busybox/busybox",
        "programs/pause",
        "programs/nonewprivs",
        "kube-proxy/packages",
        "webservers/packages",
        "network-tools/packages",
    ];
    let source = concat!(include_str!("images.rs"), include_str!("conformance_images.rs"));
    let key = images::key(&wanted, &contents, &["programs", "conformance"], source)?;
    images::kept("conformance-images", &key, &wanted, |wanted| match wanted.repository.strip_prefix(TESTS) {
        Some(name) => tests_own(name, &wanted.tag),
        None => images::image(&wanted.repository),
    })
}

/// Whether there is a stand-in. The rest of the list is for tests of storage drivers, performance and other systems.
fn is_made(image: &str) -> bool {
    let made = [
        "agnhost",
        "busybox",
        "glibc-dns-testing",
        "kitten",
        "nautilus",
        "nginx",
        "nonewprivs",
        "nonroot",
        "sample-apiserver",
    ];
    Wanted::parse(image)
        .is_ok_and(|image| image.repository.strip_prefix(TESTS).is_some_and(|name| made.contains(&name)))
}

/// One of the tests' own images, as its Dockerfile in `test/images` of Kubernetes describes it.
fn tests_own(name: &str, tag: &str) -> Result<Image> {
    let base = packed(&contents::busybox()?)?;
    let starts = |command: &[&str]| json!({"Env": [PATH], "Cmd": command});
    let image = match name {
        "agnhost" => agnhost()?,
        "kitten" | "nautilus" => {
            let picture = format!("{name}.jpg");
            let shown = json!({"image": picture}).to_string();
            let files = Files::new().file("data.json", 0o644, shown).file(&picture, 0o644, read(&picture)?);
            agnhost()?.layer(packed(&files)?).set("Cmd", json!(["test-webserver"]))
        }
        "busybox" => Image::new(vec![base], starts(&["sh"])),
        "nonroot" => Image::new(vec![base], starts(&["sh"])).set("User", "1234"),
        "nonewprivs" => {
            let program = Files::new().file("usr/local/bin/nnp", 0o6755, contents::program(name)?);
            Image::new(vec![base, packed(&program)?], starts(&["nnp"]))
        }
        "nginx" => {
            Image::new(vec![base, packed(&contents::nginx(80)?)?], starts(&["nginx", "-g", "daemon off;"]))
                .set("ExposedPorts", json!({"80/tcp": {}}))
                .set("StopSignal", "SIGQUIT")
        }
        "glibc-dns-testing" => Image::new(
            vec![
                base,
                packed(&contents::network_tools()?)?,
                packed(&alone(&program("coredns"), "coredns")?)?,
            ],
            starts(&["bash"]),
        ),
        "sample-apiserver" => {
            let server = alone(&conformance_program(name), name)?;
            Image::new(
                vec![base, packed(&server)?],
                json!({"Env": [PATH], "Entrypoint": [format!("/{name}")]}),
            )
        }
        _ => bail!("nothing is known here of {name}"),
    };
    // Versions of an image are different images.
    Ok(image.layer(packed(&Files::new().file("etc/image", 0o644, format!("{name}:{tag}\n")))?))
}

/// agnhost with what the original has from Alpine beside it; one test reads whose files they are.
fn agnhost() -> Result<Image> {
    let around = Files::new()
        .file(
            "etc/os-release",
            0o644,
            "NAME=\"Alpine Linux\"\nID=alpine\nPRETTY_NAME=\"stand-in for Alpine Linux\"\n",
        )
        .file("etc/passwd", 0o644, PASSWD)
        .file("etc/group", 0o644, GROUP)
        .directory("uploads", 0o755)
        .file("localhost.crt", 0o644, read("localhost.crt")?)
        .file("localhost.key", 0o644, read("localhost.key")?)
        .symlink("agnhost-2", "agnhost");
    let layers = vec![
        packed(&contents::busybox()?)?,
        packed(&contents::network_tools()?)?,
        packed(&alone(&program("coredns"), "coredns")?)?,
        packed(&alone(&program("agnhost"), "agnhost")?)?,
        packed(&around)?,
    ];
    Ok(Image::new(layers, json!({"Env": [PATH], "Entrypoint": ["/agnhost"], "Cmd": ["pause"]})))
}
