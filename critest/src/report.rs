//! What ginkgo's JSON report says about each spec.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// How a spec ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It held.
    Pass,
    /// The suite itself left it out, for this reason.
    Skip(String),
    /// It did not hold, or did not end; with what the suite said.
    Fail(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pass => f.write_str("pass"),
            Self::Skip(reason) => write!(f, "skip ({reason})"),
            Self::Fail(reason) => write!(f, "fail ({})", reason.lines().next().unwrap_or_default()),
        }
    }
}

/// Outcomes by the specs' names. Specs that a filter left out are not in it.
pub type Outcomes = BTreeMap<String, Outcome>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Option<Vec<Spec>>,
    special_suite_failure_reasons: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    #[serde(default)]
    failure: Failure,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Failure {
    message: String,
    forwarded_panic: String,
}

/// Reads a report file.
pub fn read(file: &Path) -> Result<Outcomes> {
    let text = fs::read(file).with_context(|| format!("reading the report {}", file.display()))?;
    parse(&text).with_context(|| format!("reading the report {}", file.display()))
}

fn parse(text: &[u8]) -> Result<Outcomes> {
    let suites: Vec<Suite> = serde_json::from_slice(text)?;
    let mut outcomes = Outcomes::new();
    for suite in suites {
        for reason in suite.special_suite_failure_reasons.unwrap_or_default() {
            // Such as a time limit of the whole suite: no spec says so.
            outcomes.insert(format!("the suite itself: {reason}"), Outcome::Fail(reason));
        }
        for spec in suite.spec_reports.unwrap_or_default() {
            let failure =
                [spec.failure.message, spec.failure.forwarded_panic].join(" ").trim().replace('\t', " ");
            let is_spec = spec.leaf_node_type == "It";
            let outcome = match spec.state.as_str() {
                "passed" if is_spec => Outcome::Pass,
                // Without a reason a filter left it out.
                "skipped" if is_spec && !failure.is_empty() => {
                    Outcome::Skip(failure.split_whitespace().collect::<Vec<_>>().join(" "))
                }
                "passed" | "skipped" | "pending" => continue,
                state => Outcome::Fail(format!("{state}: {failure}")),
            };
            let texts = spec.container_hierarchy_texts.unwrap_or_default();
            let name = texts.iter().map(String::as_str).chain([spec.leaf_node_text.as_str()]);
            let name = name.filter(|text| !text.is_empty()).collect::<Vec<_>>().join(" ");
            let name =
                if is_spec { name } else { format!("{} {name}", spec.leaf_node_type).trim_end().to_owned() };
            outcomes.insert(name.trim_start_matches("[k8s.io] ").to_owned(), outcome);
        }
    }
    Ok(outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_its_outcome() {
        let report = r#"[{"SpecReports": [
            {"LeafNodeType": "BeforeSuite", "LeafNodeText": "", "State": "passed"},
            {"ContainerHierarchyTexts": ["[k8s.io] Group", "context"], "LeafNodeType": "It", "LeafNodeText": "a", "State": "passed"},
            {"ContainerHierarchyTexts": ["[k8s.io] Group"], "LeafNodeType": "It", "LeafNodeText": "b", "State": "skipped"},
            {"ContainerHierarchyTexts": ["[k8s.io] Group"], "LeafNodeType": "It", "LeafNodeText": "c", "State": "skipped",
             "Failure": {"Message": "no such\n feature"}},
            {"ContainerHierarchyTexts": ["[k8s.io] Group"], "LeafNodeType": "It", "LeafNodeText": "d", "State": "timedout",
             "Failure": {"Message": "late"}},
            {"LeafNodeType": "AfterSuite", "LeafNodeText": "", "State": "failed", "Failure": {"Message": "x"}}
        ], "SpecialSuiteFailureReasons": ["Suite Timeout Elapsed"]}]"#;
        let outcomes = parse(report.as_bytes()).unwrap();
        let expected = [
            ("AfterSuite", Outcome::Fail("failed: x".into())),
            ("Group c", Outcome::Skip("no such feature".into())),
            ("Group context a", Outcome::Pass),
            ("Group d", Outcome::Fail("timedout: late".into())),
            ("the suite itself: Suite Timeout Elapsed", Outcome::Fail("Suite Timeout Elapsed".into())),
        ];
        assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), expected.map(|(n, o)| (n.to_owned(), o)));
    }
}
