//! Our statement of the CRI against the original: every service, call, message, field, enumeration and value of
//! `k8s.io/cri-api`, in both directions.
//!
//! The original comes from the Go module proxy through the `go` command, into Go's own module cache.

mod upstream;

use std::collections::BTreeMap;
use std::path::Path;

use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet, MethodDescriptorProto,
};

/// The level of the CRI that podvisor serves: Kubernetes 1.37.
const UPSTREAM: &str = "k8s.io/cri-api@v0.37.2";
const PACKAGE: &str = "runtime.v1";

/// Everything that a set of files states about the package: name → what is said about it.
#[derive(Default)]
struct Facts(BTreeMap<String, String>);

impl Facts {
    fn of(set: &FileDescriptorSet) -> Self {
        let mut facts = Self::default();
        for file in set.file.iter().filter(|file| file.package() == PACKAGE) {
            for service in &file.service {
                let name = format!("{PACKAGE}.{}", service.name());
                service.method.iter().for_each(|method| facts.method(&name, method));
                facts.add(format!("service {name}"), format!("options {:?}", service.options));
            }
            file.message_type.iter().for_each(|message| facts.message(PACKAGE, message));
            file.enum_type.iter().for_each(|enumeration| facts.enumeration(PACKAGE, enumeration));
            facts.add("syntax".to_owned(), file.syntax().to_owned());
        }
        facts
    }

    fn add(&mut self, name: String, fact: String) {
        if let Some(before) = self.0.get(&name) {
            assert_eq!(*before, fact, "{name} is stated twice, differently");
        }
        self.0.insert(name, fact);
    }

    fn method(&mut self, service: &str, method: &MethodDescriptorProto) {
        let stream = |yes| if yes { "stream " } else { "" };
        let fact = format!(
            "({}{}) returns ({}{}), options {:?}",
            stream(method.client_streaming()),
            method.input_type(),
            stream(method.server_streaming()),
            method.output_type(),
            method.options,
        );
        self.add(format!("rpc {service}.{}", method.name()), fact);
    }

    fn message(&mut self, scope: &str, message: &DescriptorProto) {
        let name = format!("{scope}.{}", message.name());
        message.field.iter().for_each(|field| self.field(&name, field, message));
        message.nested_type.iter().for_each(|nested| self.message(&name, nested));
        message.enum_type.iter().for_each(|nested| self.enumeration(&name, nested));
        let fact = format!(
            "options {:?}, reserved {:?} {:?}, {} extensions",
            message.options,
            message.reserved_range,
            message.reserved_name,
            message.extension.len() + message.extension_range.len(),
        );
        self.add(format!("message {name}"), fact);
    }

    fn field(&mut self, message: &str, field: &FieldDescriptorProto, owner: &DescriptorProto) {
        let oneof =
            field.oneof_index.map(|at| owner.oneof_decl[usize::try_from(at).expect("an index")].name());
        let fact = format!(
            "number {}, {:?} {:?} {}, JSON name {}, oneof {oneof:?}, optional {}, default {:?}, options {:?}",
            field.number(),
            field.label(),
            field.r#type(),
            field.type_name(),
            field.json_name(),
            field.proto3_optional(),
            field.default_value,
            field.options,
        );
        self.add(format!("field {message}.{}", field.name()), fact);
    }

    fn enumeration(&mut self, scope: &str, enumeration: &EnumDescriptorProto) {
        let name = format!("{scope}.{}", enumeration.name());
        for value in &enumeration.value {
            let fact = format!("number {}, options {:?}", value.number(), value.options);
            self.add(format!("value {name}.{}", value.name()), fact);
        }
        let fact = format!(
            "options {:?}, reserved {:?} {:?}",
            enumeration.options, enumeration.reserved_range, enumeration.reserved_name
        );
        self.add(format!("enum {name}"), fact);
    }

    fn count(&self, kind: &str) -> usize {
        self.0.keys().filter(|name| name.starts_with(kind)).count()
    }
}

/// One line for each fact that is only in one of the two, or not the same.
fn differences(ours: &Facts, theirs: &Facts) -> Vec<String> {
    let missing = theirs.0.iter().filter(|(name, _)| !ours.0.contains_key(*name));
    let missing = missing.map(|(name, fact)| format!("missing here: {name}: {fact}"));
    let own = ours.0.iter().filter_map(|(name, ours)| match theirs.0.get(name) {
        None => Some(format!("only here: {name}: {ours}")),
        Some(theirs) if theirs != ours => {
            Some(format!("different: {name}\n  here:     {ours}\n  original: {theirs}"))
        }
        Some(_) => None,
    });
    missing.chain(own).collect()
}

fn ours() -> Facts {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    Facts::of(&protox::compile(["cri/service.proto"], [root]).expect("our files compile"))
}

#[test]
fn cri_equals_upstream() {
    let directory = upstream::module(UPSTREAM).join("pkg/apis/runtime/v1");
    let theirs = Facts::of(&protox::compile(["api.proto"], [directory]).expect("the original compiles"));
    let ours = ours();

    // An empty comparison would succeed too.
    assert!(theirs.count("rpc ") >= 43 && theirs.count("message ") >= 150, "the original was not read");
    let differences = differences(&ours, &theirs);
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
    println!(
        "equal: {} calls, {} messages with {} fields, {} enumerations with {} values",
        ours.count("rpc "),
        ours.count("message "),
        ours.count("field "),
        ours.count("enum "),
        ours.count("value "),
    );
}

#[test]
fn every_file_of_ours_is_part_of_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let set = protox::compile(["cri/service.proto"], [root]).expect("our files compile");
    for entry in std::fs::read_dir(root.join("cri")).expect("the directory of our files") {
        let name = format!("cri/{}", entry.expect("an entry").file_name().display());
        assert!(set.file.iter().any(|file| file.name() == name), "{name} is not imported");
    }
}

type Change = fn(&mut DescriptorProto);

/// The comparison itself: what it must not overlook.
#[test]
fn a_difference_is_found() {
    let changes: [(&str, Change); 6] = [
        ("a number", |message| message.field[0].number = Some(99)),
        ("a name", |message| message.field[0].name = Some("other".to_owned())),
        ("a type", |message| message.field[0].r#type = Some(9)),
        ("a label", |message| message.field[0].label = Some(3)),
        ("a JSON name", |message| message.field[0].json_name = Some("other".to_owned())),
        ("a field", |message| drop(message.field.pop())),
    ];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let set = protox::compile(["cri/service.proto"], [root]).expect("our files compile");
    let original = Facts::of(&set);
    assert!(differences(&original, &original).is_empty());
    for (what, change) in changes {
        let mut changed = set.clone();
        let message = changed.file.iter_mut().flat_map(|file| &mut file.message_type);
        change(message.into_iter().find(|message| message.name() == "PortMapping").expect("PortMapping"));
        let changed = Facts::of(&changed);
        assert!(!differences(&changed, &original).is_empty(), "{what} here");
        assert!(!differences(&original, &changed).is_empty(), "{what} there");
    }
    let mut changed = set.clone();
    let method =
        changed.file.iter_mut().flat_map(|file| &mut file.service).flat_map(|service| &mut service.method);
    method.last().expect("a call").server_streaming = Some(true);
    assert_eq!(differences(&Facts::of(&changed), &original).len(), 1);
}
