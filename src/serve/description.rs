//! `resources/serve.yaml` and the code say the same, compared both ways.

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{machines, routes};
use crate::cli::{
    list::Row,
    order::Order,
    values::{DiskArg, TapArg, TmpfsArg},
};

fn document() -> Value {
    yaml_serde::from_str(include_str!("../../resources/serve.yaml")).unwrap()
}

fn fields(document: &Value, schema: &str) -> BTreeSet<String> {
    let schema = &document["components"]["schemas"][schema]["properties"];
    schema.as_object().unwrap_or_else(|| panic!("{schema} has no properties")).keys().cloned().collect()
}

/// The fields that serde lists when it refuses another one.
fn known<T: DeserializeOwned>() -> BTreeSet<String> {
    let Err(refusal) = serde_json::from_value::<T>(json!({ "no_such_field": 1 })) else {
        panic!("an unknown field is taken")
    };
    let refusal = refusal.to_string();
    let (_, list) = refusal.split_once("expected").unwrap();
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn the_paths_and_methods_are_those_of_the_table() {
    let document = document();
    let mut described = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let method = match method.as_str() {
                "parameters" => continue,
                "x-any-method" => "*".to_owned(),
                method => method.to_uppercase(),
            };
            assert!(operation["summary"].is_string(), "{method} {path}");
            assert!(operation["responses"]["default"].is_object(), "{method} {path}");
            described.insert((method, path.clone()));
        }
    }
    let served =
        routes::TABLE.iter().map(|(method, path)| ((*method).to_owned(), (*path).to_owned())).collect();
    assert_eq!(described, served);
}

#[test]
fn the_bodies_have_the_fields_that_are_read() {
    let document = document();
    assert_eq!(fields(&document, "Order"), known::<Order>());
    assert_eq!(fields(&document, "DiskArg"), known::<DiskArg>());
    assert_eq!(fields(&document, "TapArg"), known::<TapArg>());
    assert_eq!(fields(&document, "TmpfsArg"), known::<TmpfsArg>());
    assert_eq!(fields(&document, "Stop"), known::<machines::Stop>());
    assert_eq!(fields(&document, "Kill"), known::<machines::Kill>());
}

#[test]
fn the_defaults_are_what_is_filled_in() {
    let document = document();
    let filled = serde_json::to_value(Order::default()).unwrap();
    for (name, property) in document["components"]["schemas"]["Order"]["properties"].as_object().unwrap() {
        match property.get("default") {
            Some(default) => assert_eq!(&filled[name], default, "{name}"),
            None => assert!(property["nullable"] == true && filled[name].is_null(), "{name}"),
        }
    }
}

#[test]
fn the_examples_are_orders_that_can_be_carried_out() {
    let document = document();
    let content = &document["paths"]["/machines"]["post"]["requestBody"]["content"]["application/json"];
    for (name, example) in content["examples"].as_object().unwrap() {
        let order: Order = serde_json::from_value(example["value"].clone()).unwrap();
        order.check().unwrap_or_else(|failure| panic!("{name}: {failure}"));
    }
}

#[test]
fn a_row_has_the_fields_that_are_described() {
    let document = document();
    let described = fields(&document, "Row");
    let row = json!({
        "id": "a", "name": "a", "image": "a", "command": [], "created": "", "started": null, "finished": null,
        "status": "dead", "exit_code": null, "reason": null, "pid": null, "cpus": 1, "memory_mib": 1,
    });
    let row: Row = serde_json::from_value(row).unwrap();
    let written = serde_json::to_value(row).unwrap();
    assert_eq!(written.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>(), described);
}
