// SPDX-License-Identifier: Apache-2.0
//! Our `openshell.compute.v1` against OpenShell's own file, where one is given (`OPENSHELL_PROTO_DIR`).
use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::Path;

use prost_types::FileDescriptorProto;

const FILE: &str = "openshell/compute/v1/compute_driver.proto";

/// Everything that the wire depends on, one line each.
fn facts(file: &FileDescriptorProto) -> BTreeSet<String> {
    let mut facts = BTreeSet::new();
    for message in &file.message_type {
        facts.insert(format!("message {}", message.name()));
        for field in &message.field {
            let map = message.nested_type.iter().find(|nested| {
                field.type_name().ends_with(&format!(".{}", nested.name()))
                    && nested.options.as_ref().is_some_and(prost_types::MessageOptions::map_entry)
            });
            let kind = match map {
                Some(entry) => {
                    let parts: Vec<_> = entry.field.iter().map(|it| (it.r#type(), it.type_name())).collect();
                    format!("map {parts:?}")
                }
                None => format!("{:?} {:?} {}", field.label(), field.r#type(), field.type_name()),
            };
            let oneof = field
                .oneof_index
                .filter(|_| !field.proto3_optional())
                .map(|index| message.oneof_decl[index as usize].name().to_owned());
            facts.insert(format!(
                "{}.{} = {}: {kind} oneof {oneof:?} optional {}",
                message.name(),
                field.name(),
                field.number(),
                field.proto3_optional()
            ));
        }
        for range in &message.reserved_range {
            facts.insert(format!("{} reserves {}..{}", message.name(), range.start(), range.end()));
        }
        for name in &message.reserved_name {
            facts.insert(format!("{} reserves {name}", message.name()));
        }
    }
    for service in &file.service {
        for method in &service.method {
            facts.insert(format!(
                "{}.{}({}) returns ({} {})",
                service.name(),
                method.name(),
                method.input_type(),
                if method.server_streaming() { "stream" } else { "one" },
                method.output_type()
            ));
        }
    }
    facts
}

fn ours() -> BTreeSet<String> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto/proto");
    let set = protox::compile([FILE], [proto]).unwrap();
    facts(set.file.iter().find(|file| file.package() == "openshell.compute.v1").unwrap())
}

#[test]
fn our_contract_has_its_twelve_calls() {
    let calls = ours().into_iter().filter(|fact| fact.starts_with("ComputeDriver.")).count();
    assert_eq!(calls, 12);
}

#[test]
fn our_contract_is_openshells() {
    let Some(dir) = std::env::var_os("OPENSHELL_PROTO_DIR") else {
        // Written past the harness, which hides what a passing test prints.
        writeln!(
            std::io::stderr(),
            "skipped: OPENSHELL_PROTO_DIR names no directory with OpenShell's compute_driver.proto"
        )
        .unwrap();
        return;
    };
    let dir = Path::new(&dir);
    let set = protox::compile([dir.join("compute_driver.proto")], [dir]).unwrap();
    let theirs = facts(set.file.iter().find(|file| file.package() == "openshell.compute.v1").unwrap());
    let ours = ours();
    let missing: Vec<_> = theirs.difference(&ours).collect();
    let extra: Vec<_> = ours.difference(&theirs).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing here: {missing:#?}\nnot upstream: {extra:#?}");
}
