//! Prometheus' text format, version 0.0.4: families one after the other, each with its HELP and TYPE.

use std::fmt::Write;

/// The type of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// A page of metrics that is being written.
#[derive(Debug, Default)]
pub(super) struct Page(String);

/// The family that is being written.
pub(super) struct Family<'p> {
    page: &'p mut String,
    name: &'static str,
}

impl Page {
    /// All samples of a name stand together, so each family is begun once.
    pub(super) fn family(&mut self, name: &'static str, kind: Kind, help: &str) -> Family<'_> {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        // Writing to a string cannot fail, here and below.
        let _ = writeln!(self.0, "# HELP {name} {}", help.replace('\\', "\\\\").replace('\n', "\\n"));
        let _ = writeln!(self.0, "# TYPE {name} {kind}");
        Family { page: &mut self.0, name }
    }

    /// A family of one sample.
    pub(super) fn single(&mut self, name: &'static str, kind: Kind, help: &str, value: f64) {
        self.family(name, kind, help).sample("", &[], value);
    }

    pub(super) fn finish(self) -> String {
        self.0
    }
}

impl Family<'_> {
    /// `suffix` is what a histogram's samples have after the name.
    pub(super) fn sample(&mut self, suffix: &str, labels: &[(&str, &str)], value: f64) {
        let _ = write!(self.page, "{}{suffix}", self.name);
        for (index, (label, value)) in labels.iter().enumerate() {
            self.page.push(if index == 0 { '{' } else { ',' });
            let _ = write!(self.page, "{label}=\"");
            for letter in value.chars() {
                match letter {
                    '\\' => self.page.push_str("\\\\"),
                    '"' => self.page.push_str("\\\""),
                    '\n' => self.page.push_str("\\n"),
                    other => self.page.push(other),
                }
            }
            self.page.push('"');
        }
        if !labels.is_empty() {
            self.page.push('}');
        }
        let _ = writeln!(self.page, " {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page() {
        let mut page = Page::default();
        let mut family = page.family("a_total", Kind::Counter, "With a \\ and\na line.");
        family.sample("", &[("x", "a\"b\\c\nd"), ("y", "")], 3.0);
        family.sample("", &[("x", "z"), ("y", "ü")], 0.5);
        page.single("b", Kind::Gauge, "One.", 1_700_000_000.25);
        assert_eq!(
            page.finish(),
            "# HELP a_total With a \\\\ and\\na line.\n# TYPE a_total counter\n\
             a_total{x=\"a\\\"b\\\\c\\nd\",y=\"\"} 3\na_total{x=\"z\",y=\"ü\"} 0.5\n\
             # HELP b One.\n# TYPE b gauge\nb 1700000000.25\n"
        );
    }
}
