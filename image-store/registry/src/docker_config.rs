//! Logins from docker's `config.json` (and containers' `auth.json`, the same format), and credential helpers.
//!
//! Files are read again at each pull. In each: a helper for the host, else the `auths` entry with the longest
//! matching path, else the general store. `credential-helpers` of registries.conf says in which order the files
//! (`containers-auth.json`) and further helpers are asked.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::credentials::{Login, LoginSource, canonical_host};
use crate::reference::DOCKER_HUB;

/// The word in `credential-helpers` that means the files.
const FILES: &str = "containers-auth.json";
/// What docker calls its own registry in these files.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
const FILE_MAX: u64 = 1 << 20;
const HELPER_ANSWER_MAX: u64 = 64 << 10;
/// Helpers ask clouds' metadata services; one that takes longer hangs.
const HELPER_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Default, Deserialize)]
#[serde(default)]
struct ConfigFile {
    auths: BTreeMap<String, AuthEntry>,
    #[serde(rename = "credHelpers")]
    cred_helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    creds_store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AuthEntry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    secret: String,
}

/// All that may have a login for `repository` at `host` (canonical), in the order to be asked.
pub(crate) fn sources(
    files: &[PathBuf],
    helpers: &[String],
    host: &str,
    repository: &str,
) -> Vec<LoginSource> {
    let mut found = Vec::new();
    if helpers.is_empty() {
        from_files(files, host, repository, &mut found);
    }
    for helper in helpers {
        if helper == FILES {
            from_files(files, host, repository, &mut found);
        } else {
            found.push(LoginSource::Helper { name: helper.clone(), server: helper_key(host) });
        }
    }
    found
}

fn from_files(files: &[PathBuf], host: &str, repository: &str, found: &mut Vec<LoginSource>) {
    for file in files {
        match read(file) {
            Ok(config) => from_file(&config, file, host, repository, found),
            Err(why) => {
                tracing::warn!(path = %file.display(), reason = %why, "auth file cannot be read");
                found.push(LoginSource::Unreadable(format!("{} cannot be read: {why}", file.display())));
            }
        }
    }
}

fn from_file(config: &ConfigFile, path: &Path, host: &str, repository: &str, found: &mut Vec<LoginSource>) {
    if let Some(name) = longest(&config.cred_helpers, host, repository) {
        found.push(LoginSource::Helper { name: name.clone(), server: helper_key(host) });
        return;
    }
    if let Some(entry) = longest(&config.auths, host, repository) {
        let login = Login::from_parts(
            &entry.registrytoken,
            &entry.identitytoken,
            &entry.username,
            &entry.password,
            &entry.auth,
        );
        match login {
            Ok(Some(login)) => {
                found.push(LoginSource::Known(login));
                return;
            }
            // docker leaves empty entries for what is in the store.
            Ok(None) => {}
            Err(_) => found.push(LoginSource::Unreadable(format!(
                "{} has an auth for {host} that is not base64 of user:password",
                path.display()
            ))),
        }
    }
    if !config.creds_store.is_empty() {
        found.push(LoginSource::Helper { name: config.creds_store.clone(), server: helper_key(host) });
    }
}

/// The entry whose key covers `host/repository` furthest.
fn longest<'a, T>(entries: &'a BTreeMap<String, T>, host: &str, repository: &str) -> Option<&'a T> {
    entries
        .iter()
        .filter_map(|(key, value)| Some((covered(key, host, repository)?, value)))
        .max_by_key(|(length, _)| *length)
        .map(|(_, value)| value)
}

/// How much of `repository` `key` covers, if it is for `host` at all. Keys with a scheme are docker's old form:
/// their path (`/v1/`) says nothing.
fn covered(key: &str, host: &str, repository: &str) -> Option<usize> {
    if canonical_host(key) != host {
        return None;
    }
    if key.contains("://") {
        return Some(0);
    }
    let path = key.split_once('/').map_or("", |(_, path)| path.trim_end_matches('/'));
    if path.is_empty() || path == "v1" || path == "v2" {
        return Some(0);
    }
    let rest = repository.strip_prefix(path)?;
    (rest.is_empty() || rest.starts_with('/')).then_some(path.len())
}

fn helper_key(host: &str) -> String {
    if host == DOCKER_HUB { DOCKER_HUB_KEY.to_owned() } else { host.to_owned() }
}

/// Errors of serde_json repeat values, so only the place is told.
fn read(file: &Path) -> Result<ConfigFile, String> {
    let bytes = match fs::metadata(file) {
        Ok(metadata) if metadata.len() > FILE_MAX => return Err(format!("larger than {FILE_MAX} bytes")),
        Ok(_) => fs::read(file).map_err(|error| error.to_string())?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ConfigFile::default()),
        Err(error) => return Err(error.to_string()),
    };
    serde_json::from_slice(&bytes)
        .map_err(|error| format!("line {} column {}: not what it should be", error.line(), error.column()))
}

/// Runs `docker-credential-<name> get`. `None`: it has nothing for `server`. Errors repeat nothing it printed.
pub(crate) async fn ask_helper(name: &str, server: &str) -> Result<Option<Login>, String> {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
        return Err(format!("credential helper {name:?} has an invalid name"));
    }
    let program = format!("docker-credential-{name}");
    match tokio::time::timeout(HELPER_TIMEOUT, run_helper(&program, server)).await {
        Ok(Ok(login)) => Ok(login),
        Ok(Err(problem)) => Err(format!("{program}: {problem}")),
        Err(_) => Err(format!("{program}: no answer within {} s", HELPER_TIMEOUT.as_secs())),
    }
}

async fn run_helper(program: &str, server: &str) -> Result<Option<Login>, String> {
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot be started: {error}"))?;
    let mut answer = Vec::new();
    if let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) {
        // A helper that does not read its input may be gone already; its answer tells.
        let _ = stdin.write_all(format!("{server}\n").as_bytes()).await;
        drop(stdin);
        let mut limited = stdout.take(HELPER_ANSWER_MAX + 1);
        limited.read_to_end(&mut answer).await.map_err(|error| format!("cannot be read: {error}"))?;
    }
    if answer.len() as u64 > HELPER_ANSWER_MAX {
        return Err(format!("answered more than {HELPER_ANSWER_MAX} bytes"));
    }
    let status = child.wait().await.map_err(|error| format!("cannot be waited for: {error}"))?;
    if !status.success() {
        // The one error that the protocol names (docker-credential-helpers, credentials.errCredentialsNotFound).
        if String::from_utf8_lossy(&answer).contains("credentials not found") {
            return Ok(None);
        }
        return Err(format!("failed with {status}"));
    }
    let answer: HelperAnswer =
        serde_json::from_slice(&answer).map_err(|_| "answered no credentials".to_owned())?;
    Ok(Some(if answer.username == "<token>" {
        Login::IdentityToken(answer.secret)
    } else {
        Login::Basic { user: answer.username, password: answer.secret }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{
        "auths": {
            "https://index.docker.io/v1/": {"auth": "aHViOnB3"},
            "reg.net": {"auth": "aG9zdDpwdw=="},
            "reg.net/team": {"username": "team", "password": "pw"},
            "reg.net/team/app": {"identitytoken": "app"},
            "http://old.net:5000/v2/": {"auth": "b2xkOnB3"},
            "stored.net": {},
            "broken.net": {"auth": "!"}
        },
        "credHelpers": {"ecr.net": "ecr-login"},
        "credsStore": "pass",
        "unknown": 5
    }"#;

    fn first(files: &[PathBuf], host: &str, repository: &str) -> String {
        let shown = |source: &LoginSource| match source {
            LoginSource::Known(Login::Basic { user, .. }) => user.clone(),
            LoginSource::Known(Login::IdentityToken(token)) => format!("token {token}"),
            LoginSource::Known(Login::RegistryToken(_)) => "registry token".into(),
            LoginSource::Helper { name, server } => format!("{name} {server}"),
            LoginSource::Unreadable(why) => format!("unreadable {why}"),
        };
        sources(files, &[], host, repository).first().map(shown).unwrap_or_default()
    }

    #[test]
    fn the_longest_path_wins() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.json");
        fs::write(&file, CONFIG).unwrap();
        let missing = directory.path().join("missing.json");
        let files = [missing, file];
        for (host, repository, expected) in [
            ("docker.io", "library/busybox", "hub"),
            ("reg.net", "other/app", "host"),
            ("reg.net", "team/other", "team"),
            ("reg.net", "team/app", "token app"),
            ("reg.net", "team/app/x", "token app"),
            ("reg.net", "teamwork/app", "host"),
            ("old.net:5000", "x", "old"),
            ("ecr.net", "x", "ecr-login ecr.net"),
            ("stored.net", "x", "pass stored.net"),
            ("else.net", "x", "pass else.net"),
        ] {
            assert_eq!(first(&files, host, repository), expected, "{host}/{repository}");
        }
        assert!(first(&files, "broken.net", "x").contains("not base64"));
    }

    #[test]
    fn files_and_helpers_in_the_order_given() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.json");
        fs::write(&file, "{\"auths\": {\"a.net\": {\"auth\": \"dTpw\"}}}").unwrap();
        let helpers = ["one".to_owned(), FILES.to_owned(), "two".to_owned()];
        let shown = format!("{:?}", sources(std::slice::from_ref(&file), &helpers, "a.net", "x"));
        assert_eq!(shown, "[Helper(one for a.net), Basic(***), Helper(two for a.net)]");

        fs::write(&file, "{\"auths\": {\"a.net\": {\"auth\": \"s3cret\", \"password\": 5}}").unwrap();
        let shown = first(&[file], "a.net", "x");
        assert!(shown.contains("config.json") && shown.contains("line 1"), "{shown}");
        assert!(!shown.contains("s3cret"));
    }

    #[tokio::test]
    async fn helpers_that_cannot_run_are_named() {
        let error = ask_helper("surely-not-installed", "a.net").await.unwrap_err();
        assert!(error.contains("docker-credential-surely-not-installed"), "{error}");
        assert!(ask_helper("../../bin/sh", "a.net").await.unwrap_err().contains("invalid name"));
    }
}
