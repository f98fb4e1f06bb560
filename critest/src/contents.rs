//! Layers out of what `critest/tools/contents` made: busybox, web servers, small static programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::layer::Files;
use crate::target_dir;

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
sys:x:3:3:sys:/dev:/bin/false
sync:x:4:100:sync:/bin:/bin/sync
mail:x:8:8:mail:/var/spool/mail:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
operator:x:37:37:Operator:/var:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
";

const GROUP: &str = "\
root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
tty:x:5:
mail:x:8:
www-data:x:33:
operator:x:37:
users:x:100:
nobody:x:65534:
";

/// User and group of the web servers' workers.
const WEB_USER: u32 = 101;

fn contents_dir() -> PathBuf {
    target_dir().join("critest/contents")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {} (`make images` makes it)", path.display()))
}

/// The whole of a small Linux root around one busybox with every applet as a hard link.
fn root_around(busybox: Vec<u8>, applets: &str) -> Files {
    let mut files = Files::new()
        .directory("dev", 0o755)
        .directory("home", 0o755)
        .directory("proc", 0o755)
        .directory("root", 0o700)
        .directory("run", 0o755)
        .directory("sys", 0o755)
        .directory("tmp", 0o1777)
        .directory("usr/sbin", 0o755)
        .directory("var/run", 0o755)
        .directory("var/tmp", 0o1777)
        .directory("var/spool/mail", 0o755)
        .directory("var/www", 0o755)
        .file("etc/passwd", 0o644, PASSWD)
        .file("etc/group", 0o644, GROUP)
        .file("bin/busybox", 0o755, busybox);
    for applet in applets.lines().filter(|name| *name != "busybox") {
        files = files.hard_link(&format!("bin/{applet}"), "bin/busybox");
    }
    files
}

/// busybox built from Debian's source package: what the conformance suite's images stand on.
pub fn busybox() -> Result<Files> {
    let directory = contents_dir().join("busybox");
    let applets =
        String::from_utf8(read(&directory.join("applets"))?).context("the list of applets is no text")?;
    Ok(root_around(read(&directory.join("busybox"))?, &applets))
}

/// The program of Debian's busybox-static, for tests that need nothing but a static shell; `make images` fetches it.
pub fn busybox_program() -> PathBuf {
    contents_dir().join("busybox-static/files/bin/busybox")
}

/// Debian's busybox-static as it is: quicker to get, with fewer applets.
pub fn busybox_static() -> Result<Files> {
    let program = busybox_program();
    let binary = read(&program)?;
    let listed = Command::new(&program)
        .arg("--list")
        .output()
        .with_context(|| format!("running {}", program.display()))?;
    Ok(root_around(binary, &String::from_utf8_lossy(&listed.stdout)))
}

/// A static program of `critest/programs`.
pub fn program(name: &str) -> Result<Vec<u8>> {
    read(&contents_dir().join("programs").join(name))
}

/// nginx on `port`, to go over [`busybox`].
pub fn nginx(port: u16) -> Result<Files> {
    let configuration = format!(
        "user nginx;\nworker_processes 1;\npid /var/run/nginx.pid;\nerror_log /var/log/nginx/error.log notice;\n\
         events {{ worker_connections 64; }}\n\
         http {{\n    default_type text/html;\n    access_log /var/log/nginx/access.log;\n    \
         server {{ listen {port}; root /usr/share/nginx/html; }}\n}}\n"
    );
    let page = "<!DOCTYPE html>\n<title>Welcome to nginx!</title>\n<h1>Welcome to nginx!</h1>\n";
    let files = Files::new()
        .file("etc/nginx/nginx.conf", 0o644, configuration)
        .file("usr/share/nginx/html/index.html", 0o644, page)
        .directory("var/lib/nginx", 0o755)
        .symlink("var/log/nginx/access.log", "/dev/stdout")
        .symlink("var/log/nginx/error.log", "/dev/stderr");
    let files = web_user(files, "nginx");
    with_program(files, "webservers", "usr/sbin/nginx", "usr/sbin/nginx", &[])
}

/// Apache under the name httpd on port 80, to go over [`busybox`].
pub fn httpd() -> Result<Files> {
    let modules = ["mpm_event", "authz_core", "dir", "mime"];
    let mut configuration = String::from(
        "ServerRoot /usr/local/apache2\nServerName localhost\nListen 80\nPidFile /var/run/httpd.pid\n\
         User httpd\nGroup httpd\n",
    );
    for module in modules {
        writeln!(configuration, "LoadModule {module}_module modules/mod_{module}.so")?;
    }
    configuration.push_str(
        "TypesConfig conf/mime.types\nDirectoryIndex index.html\nDocumentRoot htdocs\n\
         <Directory htdocs>\n    Require all granted\n</Directory>\n\
         ErrorLog /proc/self/fd/2\nLogLevel notice\n",
    );
    let mut files = Files::new()
        .file("usr/local/apache2/conf/httpd.conf", 0o644, configuration)
        .file("usr/local/apache2/conf/mime.types", 0o644, "text/html html\n")
        .file("usr/local/apache2/htdocs/index.html", 0o644, "<h1>It works!</h1>\n")
        .file(
            "bin/httpd-foreground",
            0o755,
            "#!/bin/sh\nrm -f /var/run/httpd.pid\nexec httpd -DFOREGROUND -f /usr/local/apache2/conf/httpd.conf\n",
        );
    let installed = contents_dir().join("webservers/files/usr/lib/apache2/modules");
    for module in modules {
        let name = format!("mod_{module}.so");
        files =
            files.file(&format!("usr/local/apache2/modules/{name}"), 0o644, read(&installed.join(&name))?);
    }
    let files = web_user(files, "httpd");
    // glibc loads libgcc_s by name when a thread is cancelled.
    with_program(files, "webservers", "usr/sbin/apache2", "usr/sbin/httpd", &["libgcc_s.so.1"])
}

/// What kube-proxy calls, to go over [`busybox`]: nft, iptables on top of nftables, conntrack.
pub fn kube_proxy_tools() -> Result<Files> {
    let mut files = with_program(Files::new(), "kube-proxy", "usr/sbin/nft", "usr/sbin/nft", &[])?;
    files = with_program(files, "kube-proxy", "usr/sbin/conntrack", "usr/sbin/conntrack", &[])?;
    files =
        with_program(files, "kube-proxy", "usr/sbin/xtables-nft-multi", "usr/sbin/xtables-nft-multi", &[])?;
    for name in ["iptables", "iptables-save", "iptables-restore"] {
        files = files.symlink(&format!("usr/sbin/{name}"), "xtables-nft-multi");
        files = files.symlink(&format!("usr/sbin/{}", name.replace("ip", "ip6")), "xtables-nft-multi");
    }
    // Without it nft says 6 for tcp, and kube-proxy takes elements of before for other ones: it deletes them.
    let protocols = contents_dir().join("kube-proxy/files/etc/protocols");
    files = files.file("etc/protocols", 0o644, read(&protocols)?);
    let extensions = contents_dir().join("kube-proxy/files/usr/lib/x86_64-linux-gnu/xtables");
    let listed = fs::read_dir(&extensions).with_context(|| format!("listing {}", extensions.display()))?;
    for extension in listed {
        let extension = extension?;
        let name = extension.file_name().display().to_string();
        // Some are links to others; a copy serves as well.
        files =
            files.file(&format!("usr/lib/x86_64-linux-gnu/xtables/{name}"), 0o644, read(&extension.path())?);
    }
    Ok(files)
}

/// What Kubernetes' own tests call in pods, to go over [`busybox`]: dig, nslookup, host, getent, curl, OpenBSD's nc, bash, ip, ss, socat.
/// They stand where a shell finds them before busybox's.
pub fn network_tools() -> Result<Files> {
    let mut files = Files::new().file("etc/nsswitch.conf", 0o644, "hosts: files dns\n");
    for (source, name) in [
        ("usr/bin/dig", "dig"),
        ("usr/bin/nslookup", "nslookup"),
        ("usr/bin/host", "host"),
        ("usr/bin/getent", "getent"),
        ("usr/bin/curl", "curl"),
        ("usr/bin/socat", "socat"),
        ("bin/nc.openbsd", "nc"),
        ("bin/bash", "bash"),
        ("bin/ip", "ip"),
        ("bin/ss", "ss"),
    ] {
        // glibc loads libgcc_s by name when a thread is cancelled.
        files = with_program(files, "network-tools", source, &format!("usr/bin/{name}"), &["libgcc_s.so.1"])?;
    }
    Ok(files.symlink("bin/bash", "/usr/bin/bash"))
}

fn web_user(files: Files, name: &str) -> Files {
    files
        .file(
            "etc/passwd",
            0o644,
            format!("{PASSWD}{name}:x:{WEB_USER}:{WEB_USER}:{name}:/nonexistent:/bin/false\n"),
        )
        .file("etc/group", 0o644, format!("{GROUP}{name}:x:{WEB_USER}:\n"))
}

/// A program out of the packages that are unpacked in `packages`, installed as `target`, with the libraries that its loader asks for.
fn with_program(files: Files, packages: &str, source: &str, target: &str, by_name: &[&str]) -> Result<Files> {
    let root = contents_dir().join(packages).join("files");
    let folders = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|folder| root.join(folder));
    let loader = folders[0].join("ld-linux-x86-64.so.2");
    let search = folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(":");
    let program = root.join(source);
    let output = Command::new(&loader)
        .args(["--library-path", &search, "--list"])
        .arg(&program)
        .output()
        .with_context(|| format!("running {} (`make images` makes it)", loader.display()))?;
    if !output.status.success() {
        bail!(
            "{} lacks libraries: {}",
            program.display(),
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    let mut libraries: BTreeMap<String, PathBuf> = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Some((name, rest)) = line.trim().split_once(" => ") else { continue };
        let path = rest.split(" (").next().unwrap_or(rest);
        if !name.starts_with('/') {
            libraries.insert(name.to_owned(), path.into());
        }
    }
    for name in by_name {
        let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.exists());
        libraries.insert((*name).to_owned(), found.with_context(|| format!("no package holds {name}"))?);
    }
    let mut files =
        files.file(target, 0o755, read(&program)?).file("lib64/ld-linux-x86-64.so.2", 0o755, read(&loader)?);
    for (name, path) in libraries {
        files = files.file(&format!("lib/x86_64-linux-gnu/{name}"), 0o755, read(&path)?);
    }
    Ok(files)
}
