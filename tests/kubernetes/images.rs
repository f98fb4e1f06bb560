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

use crate::unit::Unit;

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

pub(crate) const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that `tests/kubernetes/build` makes.
pub(crate) fn program(name: &str) -> PathBuf {
    target_dir().join("kubernetes/programs").join(name)
}

/// Starts a registry with everything a cluster pulls.
pub(crate) fn serve() -> Result<Registry> {
    let contents = ["busybox/busybox", "programs/pause", "kube-proxy/packages"];
    let listed = kubeadms()?.into_iter().chain([AGNHOST, BUSYBOX, PEERS_PAUSE].map(str::to_owned));
    let wanted = listed.map(|name| Wanted::parse(&name)).collect::<Result<Vec<_>>>()?;
    let key = key(&wanted, &contents, &["programs"], include_str!("images.rs"))?;
    kept("images", &key, &wanted, |wanted| image(&wanted.repository))
}

/// Where the images of [`serve`] lie, for further registries.
pub(crate) fn storage() -> PathBuf {
    target_dir().join("kubernetes/images/storage")
}

/// Starts a registry with images in `target/kubernetes/NAME`, which are made when there are none with this very key.
pub(crate) fn kept(
    name: &str,
    key: &str,
    wanted: &[Wanted],
    image: impl Fn(&Wanted) -> Result<Image>,
) -> Result<Registry> {
    let directory = target_dir().join("kubernetes").join(name);
    if !fs::read_to_string(directory.join("key")).is_ok_and(|have| have == key) {
        ensure!(
            !Unit::is_wanted(),
            "the images are not those of these programs, and a lab takes minutes to make them: images::are_made"
        );
        println!("making the images of a cluster");
        let part = tempfile::Builder::new().prefix("images.").tempdir_in(target_dir().join("kubernetes"))?;
        let registry = Registry::start(&part.path().join("storage"), Access::ReadWrite)?;
        for wanted in wanted {
            let Wanted { repository, tag } = wanted;
            let bundle = image(wanted)?.dialect(Dialect::Oci).bundle()?;
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
pub(crate) struct Wanted {
    pub(crate) repository: String,
    pub(crate) tag: String,
}

impl Wanted {
    /// From the whole name.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        let rest = name.strip_prefix(DEFAULT_REPOSITORY).and_then(|rest| rest.strip_prefix('/'));
        let (repository, tag) = rest.and_then(|rest| rest.rsplit_once(':')).context(name.to_owned())?;
        Ok(Self { repository: repository.to_owned(), tag: tag.to_owned() })
    }
}

/// What kubeadm asks for, by its own account.
pub(crate) fn kubeadms() -> Result<Vec<String>> {
    let version = kubernetes_version()?;
    let output = Command::new(program("kubeadm"))
        .args(["config", "images", "list", "--kubernetes-version", &version])
        .output()
        .context("running kubeadm")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

/// The version of kubeadm and of everything that was built with it.
pub(crate) fn kubernetes_version() -> Result<String> {
    let output = Command::new(program("kubeadm")).args(["version", "-o", "short"]).output();
    let output = output.context("running kubeadm (`tests/kubernetes/build` makes it)")?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// An image that kubeadm asks for, or that pods of the tests run.
pub(crate) fn image(repository: &str) -> Result<Image> {
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
            vec![packed(&contents::busybox()?)?, packed(&alone(&program(name), "agnhost")?)?],
            json!({"Env": [PATH], "Entrypoint": ["/agnhost"], "Cmd": ["pause"]}),
        ),
        "coredns" => Image::new(vec![packed(&alone(&program(name), "coredns")?)?], starts("/coredns")),
        "kube-proxy" => Image::new(
            vec![
                packed(&contents::busybox()?)?,
                packed(&contents::kube_proxy_tools()?)?,
                packed(&alone(&program(name), "usr/local/bin/kube-proxy")?)?,
            ],
            starts("/usr/local/bin/kube-proxy"),
        ),
        "etcd" | "kube-apiserver" | "kube-controller-manager" | "kube-scheduler" => {
            let path = format!("usr/local/bin/{name}");
            Image::new(vec![packed(&alone(&program(name), &path)?)?], starts(&format!("/{path}")))
        }
        _ => bail!("kubeadm asks for {repository}, of which nothing is known here"),
    })
}

/// One program as the only file of a layer.
pub(crate) fn alone(program: &Path, path: &str) -> Result<Files> {
    let bytes = fs::read(program).with_context(|| format!("reading {}", program.display()))?;
    // Where programs expect to write.
    Ok(Files::new().directory("tmp", 0o1777).file(path, 0o755, bytes))
}

pub(crate) fn packed(files: &Files) -> Result<Layer> {
    files.pack(Compression::Zstd)
}

/// Names what images are made from: the source text that makes them, what `contents` holds for them, and every program in the
/// directories of `target/kubernetes`, with its size and age.
pub(crate) fn key(
    wanted: &[Wanted],
    contents: &[&str],
    directories: &[&str],
    source: &str,
) -> Result<String> {
    let made = target_dir().join("critest/contents");
    let mut inputs: Vec<PathBuf> = contents.iter().map(|name| made.join(name)).collect();
    for directory in directories {
        let directory = target_dir().join("kubernetes").join(directory);
        let listed = fs::read_dir(&directory).with_context(|| format!("listing {}", directory.display()))?;
        for entry in listed {
            let path = entry?.path();
            if path.is_file() {
                inputs.push(path);
            }
        }
    }
    inputs.sort();
    let described: Vec<Value> = inputs.iter().map(|path| describe(path)).collect::<Result<_>>()?;
    let all = format!("{wanted:?} {described:?} {source}");
    Ok(digest_of(all.as_bytes()))
}

fn describe(path: &Path) -> Result<Value> {
    let metadata = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    // The directory may move.
    let name = path.strip_prefix(target_dir()).unwrap_or(path);
    Ok(json!([name, metadata.len(), metadata.mtime(), metadata.mtime_nsec()]))
}
