use std::os::unix::fs::symlink;

use super::*;

/// A machine with SELinux, as files.
struct Machine {
    directory: tempfile::TempDir,
    places: Places,
}

const CONTEXTS: &str =
    "process = \"system_u:system_r:container_t:s0\"\nfile = \"system_u:object_r:container_file_t:s0\"\n";

impl Machine {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let places = Places {
            selinuxfs: path("selinuxfs"),
            etc: path("etc"),
            contexts: path("share/contexts"),
            own: path("current"),
        };
        let machine = Self { directory, places };
        machine.write("selinuxfs/enforce", "1");
        machine.write("selinuxfs/context", "");
        machine.write("etc/config", "# SELINUXTYPE=old\nSELINUX=enforcing\nSELINUXTYPE=strict\n");
        machine.write("etc/strict/contexts/lxc_contexts", CONTEXTS);
        machine.write("current", "system_u:system_r:container_runtime_t:s0\0");
        machine
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(self.directory.path().join(name)).unwrap();
    }

    fn look(&self) -> SeLinux {
        SeLinux::look(&self.places)
    }
}

fn options(kind: &str, level: &str) -> cri::SeLinuxOption {
    cri::SeLinuxOption { r#type: kind.into(), level: level.into(), ..Default::default() }
}

fn pod(options: Option<cri::SeLinuxOption>) -> cri::PodSandboxConfig {
    let security = cri::LinuxSandboxSecurityContext { selinux_options: options, ..Default::default() };
    let linux = cri::LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() };
    cri::PodSandboxConfig { linux: Some(linux), ..Default::default() }
}

fn container(options: Option<cri::SeLinuxOption>) -> cri::ContainerConfig {
    let security = cri::LinuxContainerSecurityContext { selinux_options: options, ..Default::default() };
    let linux = cri::LinuxContainerConfig { security_context: Some(security), ..Default::default() };
    cri::ContainerConfig { linux: Some(linux), ..Default::default() }
}

#[test]
fn what_a_machine_has() {
    let machine = Machine::new();
    let SeLinux::On(policy) = machine.look() else { panic!("{:?}", machine.look()) };
    assert_eq!((policy.name.as_str(), policy.enforcing), ("strict", true));
    assert!(policy.to_string().contains("system_u:system_r:container_t:s0"));
    machine.write("selinuxfs/enforce", "0");
    assert!(matches!(machine.look(), SeLinux::On(policy) if !policy.enforcing));
    // What container-selinux brings comes before the policy's own.
    machine.write("share/contexts", "process = \"u:r:other_t:s0\"\nfile = \"u:r:f:s0\"");
    assert!(matches!(machine.look(), SeLinux::On(policy) if policy.to_string().contains("other_t")));
    machine.write("share/contexts", "process = \"u:r:other_t:s0\"");
    assert!(
        matches!(machine.look(), SeLinux::WithoutContexts(why) if why.contains("which context a container's file has"))
    );

    let machine = Machine::new();
    machine.write("etc/config", "");
    assert!(machine.look().complaint().unwrap().contains("policy targeted has no contexts"));
    for (broken, text) in [("current", Some("kernel\0")), ("current", None), ("selinuxfs/enforce", None)] {
        let machine = Machine::new();
        match text {
            Some(text) => machine.write(broken, text),
            None => machine.remove(broken),
        }
        assert_eq!(machine.look(), SeLinux::Off, "{broken}");
    }
}

#[test]
fn what_cannot_be_enforced_is_refused_only_where_it_could_be_and_was_asked_for() {
    let machine = Machine::new();
    let on = machine.look();
    machine.remove("etc/strict/contexts/lxc_contexts");
    let without = machine.look();
    for asked in [None, Some(options("", ""))] {
        assert_eq!(SeLinux::Off.of_pod(&pod(asked.clone())).unwrap(), None);
        assert_eq!(without.of_pod(&pod(asked.clone())).unwrap(), None);
        let labels = on.of_pod(&pod(asked.clone())).unwrap();
        assert_eq!(labels.unwrap().process.to_string(), "system_u:system_r:container_t:s0");
        let confinement = without.of_container(None, &pod(None), &container(asked)).unwrap();
        assert_eq!(confinement, Confinement::default());
    }
    let asked = Some(options("web_t", "s0:c1,c2"));
    assert_eq!(SeLinux::Off.of_pod(&pod(asked.clone())).unwrap(), None);
    let confinement = SeLinux::Off.of_container(None, &pod(None), &container(asked.clone())).unwrap();
    assert_eq!(confinement, Confinement::default());
    let refused = [
        without.of_pod(&pod(asked.clone())).unwrap_err(),
        without.of_container(None, &pod(None), &container(asked.clone())).unwrap_err(),
    ];
    for error in refused {
        assert!(error.to_string().starts_with(FIELD), "{error}");
        assert!(error.to_string().contains("install container-selinux"), "{error}");
    }
    let labels = on.of_pod(&pod(asked.clone())).unwrap().unwrap();
    assert_eq!(labels.process.to_string(), "system_u:system_r:web_t:s0:c1,c2");
    let confinement =
        on.of_container(Some(&labels), &pod(asked), &container(Some(options("", "s0")))).unwrap();
    assert_eq!(confinement.process.unwrap().to_string(), "system_u:system_r:web_t:s0");
}

#[test]
fn a_context_that_the_kernel_does_not_know_is_refused() {
    let machine = Machine::new();
    let on = machine.look();
    let labels = on.of_pod(&pod(Some(options("web_t", "")))).unwrap();
    let asked = std::fs::read(machine.places.selinuxfs.join("context")).unwrap();
    assert_eq!(
        asked, b"system_u:object_r:container_file_t:s0\0",
        "the last one of those that were asked for"
    );
    // Takes no byte.
    machine.remove("selinuxfs/context");
    symlink("/dev/full", machine.places.selinuxfs.join("context")).unwrap();
    let refused = [
        on.of_pod(&pod(Some(options("nonsense_t", "")))).unwrap_err(),
        on.of_container(labels.as_ref(), &pod(None), &container(Some(options("nonsense_t", ""))))
            .unwrap_err(),
    ];
    for error in refused {
        assert!(error.to_string().contains("system_u:system_r:nonsense_t:s0"), "{error}");
    }
    // Nothing was asked for: nothing is asked of the kernel.
    assert!(on.of_pod(&pod(None)).is_ok());
}

fn label_of(path: &Path) -> Option<String> {
    let mut value = [0; 256];
    let length = rustix::fs::lgetxattr(path, "security.selinux", &mut value).ok()?;
    Some(String::from_utf8(value[..length].to_vec()).unwrap())
}

#[test]
fn everything_in_a_volume_is_labelled_and_nothing_else() {
    const LABEL: &str = "system_u:object_r:container_file_t:s0:c1,c2";
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    std::fs::create_dir_all(path("volume/a/b/c")).unwrap();
    for name in ["volume/file", "volume/a/b/c/file", "outside", "single"] {
        std::fs::write(path(name), "text").unwrap();
    }
    symlink(path("outside"), path("volume/a/link")).unwrap();
    symlink("/nowhere", path("volume/dangling")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path("volume/a/fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let labelled = ["volume", "volume/file", "volume/a", "volume/a/b", "volume/a/b/c", "volume/a/b/c/file"];
    let links = ["volume/a/link", "volume/dangling", "volume/a/fifo"];
    // Twice: the second time there is nothing to do.
    for _ in 0..2 {
        relabel(&path("volume"), LABEL).unwrap();
        for name in labelled.iter().chain(&links) {
            assert_eq!(label_of(&path(name)).as_deref(), Some(format!("{LABEL}\0").as_str()), "{name}");
        }
        assert_eq!(label_of(&path("outside")), None);
    }
    relabel(&path("volume/a"), "u:r:other:s0").unwrap();
    assert_eq!(label_of(&path("volume/a/b/c/file")).as_deref(), Some("u:r:other:s0\0"));
    assert_eq!(label_of(&path("volume/file")).as_deref(), Some(format!("{LABEL}\0").as_str()));
    label_file(&path("single"), LABEL).unwrap();
    assert_eq!(label_of(&path("single")).as_deref(), Some(format!("{LABEL}\0").as_str()));

    let gone = relabel(&path("nothing"), LABEL).unwrap_err();
    assert!(gone.to_string().contains("nothing"), "{gone}");
    for machine in ["/", "/etc", "/var/lib"] {
        assert!(matches!(relabel(Path::new(machine), LABEL), Err(LabelError::OfTheMachine(_))), "{machine}");
    }
    // A file system without labels of its own is left alone.
    relabel(Path::new("/proc/self/status"), LABEL).unwrap();
}
