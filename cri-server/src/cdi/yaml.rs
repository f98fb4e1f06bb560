//! YAML as JSON's tree: what vendors' files use of it. The parser of `saphyr-parser` gives events; what they mean is decided here.
//!
//! Numbers and words are read as YAML 1.2's core schema has them, and `0660` as an octal number, as YAML 1.1 and Go's reader have it.

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::{Map, Number, Value};

/// Values in one file, those that an alias repeats included: so few bytes do not become many.
const VALUES_MAX: usize = 1 << 20;
const DEPTH_MAX: usize = 64;

/// A collection that is not complete yet.
enum Open {
    List(Vec<Value>),
    /// With the key whose value comes next.
    Map(Map<String, Value>, Option<String>),
}

#[derive(Default)]
struct Composer {
    open: Vec<(Open, usize)>,
    /// By the parser's number.
    anchors: std::collections::HashMap<usize, (Value, usize)>,
    values: usize,
    whole: Option<Value>,
}

/// The one document in `text`; an empty one is `null`.
pub(super) fn parse(text: &str) -> Result<Value, String> {
    let mut composer = Composer::default();
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| error.to_string())?;
        composer.take(event).map_err(|why| format!("{why} in line {}", span.start.line()))?;
    }
    Ok(composer.whole.unwrap_or(Value::Null))
}

impl Composer {
    fn take(&mut self, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::DocumentStart(_) if self.whole.is_some() => Err("a second document begins".into()),
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar(&text, style, tag.as_deref());
                self.finish(value, anchor)
            }
            Event::SequenceStart(anchor, _) => self.begin(Open::List(Vec::new()), anchor),
            Event::MappingStart(anchor, _) => self.begin(Open::Map(Map::new(), None), anchor),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some((Open::List(list), anchor)) => self.finish(Value::Array(list), anchor),
                Some((Open::Map(map, _), anchor)) => self.finish(Value::Object(map), anchor),
                None => Err("something ends that has not begun".into()),
            },
            Event::Alias(number) => {
                let (value, size) =
                    self.anchors.get(&number).cloned().ok_or("an alias is inside what it stands for")?;
                self.count(size)?;
                self.place(value)
            }
            _ => Ok(()),
        }
    }

    fn begin(&mut self, open: Open, anchor: usize) -> Result<(), String> {
        if self.open.len() == DEPTH_MAX {
            return Err(format!("there are more than {DEPTH_MAX} levels"));
        }
        self.open.push((open, anchor));
        Ok(())
    }

    fn count(&mut self, values: usize) -> Result<(), String> {
        self.values = self.values.saturating_add(values);
        if self.values > VALUES_MAX {
            Err(format!("there are more than {VALUES_MAX} values"))
        } else {
            Ok(())
        }
    }

    fn finish(&mut self, value: Value, anchor: usize) -> Result<(), String> {
        self.count(1)?;
        if anchor != 0 {
            let size = size(&value);
            self.count(size)?;
            self.anchors.insert(anchor, (value.clone(), size));
        }
        self.place(value)
    }

    fn place(&mut self, value: Value) -> Result<(), String> {
        match self.open.last_mut() {
            None => self.whole = Some(value),
            Some((Open::List(list), _)) => list.push(value),
            Some((Open::Map(map, key), _)) => match (key.take(), value) {
                (Some(name), value) => {
                    if map.contains_key(&name) {
                        return Err(format!("key {name:?} is there twice"));
                    }
                    map.insert(name, value);
                }
                (None, Value::String(name)) => *key = Some(name),
                (None, Value::Number(number)) => *key = Some(number.to_string()),
                (None, _) => return Err("a key is no text".into()),
            },
        }
        Ok(())
    }
}

fn size(value: &Value) -> usize {
    // As deep as DEPTH_MAX at most, or twice that through an alias.
    match value {
        Value::Array(list) => 1 + list.iter().map(size).sum::<usize>(),
        Value::Object(map) => 1 + map.values().map(size).sum::<usize>(),
        _ => 1,
    }
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Value {
    let is_text = tag.is_some_and(|tag| tag.is_yaml_core_schema() && tag.suffix == "str");
    if style != ScalarStyle::Plain || is_text {
        return Value::String(text.to_owned());
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ => number(text).map_or_else(|| Value::String(text.to_owned()), Value::Number),
    }
}

fn number(text: &str) -> Option<Number> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if !digits.starts_with(|first: char| first.is_ascii_digit()) {
        return None;
    }
    let with_base = |digits: &str, base| i64::from_str_radix(digits, base).ok().filter(|number| *number >= 0);
    let magnitude = if let Some(hex) = digits.strip_prefix("0x") {
        with_base(hex, 16)
    } else if let Some(octal) = digits.strip_prefix("0o") {
        with_base(octal, 8)
    } else if digits.len() > 1 && digits.starts_with('0') {
        with_base(digits, 8)
    } else {
        with_base(digits, 10)
    };
    magnitude.map(|magnitude| Number::from(sign * magnitude))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_what_vendors_write() {
        let text = "---\n# a comment\ncdiVersion: \"0.6.0\"\nkind: nvidia.com/gpu\ndevices:\n- name: \"0\"\n  containerEdits:\n    \
                    deviceNodes:\n    - path: /dev/nvidia0\n      fileMode: 0660\n      major: 0x1f\n    env: [A=1, 'B=x: y']\n  empty:\n\
                    other: {a: ~, b: true, c: -5, d: !!str 5, 1: one}\ntext: |\n  two\n  lines\n";
        assert_eq!(
            parse(text).unwrap(),
            json!({
                "cdiVersion": "0.6.0",
                "kind": "nvidia.com/gpu",
                "devices": [{
                    "name": "0",
                    "containerEdits": {
                        "deviceNodes": [{"path": "/dev/nvidia0", "fileMode": 432, "major": 31}],
                        "env": ["A=1", "B=x: y"],
                    },
                    "empty": null,
                }],
                "other": {"a": null, "b": true, "c": -5, "d": "5", "1": "one"},
                "text": "two\nlines\n",
            })
        );
        assert_eq!(parse("{\"json\": [1, \"is\", null]}").unwrap(), json!({"json": [1, "is", null]}));
        assert_eq!(parse("").unwrap(), Value::Null);
        assert_eq!(parse("a: &x [1, 2]\nb: *x").unwrap(), json!({"a": [1, 2], "b": [1, 2]}));
        for plain in ["1.5", "1e3", "0x", "08", "12a", "99999999999999999999", "yes", "-"] {
            assert_eq!(
                parse(&format!("a: {plain} ")).unwrap_or(json!({"a": plain})),
                json!({"a": plain}),
                "{plain}"
            );
        }
    }

    #[test]
    fn what_cannot_be_meant_is_an_error() {
        let deep = format!("{}1{}", "[".repeat(100), "]".repeat(100));
        let laughs = (0..12).fold("a0: &a0 [1,1,1,1,1,1,1,1]\n".to_owned(), |text, level| {
            let refs = vec![format!("*a{level}"); 8].join(",");
            format!("{text}a{}: &a{} [{refs}]\n", level + 1, level + 1)
        });
        for (text, part) in [
            ("a: 1\na: 2", "twice"),
            ("a: [1", ""),
            ("a: b: c", ""),
            ("--- 1\n--- 2", "second document"),
            ("[1, 2]: 3", "no text"),
            ("a: *unknown", ""),
            (deep.as_str(), "levels"),
            (laughs.as_str(), "values"),
        ] {
            let error = parse(text).expect_err(part);
            assert!(error.contains(part), "{text:.40}: {error}");
        }
    }
}
