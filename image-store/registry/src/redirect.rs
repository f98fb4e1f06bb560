//! Where a redirect leads, and whether that is still the same place.

use http::uri::{PathAndQuery, Scheme};
use http::{HeaderValue, Uri};

/// Same scheme, host and port: credentials may go there.
pub(crate) fn same_origin(a: &Uri, b: &Uri) -> bool {
    a.scheme() == b.scheme() && same_host(a, b) && port(a) == port(b)
}

/// Same host, whatever the port.
pub(crate) fn same_host(a: &Uri, b: &Uri) -> bool {
    match (a.host(), b.host()) {
        (Some(a), Some(b)) => a.eq_ignore_ascii_case(b),
        _ => false,
    }
}

fn port(uri: &Uri) -> u16 {
    uri.port_u16().unwrap_or(if uri.scheme() == Some(&Scheme::HTTP) { 80 } else { 443 })
}

/// Scheme, host and path: the query of a redirect often holds a signature, which is a secret.
pub(crate) fn shown(uri: &Uri) -> String {
    let scheme = uri.scheme_str().unwrap_or("?");
    let host = uri.host().unwrap_or("?");
    match uri.port_u16() {
        Some(port) => format!("{scheme}://{host}:{port}{}", uri.path()),
        None => format!("{scheme}://{host}{}", uri.path()),
    }
}

/// Resolves a `Location` (RFC 3986 §5.2, without dot segments: servers resolve their own) against `base`.
pub(crate) fn target(base: &Uri, location: Option<&HeaderValue>) -> Result<Uri, String> {
    let location = location.ok_or("it has no Location")?;
    let text = location.to_str().map_err(|_| "its Location is not ASCII")?.trim();
    let text = text.split('#').next().unwrap_or_default();
    if text.is_empty() {
        return Err("its Location is empty".to_owned());
    }
    let unreadable = || "its Location is no URL".to_owned();
    let scheme = base.scheme_str().ok_or_else(unreadable)?;
    let absolute = if has_scheme(text) {
        text.to_owned()
    } else if let Some(rest) = text.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else {
        let authority = base.authority().ok_or_else(unreadable)?;
        let path = base.path();
        let path = if text.starts_with('/') {
            text.to_owned()
        } else if text.starts_with('?') {
            format!("{path}{text}")
        } else {
            let directory = path.rfind('/').map_or("/", |at| &path[..=at]);
            format!("{directory}{text}")
        };
        format!("{scheme}://{authority}{path}")
    };
    let uri: Uri = absolute.parse().map_err(|_| unreadable())?;
    let next = uri.scheme_str().ok_or_else(unreadable)?;
    if uri.host().is_none_or(str::is_empty) {
        return Err(unreadable());
    }
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(format!("it has user and password in its URL ({})", shown(&uri)));
    }
    match (scheme, next) {
        ("https", "https") | ("http", "http" | "https") => {}
        ("https", "http") => return Err(format!("from https to plain http ({})", shown(&uri))),
        _ => return Err(format!("scheme {next:?} is not followed")),
    }
    let mut parts = uri.into_parts();
    if parts.path_and_query.is_none() {
        parts.path_and_query = Some(PathAndQuery::from_static("/"));
    }
    Uri::from_parts(parts).map_err(|_| unreadable())
}

fn has_scheme(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| {
        !scheme.is_empty()
            && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follow(base: &str, location: &str) -> Result<String, String> {
        target(&base.parse().unwrap(), Some(&HeaderValue::from_bytes(location.as_bytes()).unwrap()))
            .map(|uri| uri.to_string())
    }

    #[test]
    fn locations_are_resolved() {
        let base = "https://a.net:5000/v2/x/blobs/y?ns=z";
        for (location, expected) in [
            ("https://b.net/q?s=1", "https://b.net/q?s=1"),
            ("https://b.net", "https://b.net/"),
            ("//b.net/q", "https://b.net/q"),
            ("/q#frag", "https://a.net:5000/q"),
            ("z", "https://a.net:5000/v2/x/blobs/z"),
            ("?u=https://c.net/", "https://a.net:5000/v2/x/blobs/y?u=https://c.net/"),
        ] {
            assert_eq!(follow(base, location).as_deref(), Ok(expected), "{location}");
        }
        for location in
            ["", "#x", "http://a.net/", "ftp://a.net/", "https://", "https://u:p@b.net/", "/a b", "ä"]
        {
            let error = follow(base, location).expect_err(location);
            assert!(!error.contains("u:p"), "{error}");
        }
        assert!(target(&base.parse().unwrap(), None).is_err());
        assert!(follow("http://a.net/", "https://a.net/").is_ok(), "upgrades are fine");
    }

    #[test]
    fn origins() {
        let uri = |text: &str| text.parse::<Uri>().unwrap();
        assert!(same_origin(&uri("https://a.net/x"), &uri("https://A.net:443/y")));
        assert!(!same_origin(&uri("https://a.net"), &uri("http://a.net")));
        assert!(!same_origin(&uri("https://a.net"), &uri("https://a.net:444")));
        assert!(!same_origin(&uri("https://a.net"), &uri("https://b.a.net")));
        assert_eq!(shown(&uri("https://a.net/x?sig=s3cret")), "https://a.net/x");
    }
}
