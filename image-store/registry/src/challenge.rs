//! `WWW-Authenticate` (RFC 9110 §11.6.1): what a registry wants to see before it answers.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// Headers longer than this are not looked at.
const HEADER_MAX: usize = 8 << 10;

/// One challenge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// A token from `realm` (distribution's token authentication).
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
    /// User and password.
    Basic,
}

impl Challenge {
    /// The best challenge of an answer: tokens rather than passwords.
    pub(crate) fn best(headers: &HeaderMap) -> Option<Self> {
        let challenges: Vec<Self> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .filter(|value| value.len() <= HEADER_MAX)
            .flat_map(parse)
            .collect();
        let bearer = challenges.iter().find(|challenge| matches!(challenge, Self::Bearer { .. }));
        bearer.or(challenges.first()).cloned()
    }
}

/// Reads `scheme key=value, key="value", scheme …`; what it does not know is passed over.
fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=', '"']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            // Nothing more, or a stray character: step over it.
            let Some(stray) = rest.chars().next() else { break };
            rest = &rest[stray.len_utf8()..];
            continue;
        }
        let unspaced = after.trim_start_matches([' ', '\t']);
        if let Some(value) = unspaced.strip_prefix('=') {
            let (value, after) = parameter(value.trim_start_matches([' ', '\t']));
            if let Some((_, parameters)) = challenges.last_mut() {
                parameters.push((word.to_ascii_lowercase(), value));
            }
            rest = after;
        } else {
            challenges.push((word.to_ascii_lowercase(), Vec::new()));
            rest = after;
        }
    }
    challenges.into_iter().filter_map(|(scheme, parameters)| known(&scheme, &parameters)).collect()
}

/// A token or a quoted string, and what follows.
fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            _ => value.push(c),
        }
    }
    (value, "")
}

fn known(scheme: &str, parameters: &[(String, String)]) -> Option<Challenge> {
    match scheme {
        "bearer" => {
            let get =
                |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
            Some(Challenge::Bearer { realm: get("realm")?, service: get("service"), scope: get("scope") })
        }
        "basic" => Some(Challenge::Basic),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn best(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_str(value).unwrap());
        }
        Challenge::best(&headers)
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
            scope: scope.map(Into::into),
        }
    }

    #[test]
    fn reads_what_registries_send() {
        assert_eq!(
            best(&[
                r#"Bearer realm="https://auth.net/token",service="reg.net",scope="repository:a/b:pull,push""#
            ]),
            Some(bearer("https://auth.net/token", Some("reg.net"), Some("repository:a/b:pull,push")))
        );
        assert_eq!(
            best(&["bearer realm=https://a/t , service = x"]),
            Some(bearer("https://a/t", Some("x"), None))
        );
        assert_eq!(best(&[r#"Basic realm="say \"hi\", Bearer realm=x""#]), Some(Challenge::Basic));
        assert_eq!(best(&[r#"Basic realm="x", Bearer realm="y""#]), Some(bearer("y", None, None)));
        assert_eq!(best(&["Basic", r#"Bearer realm="y""#]), Some(bearer("y", None, None)));
        assert_eq!(best(&[r#"Negotiate abc==, Basic realm="x""#]), Some(Challenge::Basic));
        assert_eq!(best(&["Negotiate"]), None);
        assert_eq!(best(&["Bearer service=x"]), None, "no realm, no token");
        assert_eq!(best(&[]), None);
    }

    #[test]
    fn garbage_ends() {
        for text in
            ["=", "\"", ",,,,", "Bearer realm=\"unclosed", "Bearer realm=\"\\", "a=b=c,=,\"\"=", "Bearer =x"]
        {
            let _ = best(&[text]);
        }
        let long = format!("Bearer realm=\"{}\"", "x".repeat(HEADER_MAX));
        assert_eq!(best(&[&long]), None);
    }
}
