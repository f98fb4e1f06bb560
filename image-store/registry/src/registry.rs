//! The client: configuration read at each use, and what a name means under it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;

use crate::blob::BlobStream;
use crate::credentials::{Credentials, LoginSource};
use crate::docker_config;
use crate::endpoint::{self, Endpoint};
use crate::error::RegistryError;
use crate::manifest::LayerDescriptor;
use crate::reference::{Reference, ReferenceProblem, split_version};
use crate::registries_conf::{LiveConf, ShortNameMode};
use crate::resolve::{ResolvedImage, Walk};
use crate::session::{Session, Wire};
use crate::source::Source;
use crate::token::TokenCache;
use crate::transport::Transport;

/// Where configuration comes from and how patient to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// registries.conf v2; drop-ins in `<file>.d/`. Read again when it changed.
    pub registries_conf: PathBuf,
    /// containerd's `certs.d`. Read at each pull.
    pub certs_dir: PathBuf,
    /// docker `config.json` files, first match wins. Read again at each pull.
    pub auth_files: Vec<PathBuf>,
    /// For names without a registry, when registries.conf has no `unqualified-search-registries`.
    pub default_registries: Vec<String>,
    /// No byte for this long: the transfer is broken (and resumed, a bounded number of times). Also the time to an
    /// answer's header; a manifest or configuration may take ten times as long in all.
    pub progress_timeout: Duration,
    /// `User-Agent`.
    pub user_agent: String,
}

/// A client for all registries: connection pool, tokens, configuration. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: Options,
    conf: LiveConf,
    wire: Arc<Wire>,
}

impl Registry {
    /// Reads nothing yet but the options and the proxy variables of the environment.
    pub fn new(options: Options) -> Result<Self, RegistryError> {
        let user_agent = HeaderValue::from_str(&options.user_agent)
            .map_err(|_| RegistryError::UserAgent(options.user_agent.clone()))?;
        let transport = Transport::new(user_agent, options.progress_timeout);
        let conf = LiveConf::new(options.registries_conf.clone());
        let wire = Arc::new(Wire { transport, tokens: TokenCache::default() });
        Ok(Self { shared: Arc::new(Shared { options, conf, wire }) })
    }

    /// What is wrong with registries.conf and its drop-ins as they are now, for Status. While something is, pulls
    /// go by the last good state; if there never was one, they fail.
    pub fn configuration_error(&self) -> Option<String> {
        self.shared.conf.error().map(|error| error.to_string())
    }

    /// What `name`, as it stands in a pod, may mean, in the order to be tried. A name with a registry means one
    /// thing; an alias decides for a short name alone, as else somebody else's image could step in for it; other
    /// short names are looked for in every search registry.
    pub async fn candidates(&self, name: &str) -> Result<Vec<Reference>, RegistryError> {
        let parsed = Reference::parse(name)?;
        if !Reference::is_short(name) {
            return Ok(vec![parsed]);
        }
        let shared = Arc::clone(&self.shared);
        let conf = blocking(move || shared.conf.current()).await??;
        let (short, version) = split_version(name);
        if let Some(target) = conf.aliases.get(short) {
            return Ok(vec![Reference::parse(&format!("{target}{version}"))?]);
        }
        let registries = conf.search.as_ref().unwrap_or(&self.shared.options.default_registries);
        let problem = |problem| RegistryError::reference(name, problem);
        if registries.is_empty() {
            return Err(problem(ReferenceProblem::NoSearchRegistry));
        }
        if registries.len() > 1 && conf.short_name_mode == ShortNameMode::Enforcing {
            return Err(problem(ReferenceProblem::Ambiguous(registries.join(", "))));
        }
        registries
            .iter()
            .map(|registry| {
                let full = format!("{registry}/{name}");
                if Reference::is_short(&full) {
                    return Err(problem(ReferenceProblem::Registry(registry.clone())));
                }
                Reference::parse(&full)
            })
            .collect()
    }

    /// Finds out what `reference` is: tries its endpoints in order, follows an index to this platform, fetches
    /// manifest and configuration.
    pub async fn resolve(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
    ) -> Result<ResolvedImage, RegistryError> {
        let source = self.source(reference, credentials).await?;
        Walk::new(&self.shared.wire, source).resolve().await
    }

    /// Opens a layer of a resolved image: returns once an endpoint has begun to answer.
    pub async fn blob(
        &self,
        source: &Arc<Source>,
        layer: &LayerDescriptor,
    ) -> Result<BlobStream, RegistryError> {
        BlobStream::open(Arc::clone(&self.shared.wire), Arc::clone(source), layer).await
    }

    /// Reads the configuration as it is now and decides whom to ask, and as whom.
    async fn source(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
    ) -> Result<Arc<Source>, RegistryError> {
        let shared = Arc::clone(&self.shared);
        let reference = reference.clone();
        let credentials = credentials.cloned();
        blocking(move || {
            let conf = shared.conf.current()?;
            let options = &shared.options;
            let endpoints = endpoint::plan(&reference, &conf, &options.registries_conf, &options.certs_dir)?;
            let mut sessions = Vec::with_capacity(endpoints.len());
            for endpoint in endpoints {
                let logins =
                    shared.logins(&reference, &endpoint, credentials.as_ref(), &conf.credential_helpers)?;
                sessions.push(Session::new(endpoint, logins, &shared.wire.tokens));
            }
            Ok(Arc::new(Source { reference, sessions }))
        })
        .await?
    }
}

impl Shared {
    /// The request's credentials where they are for this endpoint, else what files and helpers have.
    fn logins(
        &self,
        reference: &Reference,
        endpoint: &Endpoint,
        credentials: Option<&Credentials>,
        helpers: &[String],
    ) -> Result<Vec<LoginSource>, RegistryError> {
        let host = &endpoint.credential_host;
        let asked = crate::credentials::canonical_host(reference.registry());
        if let Some(credentials) = credentials
            && let Some(login) = credentials.login_for(&asked, host)?
        {
            return Ok(vec![LoginSource::Known(login)]);
        }
        Ok(docker_config::sources(&self.options.auth_files, helpers, host, &endpoint.repository))
    }
}

/// Configuration files may be on slow disks.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, RegistryError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| RegistryError::ShuttingDown)
}
