//! Credentials and the hosts they are for. Nothing here prints a secret.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use sha2::Digest as _;

use crate::reference::DOCKER_HUB;

/// Credentials from a CRI request (`AuthConfig`). Never logged: `Debug` prints no secret.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// With `password`.
    pub username: String,
    /// With `username`.
    pub password: String,
    /// Base64 of `username:password`.
    pub auth: String,
    /// Where they apply; empty: to the registry asked.
    pub server_address: String,
    /// An OAuth2 refresh token for the registry's token server.
    pub identity_token: String,
    /// Sent as it is, as a bearer token.
    pub registry_token: String,
}

/// Credentials in a request that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("credentials in the request: auth is not base64 of user:password")]
pub struct CredentialsError;

/// One way of logging in.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) enum Login {
    Basic {
        user: String,
        password: String,
    },
    /// An OAuth2 refresh token for the token server.
    IdentityToken(String),
    /// A bearer token for the registry itself.
    RegistryToken(String),
}

/// Where a login comes from; asked only when a registry demands one.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) enum LoginSource {
    Known(Login),
    /// `docker-credential-<name>`, asked for `server`.
    Helper {
        name: String,
        server: String,
    },
    /// An auth file that could not be read, and why: told when access is denied.
    Unreadable(String),
}

/// What says which logins are one's own: cached tokens are kept apart by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Fingerprint([u8; 32]);

impl Credentials {
    /// The login for `host`, when `asked` is the registry that was asked for (both canonical).
    pub(crate) fn login_for(&self, asked: &str, host: &str) -> Result<Option<Login>, CredentialsError> {
        let meant = if self.server_address.is_empty() {
            asked.to_owned()
        } else {
            canonical_host(&self.server_address)
        };
        if meant != host {
            return Ok(None);
        }
        Login::from_parts(
            &self.registry_token,
            &self.identity_token,
            &self.username,
            &self.password,
            &self.auth,
        )
    }
}

impl Login {
    /// Picks the most specific of the forms that docker's configuration and the CRI know; nothing set is no login.
    /// Tokens come first: beside an identity token the user name is a mere placeholder.
    pub(crate) fn from_parts(
        registry_token: &str,
        identity_token: &str,
        username: &str,
        password: &str,
        auth: &str,
    ) -> Result<Option<Self>, CredentialsError> {
        if !registry_token.is_empty() {
            return Ok(Some(Self::RegistryToken(registry_token.to_owned())));
        }
        if !identity_token.is_empty() {
            return Ok(Some(Self::IdentityToken(identity_token.to_owned())));
        }
        if !username.is_empty() || !password.is_empty() {
            return Ok(Some(Self::basic(username, password)));
        }
        let auth = auth.trim();
        if auth.is_empty() {
            return Ok(None);
        }
        let bytes =
            STANDARD.decode(auth).or_else(|_| STANDARD_NO_PAD.decode(auth)).map_err(|_| CredentialsError)?;
        let text = String::from_utf8(bytes).map_err(|_| CredentialsError)?;
        let (user, password) = text.split_once(':').ok_or(CredentialsError)?;
        // docker pads the password with NULs in some versions.
        Ok(Some(Self::basic(user, password.trim_end_matches('\0'))))
    }

    fn basic(user: &str, password: &str) -> Self {
        Self::Basic { user: user.to_owned(), password: password.to_owned() }
    }

    /// `user:password` for a Basic header, base64.
    pub(crate) fn encoded(&self) -> Option<String> {
        match self {
            Self::Basic { user, password } => Some(STANDARD.encode(format!("{user}:{password}"))),
            Self::IdentityToken(_) | Self::RegistryToken(_) => None,
        }
    }

    /// Texts that must not turn up in an error, should a server send them back.
    pub(crate) fn secrets(&self) -> Vec<String> {
        match self {
            Self::Basic { password, .. } => {
                let mut secrets = vec![password.clone()];
                secrets.extend(self.encoded());
                secrets
            }
            Self::IdentityToken(token) | Self::RegistryToken(token) => vec![token.clone()],
        }
    }
}

impl Fingerprint {
    pub(crate) fn of(sources: &[LoginSource]) -> Self {
        let mut hash = sha2::Sha256::new();
        let mut field = |text: &str| {
            hash.update(text.len().to_le_bytes());
            hash.update(text);
        };
        for source in sources {
            match source {
                LoginSource::Known(Login::Basic { user, password }) => {
                    ["basic", user, password].into_iter().for_each(&mut field);
                }
                LoginSource::Known(Login::IdentityToken(token)) => {
                    ["identity", token].into_iter().for_each(&mut field);
                }
                LoginSource::Known(Login::RegistryToken(token)) => {
                    ["registry", token].into_iter().for_each(&mut field);
                }
                LoginSource::Helper { name, server } => {
                    ["helper", name, server].into_iter().for_each(&mut field);
                }
                LoginSource::Unreadable(_) => field("none"),
            }
        }
        Self(hash.finalize().into())
    }
}

/// A registry's host as credentials name it: without scheme, path and default port, lowercase; all of Docker Hub's
/// hosts are `docker.io`.
pub(crate) fn canonical_host(text: &str) -> String {
    let text = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
    let host = text.split('/').next().unwrap_or(text).to_ascii_lowercase();
    let host = host.strip_suffix(":443").unwrap_or(&host);
    match host {
        "index.docker.io" | "registry-1.docker.io" => DOCKER_HUB.to_owned(),
        _ => host.to_owned(),
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = |text: &str| if text.is_empty() { "" } else { "***" };
        f.debug_struct("Credentials")
            .field("username", &mark(&self.username))
            .field("password", &mark(&self.password))
            .field("auth", &mark(&self.auth))
            .field("server_address", &canonical_host(self.server_address.rsplit('@').next().unwrap_or("")))
            .field("identity_token", &mark(&self.identity_token))
            .field("registry_token", &mark(&self.registry_token))
            .finish()
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic(***)",
            Self::IdentityToken(_) => "IdentityToken(***)",
            Self::RegistryToken(_) => "RegistryToken(***)",
        })
    }
}

impl fmt::Debug for LoginSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(login) => login.fmt(f),
            Self::Helper { name, server } => write!(f, "Helper({name} for {server})"),
            Self::Unreadable(why) => write!(f, "Unreadable({why})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_for_one_host() {
        let credentials =
            Credentials { username: "u".into(), password: "secret".into(), ..Credentials::default() };
        let basic = Login::Basic { user: "u".into(), password: "secret".into() };
        assert_eq!(credentials.login_for("docker.io", "docker.io").unwrap(), Some(basic.clone()));
        assert_eq!(credentials.login_for("docker.io", "mirror.local").unwrap(), None);
        let named =
            Credentials { server_address: "https://index.docker.io/v1/".into(), ..credentials.clone() };
        assert_eq!(named.login_for("quay.io", "quay.io").unwrap(), None);
        assert_eq!(named.login_for("docker.io", "docker.io").unwrap(), Some(basic));
        assert_eq!(canonical_host("https://Reg.Example.com:443/v2/"), "reg.example.com");
        assert_eq!(canonical_host("reg.example.com:5000"), "reg.example.com:5000");
    }

    #[test]
    fn forms_of_login() {
        let auth =
            |auth: &str| Credentials { auth: auth.into(), ..Credentials::default() }.login_for("a", "a");
        let basic = Login::Basic { user: "u".into(), password: "p:q".into() };
        assert_eq!(auth("dTpwOnE=").unwrap(), Some(basic.clone()));
        assert_eq!(auth("dTpwOnE").unwrap(), Some(basic));
        assert_eq!(auth("").unwrap(), None);
        assert!(auth("!!").is_err());
        assert!(auth("dQ==").is_err(), "no colon");
        let all = Credentials {
            username: "u".into(),
            identity_token: "i".into(),
            registry_token: "r".into(),
            ..Credentials::default()
        };
        assert_eq!(all.login_for("a", "a").unwrap(), Some(Login::RegistryToken("r".into())));
    }

    #[test]
    fn debug_shows_no_secret() {
        let credentials = Credentials {
            username: "alice-s3cret".into(),
            password: "s3cret".into(),
            auth: "s3cret".into(),
            server_address: "https://x:s3cret@a.net/".into(),
            identity_token: "s3cret".into(),
            registry_token: "s3cret".into(),
        };
        let login = Login::Basic { user: "u".into(), password: "s3cret".into() };
        let shown = format!("{credentials:?} {:?} {:?}", login.clone(), LoginSource::Known(login));
        assert!(!shown.contains("s3cret"), "{shown}");
        assert!(shown.contains("a.net"));
    }

    #[test]
    fn fingerprints_tell_logins_apart() {
        let known = |user: &str, password: &str| {
            Fingerprint::of(&[LoginSource::Known(Login::Basic {
                user: user.into(),
                password: password.into(),
            })])
        };
        assert_eq!(known("a", "b"), known("a", "b"));
        assert_ne!(known("a", "b"), known("ab", ""));
        assert_ne!(known("a", "b"), Fingerprint::of(&[]));
    }
}
