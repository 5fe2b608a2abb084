//! A JSON object, read field by field: every field has one type and one range, and none is left over.

use serde_json::{Map, Value};

use super::errors::ApiError;

/// The fields of an object that have not been read yet.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a body, which must be UTF-8 and one JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|error| {
            ApiError::request(format!("body: expected UTF-8, got an invalid byte at {}", error.valid_up_to()))
        })?;
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(other) => Err(ApiError::field("body", "a JSON object", kind(&other))),
            Err(error) => Err(ApiError::request(format!("body: expected JSON, got an error: {error}"))),
        }
    }

    /// The fields of a body in another API's words, translated.
    pub fn from(map: Map<String, Value>) -> Self {
        Self(map)
    }

    /// The fields of an object inside the body.
    pub fn of(name: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self(map)),
            other => Err(ApiError::field(name, "an object", kind(&other))),
        }
    }

    /// A field of any type; null is the same as nothing.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        // The order of what is left does not matter.
        self.0.swap_remove(name).filter(|value| !value.is_null())
    }

    /// A string.
    pub fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ApiError::field(name, "a string", kind(&other))),
        }
    }

    /// A boolean.
    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(ApiError::field(name, "true or false", kind(&other))),
        }
    }

    /// A number from `low` to `high`.
    pub fn number(&mut self, name: &str, low: f64, high: f64) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if (low..=high).contains(&number) => Ok(Some(number as f32)),
            _ => Err(ApiError::field(name, &format!("a number from {low} to {high}"), &shown(&value))),
        }
    }

    /// A whole number from `low` to `high`.
    pub fn integer(&mut self, name: &str, low: i64, high: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_i64() {
            Some(number) if (low..=high).contains(&number) => Ok(Some(number)),
            _ => Err(ApiError::field(name, &format!("a whole number from {low} to {high}"), &shown(&value))),
        }
    }

    /// What is left, as it came.
    pub fn rest(self) -> Value {
        Value::Object(self.0)
    }

    /// Every field must have been read, but for those that clients send and that change nothing here.
    pub fn finish(self, ignored: &[&str]) -> Result<(), ApiError> {
        match self.0.keys().find(|name| !ignored.contains(&name.as_str())) {
            Some(name) => Err(ApiError::unknown(name)),
            None => Ok(()),
        }
    }
}

/// A value's type, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A number itself, anything else by its type.
fn shown(value: &Value) -> String {
    if value.is_number() { value.to_string() } else { kind(value).to_owned() }
}
