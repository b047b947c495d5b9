//! The API's description, made from the table of routes and the types that are spoken.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::ApiError;
use crate::api::{PROTOCOL_VERSION, ROUTES, Role};

/// An OpenAPI 3.1 document.
pub fn openapi() -> Value {
    let mut generator = SchemaSettings::draft2020_12()
        .with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        })
        .into_generator();
    let mut paths: Map<String, Value> = Map::new();
    let error = generator.subschema_for::<ApiError>();
    for route in ROUTES {
        let mut answer = json!({ "description": "Done" });
        if let Some(make) = route.reply {
            answer["content"] = json!({ route.reply_type: { "schema": make(&mut generator) } });
        } else if route.method == "GET" {
            answer["content"] = json!({ route.reply_type: {} });
        }
        let mut operation = json!({
            "operationId": route.name,
            "summary": route.summary,
            "description": route.role.describe(),
            "responses": {
                "200": answer,
                "default": {
                    "description": "Refused: a code for programs and a sentence for people",
                    "content": { "application/json": { "schema": {
                        "type": "object",
                        "properties": { "error": error },
                        "required": ["error"],
                    } } },
                },
            },
        });
        if route.role == Role::Provider {
            operation["x-role"] = json!("provider");
        }
        if let Some(make) = route.body {
            operation["requestBody"] = json!({
                "required": true,
                "content": { "application/json": { "schema": make(&mut generator) } },
            });
        }
        let parameters: Vec<Value> = route
            .path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
            .collect();
        let parameters: Vec<Value> = parameters
            .into_iter()
            .chain(route.query.iter().map(|(name, meaning)| {
                json!({ "name": name, "in": "query", "description": meaning, "schema": { "type": "string" } })
            }))
            .collect();
        if !parameters.is_empty() {
            operation["parameters"] = Value::Array(parameters);
        }
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.to_lowercase()] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "NetKernel control API",
            "version": PROTOCOL_VERSION.to_string(),
            "description": "HTTP/1.1 on the engine's Unix socket, and over TLS where the configuration says so. Who asks is told by the kernel \
                (SO_PEERCRED, control group, network namespace), or by a token (Authorization: Bearer), over TLS by nothing else: \
                the provider is the engine's user and root; tenants see and end their own guests, users without a tenant those that they made. Try: \
                curl --unix-socket /run/netkernel/engine.sock http://netkernel/v1/status",
            "license": { "name": "MIT OR Apache-2.0" },
        },
        "paths": paths,
        "components": { "schemas": generator.take_definitions(true) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");

    /// `NETKERNEL_WRITE_OPENAPI=1 cargo test -p netkernel-control openapi` writes the file anew.
    #[test]
    fn the_document_in_docs_is_what_is_served() {
        let text = serde_json::to_string_pretty(&openapi()).unwrap() + "\n";
        if std::env::var_os("NETKERNEL_WRITE_OPENAPI").is_some() {
            std::fs::write(FILE, &text).unwrap();
        }
        let file = std::fs::read_to_string(FILE).unwrap_or_default();
        assert!(
            file == text,
            "docs/openapi.json is stale: NETKERNEL_WRITE_OPENAPI=1 cargo test -p netkernel-control openapi"
        );
    }

    #[test]
    fn every_reference_has_its_definition() {
        let document = openapi();
        let mut stack = vec![&document];
        let mut references = 0;
        while let Some(value) = stack.pop() {
            match value {
                Value::Object(map) => {
                    if let Some(Value::String(reference)) = map.get("$ref") {
                        references += 1;
                        let pointer = reference.strip_prefix('#').expect("a local reference");
                        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
                    }
                    stack.extend(map.values());
                }
                Value::Array(list) => stack.extend(list),
                _ => {}
            }
        }
        assert!(references > 5);
        for path in document["paths"].as_object().unwrap().values() {
            for operation in path.as_object().unwrap().values() {
                assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()));
            }
        }
    }
}
