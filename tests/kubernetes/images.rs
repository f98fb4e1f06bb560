//! The images of a cluster, made from the programs that `tests/kubernetes/build` makes, in a registry on loopback.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use podvisor_critest::contents;
use podvisor_critest::image::{Dialect, Image};
use podvisor_critest::layer::{Compression, Files, Layer, digest_of};
use podvisor_critest::registry::{Access, Registry};
use podvisor_critest::target_dir;
use serde_json::{Value, json};

/// Where kubeadm takes images from when it is told nothing else.
pub(crate) const DEFAULT_REPOSITORY: &str = "registry.k8s.io";

/// Where it takes them from when it is told so; RFC 2606 keeps this name from ever resolving.
pub(crate) const OTHER_REPOSITORY: &str = "mirror.example.invalid/k8s";

/// A registry's name that nothing mirrors.
pub(crate) const UNREACHABLE: &str = "unreachable.example.invalid";

/// The program of many faces that Kubernetes' own tests run in pods, on busybox.
pub(crate) const AGNHOST: &str = "registry.k8s.io/e2e-test-images/agnhost:2.66.1";

/// busybox.
pub(crate) const BUSYBOX: &str = "registry.k8s.io/e2e-test-images/busybox:1.37.0-2";

/// What the peer is set up with.
const PEERS_PAUSE: &str = "registry.k8s.io/pause:3.9";

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that `tests/kubernetes/build` makes.
pub(crate) fn program(name: &str) -> PathBuf {
    target_dir().join("kubernetes/programs").join(name)
}

/// Starts a registry with everything a cluster pulls; the images are made when there are none from these very programs.
pub(crate) fn serve() -> Result<Registry> {
    let directory = target_dir().join("kubernetes/images");
    let wanted = wanted()?;
    let key = key(&wanted)?;
    if !fs::read_to_string(directory.join("key")).is_ok_and(|have| have == key) {
        println!("making the images of a cluster");
        let part = tempfile::Builder::new().prefix("images.").tempdir_in(target_dir().join("kubernetes"))?;
        let registry = Registry::start(&part.path().join("storage"), Access::ReadWrite)?;
        for Wanted { repository, tag } in &wanted {
            let bundle = image(repository)?.dialect(Dialect::Oci).bundle()?;
            registry.push(repository, &[tag], &bundle)?;
            // A repository of one's own has them all side by side.
            let name = repository.rsplit('/').next().unwrap_or(repository);
            registry.push(&format!("k8s/{name}"), &[tag], &bundle)?;
        }
        drop(registry);
        fs::write(part.path().join("key"), key)?;
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        fs::rename(part.keep(), &directory).context("keeping the images")?;
    }
    Registry::start(&directory.join("storage"), Access::ReadOnly)
}

/// An image by its repository, without the registry, and its tag.
#[derive(Debug)]
struct Wanted {
    repository: String,
    tag: String,
}

/// What kubeadm asks for, by its own account, and what pods of the tests run.
fn wanted() -> Result<Vec<Wanted>> {
    let version = kubernetes_version()?;
    let output = Command::new(program("kubeadm"))
        .args(["config", "images", "list", "--kubernetes-version", &version])
        .output()
        .context("running kubeadm")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed = String::from_utf8(output.stdout)?;
    listed
        .lines()
        .chain([AGNHOST, BUSYBOX, PEERS_PAUSE])
        .map(|name| {
            let rest = name.strip_prefix(DEFAULT_REPOSITORY).and_then(|rest| rest.strip_prefix('/'));
            let (repository, tag) = rest.and_then(|rest| rest.rsplit_once(':')).context(name.to_owned())?;
            Ok(Wanted { repository: repository.to_owned(), tag: tag.to_owned() })
        })
        .collect()
}

/// The version of kubeadm and of everything that was built with it.
pub(crate) fn kubernetes_version() -> Result<String> {
    let output = Command::new(program("kubeadm")).args(["version", "-o", "short"]).output();
    let output = output.context("running kubeadm (`tests/kubernetes/build` makes it)")?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn image(repository: &str) -> Result<Image> {
    let name = repository.rsplit('/').next().unwrap_or(repository);
    let starts = |program: &str| json!({"Env": [PATH], "Entrypoint": [program]});
    Ok(match name {
        "pause" => {
            let pause = Files::new().file("pause", 0o755, contents::program("pause")?);
            Image::new(
                vec![packed(&pause)?],
                json!({"Env": [PATH], "Entrypoint": ["/pause"], "User": "65535:65535"}),
            )
        }
        "busybox" => Image::new(vec![packed(&contents::busybox()?)?], json!({"Env": [PATH], "Cmd": ["sh"]})),
        "agnhost" => Image::new(
            vec![packed(&contents::busybox()?)?, packed(&alone("agnhost", "agnhost")?)?],
            json!({"Env": [PATH], "Entrypoint": ["/agnhost"], "Cmd": ["pause"]}),
        ),
        "coredns" => Image::new(vec![packed(&alone("coredns", "coredns")?)?], starts("/coredns")),
        "kube-proxy" => Image::new(
            vec![
                packed(&contents::busybox()?)?,
                packed(&contents::kube_proxy_tools()?)?,
                packed(&alone("kube-proxy", "usr/local/bin/kube-proxy")?)?,
            ],
            starts("/usr/local/bin/kube-proxy"),
        ),
        "etcd" | "kube-apiserver" | "kube-controller-manager" | "kube-scheduler" => {
            let path = format!("usr/local/bin/{name}");
            Image::new(vec![packed(&alone(name, &path)?)?], starts(&format!("/{path}")))
        }
        _ => bail!("kubeadm asks for {repository}, of which nothing is known here"),
    })
}

/// One program as the only file of a layer.
fn alone(name: &str, path: &str) -> Result<Files> {
    let file = program(name);
    let bytes = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
    // Where programs expect to write.
    Ok(Files::new().directory("tmp", 0o1777).file(path, 0o755, bytes))
}

fn packed(files: &Files) -> Result<Layer> {
    files.pack(Compression::Zstd)
}

/// Names what the images are made from: this file, and every program with its size and age.
fn key(wanted: &[Wanted]) -> Result<String> {
    let contents = target_dir().join("critest/contents");
    let mut inputs: Vec<PathBuf> = ["busybox/busybox", "programs/pause", "kube-proxy/packages"]
        .iter()
        .map(|name| contents.join(name))
        .collect();
    let built = program("");
    let listed = fs::read_dir(&built).with_context(|| format!("listing {}", built.display()))?;
    for entry in listed {
        let path = entry?.path();
        if path.is_file() {
            inputs.push(path);
        }
    }
    inputs.sort();
    let described: Vec<Value> = inputs.iter().map(|path| describe(path)).collect::<Result<_>>()?;
    let all = format!("{wanted:?} {described:?} {}", include_str!("images.rs"));
    Ok(digest_of(all.as_bytes()))
}

fn describe(path: &Path) -> Result<Value> {
    let metadata = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    Ok(json!([path, metadata.len(), metadata.mtime(), metadata.mtime_nsec()]))
}
