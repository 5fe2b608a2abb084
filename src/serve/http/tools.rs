//! Tools in requests: the functions, the choice among them, and the calls of earlier turns.

use serde_json::{Map, Value, json};

use super::errors::ApiError;
use super::fields::{Fields, kind};
use crate::serve::calls::{Choice, Tool, Tools};

/// Most tools.
const MAX_TOOLS: usize = 256;
/// Longest name of a function, in bytes.
const MAX_NAME: usize = 128;

/// What the model is told of the functions, and what its answer is held to; none where it may not call.
pub(super) fn tools(fields: &mut Fields) -> Result<Option<(Value, Tools)>, ApiError> {
    let given = match fields.take("tools") {
        None => Vec::new(),
        Some(Value::Array(tools)) if tools.len() <= MAX_TOOLS => tools,
        Some(Value::Array(tools)) => {
            return Err(ApiError::field("tools", &format!("at most {MAX_TOOLS}"), &tools.len().to_string()));
        }
        Some(other) => return Err(ApiError::field("tools", "an array", kind(&other))),
    };
    let choice = choice(fields.take("tool_choice"))?;
    let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    let (mut shown, mut list) = (Vec::new(), Vec::<Tool>::new());
    for (index, value) in given.into_iter().enumerate() {
        let name = format!("tools[{index}]");
        let (value, tool) = tool(&name, value)?;
        if list.iter().any(|other| other.name == tool.name) {
            return Err(ApiError::field(
                &format!("{name}.function.name"),
                "one of its own",
                &format!("{:?}", tool.name),
            ));
        }
        shown.push(value);
        list.push(tool);
    }
    match &choice {
        Some(Choice::Named(name)) if !list.iter().any(|tool| tool.name == *name) => {
            let got: String = name.chars().take(MAX_NAME).collect();
            Err(ApiError::field("tool_choice", "the name of one of `tools`", &format!("{got:?}")))
        }
        Some(Choice::Required) if list.is_empty() => {
            Err(ApiError::field("tool_choice", "`tools` with \"required\"", "none"))
        }
        Some(choice) if !list.is_empty() => {
            let choice = choice.clone();
            Ok(Some((Value::Array(shown), Tools { list, choice, parallel })))
        }
        _ => Ok(None),
    }
}

/// None: the model may not call.
fn choice(value: Option<Value>) -> Result<Option<Choice>, ApiError> {
    let wrong = |got: &str| {
        ApiError::field("tool_choice", "\"none\", \"auto\", \"required\" or a function {type, function: {name}}", got)
    };
    match value {
        None => Ok(Some(Choice::Auto)),
        Some(Value::String(choice)) => match choice.as_str() {
            "none" => Ok(None),
            "auto" => Ok(Some(Choice::Auto)),
            "required" => Ok(Some(Choice::Required)),
            _ => Err(wrong("another string")),
        },
        Some(value) => match (value["type"].as_str(), value["function"]["name"].as_str()) {
            (Some("function"), Some(name)) => Ok(Some(Choice::Named(name.to_owned()))),
            _ => Err(wrong(kind(&value))),
        },
    }
}

/// A function as the template gets it, and as the answer is held to it.
fn tool(name: &str, value: Value) -> Result<(Value, Tool), ApiError> {
    let mut fields = Fields::of(name, value)?;
    match fields.string("type")?.as_deref() {
        Some("function") => {}
        other => {
            let got =
                other.map_or("nothing".to_owned(), |other| format!("{:?}", other.chars().take(40).collect::<String>()));
            return Err(ApiError::field(&format!("{name}.type"), "\"function\"", &got));
        }
    }
    let function = format!("{name}.function");
    let Some(Value::Object(mut shown)) = fields.take("function") else {
        return Err(ApiError::field(&function, "an object", "nothing or another"));
    };
    fields.finish(&[])?;
    // Arguments follow their schema wherever the answer is held to calls; the model need not be told.
    shown.swap_remove("strict");
    shown.retain(|_, value| !value.is_null());
    let called = match shown.get("name") {
        Some(Value::String(name)) if is_name(name) => name.clone(),
        other => {
            let expected = format!("1 to {MAX_NAME} bytes without quotes, backslashes and control characters");
            let got = other.map_or("nothing", |other| if other.is_string() { "another string" } else { kind(other) });
            return Err(ApiError::field(&format!("{function}.name"), &expected, got));
        }
    };
    let parameters = object(&format!("{function}.parameters"), shown.get("parameters"))?;
    Ok((json!({"type": "function", "function": shown}), Tool { name: called, parameters }))
}

fn is_name(name: &str) -> bool {
    let odd = |letter: char| letter == '"' || letter == '\\' || letter.is_control();
    (1..=MAX_NAME).contains(&name.len()) && !name.contains(odd)
}

/// The schema of arguments, which are always an object.
fn object(name: &str, schema: Option<&Value>) -> Result<Value, ApiError> {
    let mut schema = match schema {
        None => Map::new(),
        Some(Value::Object(schema)) => schema.clone(),
        Some(other) => return Err(ApiError::field(name, "a JSON schema, an object", kind(other))),
    };
    match schema.get("type") {
        None => drop(schema.insert("type".to_owned(), "object".into())),
        Some(Value::String(kind)) if kind == "object" => {}
        Some(_) => return Err(ApiError::field(&format!("{name}.type"), "\"object\"", "another")),
    }
    Ok(Value::Object(schema))
}

/// The calls of an earlier turn, with arguments as templates want them: JSON, not its text.
pub(super) fn calls(name: &str, value: Value) -> Result<Value, ApiError> {
    let Value::Array(mut calls) = value else {
        return Err(ApiError::field(name, "an array", kind(&value)));
    };
    for (index, call) in calls.iter_mut().enumerate() {
        let place = format!("{name}[{index}].function");
        let Some(Value::Object(function)) = call.get_mut("function") else {
            return Err(ApiError::field(&place, "an object", "nothing or another"));
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(ApiError::field(&format!("{place}.name"), "a string", "nothing or another"));
        }
        let arguments = match function.get("arguments") {
            None | Some(Value::Null) => json!({}),
            Some(Value::String(text)) if text.trim().is_empty() => json!({}),
            Some(Value::String(text)) => serde_json::from_str(text).unwrap_or(Value::Null),
            Some(other) => other.clone(),
        };
        if !arguments.is_object() {
            return Err(ApiError::field(&format!("{place}.arguments"), "a JSON object, or the text of one", "another"));
        }
        function.insert("arguments".to_owned(), arguments);
    }
    Ok(Value::Array(calls))
}
