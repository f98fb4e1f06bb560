//! Our statement of NRI against the original: every service, message and enumeration of `github.com/containerd/nri`, in both
//! directions.

mod upstream;

use std::collections::BTreeMap;
use std::path::Path;

use prost_types::{DescriptorProto, FileDescriptorSet};

const UPSTREAM: &str = "github.com/containerd/nri@v0.12.0";

/// What only plugins in WebAssembly have.
const LEFT_OUT: [&str; 2] = ["HostFunctions", "LogRequest"];

fn facts(set: &FileDescriptorSet) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    for file in set.file.iter().filter(|file| file.package() == "nri.pkg.api.v1alpha1") {
        for service in &file.service {
            for method in &service.method {
                let name = format!("{}.{}", service.name(), method.name());
                facts.insert(name, format!("{} → {}", method.input_type(), method.output_type()));
            }
        }
        file.message_type.iter().for_each(|message| of_message(&mut facts, "", message));
        for enumeration in &file.enum_type {
            facts.insert(enumeration.name().to_owned(), format!("{:?}", enumeration.value));
        }
    }
    facts.retain(|name, _| !LEFT_OUT.iter().any(|left| name.split('.').next() == Some(left)));
    facts
}

fn of_message(facts: &mut BTreeMap<String, String>, within: &str, message: &DescriptorProto) {
    let name = format!("{within}{}", message.name());
    for field in &message.field {
        let fact =
            format!("{} {:?} {:?} {}", field.number(), field.label(), field.r#type(), field.type_name());
        facts.insert(format!("{name}.{}", field.name()), fact);
    }
    for enumeration in &message.enum_type {
        facts.insert(format!("{name}.{}", enumeration.name()), format!("{:?}", enumeration.value));
    }
    message.nested_type.iter().for_each(|nested| of_message(facts, &format!("{name}."), nested));
    facts.insert(name, "a message".to_owned());
}

#[test]
fn nri_is_the_original() {
    let theirs = upstream::module(UPSTREAM).join("pkg/api");
    let theirs = facts(&protox::compile(["api.proto"], [theirs]).expect("the original compiles"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ours = facts(&protox::compile(["nri/nri.proto"], [root]).expect("our file compiles"));
    assert!(theirs.len() > 200, "the original was read");
    assert_eq!(ours, theirs);
}
