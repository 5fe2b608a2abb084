//! What rows mean: the schemas that datasets come in, recognised by their columns.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde_json::{Map, Value, json};

use super::read::kind;
use crate::error::Error;

/// A layout of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schema {
    /// `messages` (OpenAI's chat format), with `tools` beside them.
    Messages,
    /// `conversations` of `from` and `value`.
    ShareGpt,
    /// `instruction`, `input`, `output`.
    Alpaca,
    /// `prompt` and `completion`, as text or as messages.
    PromptCompletion,
    /// `prompt`, `completion` and `label`: whether the completion is wanted.
    Labelled,
    /// `text`, trained on as it is.
    Text,
    /// `prompt`, `chosen`, `rejected`, as text or as messages.
    Preference,
    /// `prompt`, `label` and `rationale`: an answer, and why it is the right one.
    Explained,
    /// The same in the words of OpenAI's fine-tuning: `input`, `preferred_output`, `non_preferred_output`.
    PreferredOutput,
}

/// What a row says.
#[derive(Clone, Debug, PartialEq)]
pub enum Example {
    /// A conversation; the answers are trained on. `prompt` messages at its beginning are not, even where they are answers.
    Conversation {
        /// OpenAI-style messages.
        messages: Vec<Value>,
        /// How many of them belong to the prompt.
        prompt: usize,
        /// Functions that the model may call.
        tools: Option<Value>,
    },
    /// A text and its continuation, for models without a chat template.
    Completion {
        /// Not trained on.
        prompt: String,
        /// Trained on.
        completion: String,
    },
    /// A text, all of which is trained on.
    Text(String),
    /// An example whose answer is wanted, or is not.
    Labelled {
        /// A conversation or a completion.
        answer: Box<Example>,
        /// Whether it is wanted.
        wanted: bool,
    },
    /// Two conversations that begin alike; the first is preferred.
    Preference {
        /// The better one.
        chosen: Vec<Value>,
        /// The worse one.
        rejected: Vec<Value>,
        /// Functions that the model may call.
        tools: Option<Value>,
    },
    /// Questions about one thing, each a task of its own.
    Tasks(Vec<Example>),
}

/// Before a question whose answer is the label.
const PREDICT: &str = "predict: ";
/// Before a question whose answer is the rationale.
const EXPLAIN: &str = "explain: ";

/// Our column → the data's name for it.
pub type Mapping = BTreeMap<String, String>;

type Columns = Map<String, Value>;

impl Schema {
    /// Every schema, with its name and the columns that it needs.
    pub const ALL: [(Self, &'static str, &'static [&'static str]); 9] = [
        (Self::PreferredOutput, "preferred_output", &["input", "preferred_output", "non_preferred_output"]),
        (Self::Preference, "preference", &["chosen", "rejected"]),
        (Self::Explained, "explained", &["prompt", "label", "rationale"]),
        (Self::Messages, "messages", &["messages"]),
        (Self::ShareGpt, "sharegpt", &["conversations"]),
        (Self::Alpaca, "alpaca", &["instruction", "output"]),
        (Self::Labelled, "labelled", &["prompt", "completion", "label"]),
        (Self::PromptCompletion, "prompt_completion", &["prompt", "completion"]),
        (Self::Text, "text", &["text"]),
    ];

    /// The schema of a row by its columns.
    ///
    /// # Errors
    /// Names what was expected and the columns that are there.
    pub fn recognise(columns: &Columns) -> Result<Self, String> {
        let has = |names: &[&str]| names.iter().all(|name| columns.contains_key(*name));
        // a completion beside a label and a rationale is the answer; other labels, of a classification for instance, say nothing of whether the answer is wanted
        let says = |schema: Self| match schema {
            Self::Labelled => columns["label"].is_boolean(),
            Self::Explained => !columns.contains_key("completion"),
            _ => true,
        };
        Self::ALL
            .iter()
            .find(|(schema, _, names)| has(names) && says(*schema))
            .map(|(schema, _, _)| *schema)
            .ok_or_else(|| {
                let known: Vec<String> = Self::ALL.iter().map(|(_, _, names)| names.join("+")).collect();
                let there: Vec<&str> = columns.keys().map(String::as_str).take(12).collect();
                format!("expected the columns of a schema ({}), got {}", known.join(", "), listed(&there))
            })
    }

    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(schema, _, _)| *schema == self).map_or("", |(_, name, _)| name)
    }

    /// What a row says.
    ///
    /// # Errors
    /// What was expected, and what is there.
    pub fn read(self, columns: &Columns, mapping: &Mapping) -> Result<Example, String> {
        let words = Words::of(mapping);
        let tools = tools(columns.get("tools"))?;
        match self {
            Self::PreferredOutput => Self::Preference.read(&preferred_output(columns)?, mapping),
            Self::Messages => {
                conversation(messages(required(columns, "messages")?, "messages", &words)?, 0, tools, columns)
            }
            Self::ShareGpt => {
                conversation(messages(required(columns, "conversations")?, "conversations", &words)?, 0, tools, columns)
            }
            Self::Alpaca => {
                let instruction = text(columns, "instruction")?;
                let input = optional_text(columns, "input")?.filter(|input| !input.trim().is_empty());
                let mut turns = history(columns)?;
                turns.push(message(
                    "user",
                    &input.map_or(instruction.clone(), |input| format!("{instruction}\n\n{input}")),
                ));
                let prompt = turns.len();
                turns.push(message("assistant", &text(columns, "output")?));
                conversation(turns, prompt, tools, columns)
            }
            Self::PromptCompletion => match (required(columns, "prompt")?, required(columns, "completion")?) {
                (Value::String(prompt), Value::String(completion)) => {
                    Ok(Example::Completion { prompt: prompt.clone(), completion: completion.clone() })
                }
                (prompt, completion) => {
                    let mut turns = turns(prompt, "prompt", "user", &words)?;
                    let count = turns.len();
                    turns.extend(self::turns(completion, "completion", "assistant", &words)?);
                    conversation(turns, count, tools, columns)
                }
            },
            Self::Labelled => {
                let wanted = match required(columns, "label")? {
                    Value::Bool(wanted) => *wanted,
                    other => return Err(format!("label: expected true or false, got {}", kind(other))),
                };
                Ok(Example::Labelled { answer: Box::new(Self::PromptCompletion.read(columns, mapping)?), wanted })
            }
            Self::Text => Ok(Example::Text(text(columns, "text")?)),
            Self::Explained => {
                let label = match required(columns, "label")? {
                    Value::String(label) => label.clone(),
                    label @ (Value::Number(_) | Value::Bool(_)) => label.to_string(),
                    other => return Err(format!("label: expected text or a number, got {}", kind(other))),
                };
                let views = [(PREDICT, label), (EXPLAIN, text(columns, "rationale")?)];
                let views = views.map(|(task, answer)| match required(columns, "prompt")? {
                    Value::String(prompt) => {
                        Ok(Example::Completion { prompt: format!("{task}{prompt}"), completion: answer })
                    }
                    prompt => {
                        let mut turns = turns(prompt, "prompt", "user", &words)?;
                        ask(task, turns.last_mut())?;
                        let count = turns.len();
                        turns.push(message("assistant", &answer));
                        conversation(turns, count, tools.clone(), columns)
                    }
                });
                Ok(Example::Tasks(views.into_iter().collect::<Result<_, String>>()?))
            }
            Self::Preference => {
                let prompt = match columns.get("prompt") {
                    None | Some(Value::Null) => Vec::new(),
                    Some(prompt) => with_system(turns(prompt, "prompt", "user", &words)?, columns)?,
                };
                let whole = |name: &str| -> Result<Vec<Value>, String> {
                    let answer = turns(required(columns, name)?, name, "assistant", &words)?;
                    // some sets repeat the prompt in both answers
                    let repeats = !prompt.is_empty() && answer.starts_with(&prompt);
                    let whole = if repeats { answer } else { [prompt.clone(), answer].concat() };
                    match whole.as_slice() {
                        [_, .., last] if last["role"] == "assistant" => Ok(whole),
                        _ => Err(format!("{name}: expected a question and an answer, got {} messages", whole.len())),
                    }
                };
                Ok(Example::Preference { chosen: whole("chosen")?, rejected: whole("rejected")?, tools })
            }
        }
    }
}

impl FromStr for Schema {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.iter().find(|(_, known, _)| *known == name).map(|(schema, _, _)| *schema).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|(schema, _, _)| schema.name()).collect();
            Error::input(format!("schema: expected auto or one of {}, got {name:?}", known.join(", ")))
        })
    }
}

/// Gives the columns their names in ours, by the mapping.
pub fn renamed(mut columns: Columns, mapping: &Mapping) -> Columns {
    for (ours, theirs) in mapping {
        if let Some(value) = columns.shift_remove(theirs) {
            columns.insert(ours.clone(), value);
        }
    }
    columns
}

/// OpenAI's columns of a preference in ours.
fn preferred_output(columns: &Columns) -> Result<Columns, String> {
    let Value::Object(input) = required(columns, "input")? else {
        return Err(format!("input: expected an object with messages, got {}", kind(&columns["input"])));
    };
    let mut ours = Columns::new();
    ours.insert("prompt".to_owned(), required(input, "messages")?.clone());
    ours.insert("chosen".to_owned(), required(columns, "preferred_output")?.clone());
    ours.insert("rejected".to_owned(), required(columns, "non_preferred_output")?.clone());
    if let Some(tools) = input.get("tools") {
        ours.insert("tools".to_owned(), tools.clone());
    }
    Ok(ours)
}

/// The names of a message's fields in the data.
struct Words<'a> {
    role: [&'a str; 2],
    content: [&'a str; 2],
}

impl<'a> Words<'a> {
    fn of(mapping: &'a Mapping) -> Self {
        let named = |ours: &str, other: &'a str| mapping.get(ours).map_or(other, String::as_str);
        Self { role: [named("role", "role"), "from"], content: [named("content", "content"), "value"] }
    }
}

/// Puts a word before a question, which must be the last message.
fn ask(word: &str, question: Option<&mut Value>) -> Result<(), String> {
    match question {
        Some(question) if question["role"] == "user" => {
            question["content"] = Value::String(format!("{word}{}", question["content"].as_str().unwrap_or_default()));
            Ok(())
        }
        other => Err(format!(
            "prompt: expected the user's words at its end, got those of {}",
            other.map_or(&Value::Null, |other| &other["role"])
        )),
    }
}

fn conversation(turns: Vec<Value>, prompt: usize, tools: Option<Value>, columns: &Columns) -> Result<Example, String> {
    let before = turns.len();
    let messages = with_system(turns, columns)?;
    let prompt = if prompt == 0 { 0 } else { prompt + messages.len() - before };
    Ok(Example::Conversation { messages, prompt, tools })
}

/// Puts the row's `system` column, where it has one, before the turns.
fn with_system(mut turns: Vec<Value>, columns: &Columns) -> Result<Vec<Value>, String> {
    let system = optional_text(columns, "system")?.filter(|system| !system.trim().is_empty());
    if let Some(system) = system
        && turns.first().is_none_or(|first| first["role"] != "system")
    {
        turns.insert(0, message("system", &system));
    }
    Ok(turns)
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// Messages, or a text as the only message of `role`.
fn turns(value: &Value, name: &str, role: &str, words: &Words<'_>) -> Result<Vec<Value>, String> {
    match value {
        Value::String(content) => Ok(vec![message(role, content)]),
        Value::Array(_) => messages(value, name, words),
        other => Err(format!("{name}: expected text or messages, got {}", kind(other))),
    }
}

fn messages(value: &Value, name: &str, words: &Words<'_>) -> Result<Vec<Value>, String> {
    let Value::Array(items) = value else {
        return Err(format!("{name}: expected a list of messages, got {}", kind(value)));
    };
    if items.is_empty() {
        return Err(format!("{name}: expected at least one message, got an empty list"));
    }
    items.iter().enumerate().map(|(index, item)| one(item, &format!("{name}[{index}]"), words)).collect()
}

/// A message in OpenAI's words: role, content as text, arguments of tool calls as objects.
fn one(item: &Value, name: &str, words: &Words<'_>) -> Result<Value, String> {
    let Value::Object(fields) = item else {
        return Err(format!("{name}: expected an object with role and content, got {}", kind(item)));
    };
    let field =
        |names: &[&'_ str; 2]| names.iter().find_map(|name| fields.get(*name).map(|value| ((*name).to_owned(), value)));
    let (role_name, role) = match field(&words.role) {
        Some((name, Value::String(role))) => (name, role),
        Some((field, other)) => return Err(format!("{name}.{field}: expected text, got {}", kind(other))),
        None => return Err(format!("{name}: expected a role, got {}", listed_keys(fields))),
    };
    let mut out = Columns::new();
    out.insert("role".to_owned(), Value::String(role_of(role).to_owned()));
    let calls = tool_calls(fields.get("tool_calls"), name)?;
    let content_name = match field(&words.content) {
        Some((field, Value::Null)) if calls.is_some() => field,
        Some((field, value)) => {
            out.insert("content".to_owned(), Value::String(content(value, &format!("{name}.{field}"))?));
            field
        }
        None if calls.is_some() => "content".to_owned(),
        None => return Err(format!("{name}: expected content, got {}", listed_keys(fields))),
    };
    if let Some(calls) = calls {
        out.entry("content").or_insert_with(|| Value::String(String::new()));
        out.insert("tool_calls".to_owned(), calls);
    }
    for (key, value) in fields {
        if *key != role_name && *key != content_name && key != "tool_calls" && !value.is_null() {
            out.insert(key.clone(), value.clone());
        }
    }
    Ok(Value::Object(out))
}

/// The role by its usual name, for the names that datasets use.
fn role_of(role: &str) -> &str {
    match role {
        "human" | "User" => "user",
        "gpt" | "bot" | "model" | "ai" | "chatgpt" | "Assistant" => "assistant",
        "function" | "observation" | "ipython" | "tool_response" => "tool",
        "System" => "system",
        other => other,
    }
}

/// Text, or the text parts of a list of parts.
fn content(value: &Value, name: &str) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(text)) => Ok(text),
                (Some(other), _) => Err(format!("{name}: expected parts of type text, got {other:?}")),
                (None, _) => Err(format!("{name}: expected parts with a type, got {}", kind(part))),
            })
            .collect(),
        other => Err(format!("{name}: expected text, got {}", kind(other))),
    }
}

/// Tool calls, with arguments that are JSON as text turned into objects: templates write them as they need.
fn tool_calls(value: Option<&Value>, name: &str) -> Result<Option<Value>, String> {
    let calls = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(calls)) if calls.is_empty() => return Ok(None),
        Some(Value::Array(calls)) => calls,
        Some(other) => return Err(format!("{name}.tool_calls: expected a list, got {}", kind(other))),
    };
    let mut calls = calls.clone();
    for (index, call) in calls.iter_mut().enumerate() {
        let place = format!("{name}.tool_calls[{index}]");
        let Value::Object(fields) = call else {
            return Err(format!("{place}: expected an object, got {}", kind(call)));
        };
        let function = match fields.get_mut("function") {
            Some(Value::Object(function)) => function,
            Some(other) => return Err(format!("{place}.function: expected an object, got {}", kind(other))),
            None => fields,
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(format!("{place}: expected a function's name, got {}", listed_keys(function)));
        }
        if let Some(Value::String(arguments)) = function.get("arguments") {
            let parsed: Value = serde_json::from_str(arguments)
                .map_err(|error| format!("{place}.arguments: expected JSON, got {error}"))?;
            function.insert("arguments".to_owned(), parsed);
        }
    }
    Ok(Some(Value::Array(calls)))
}

fn tools(value: Option<&Value>) -> Result<Option<Value>, String> {
    let parsed = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => {
            serde_json::from_str(text).map_err(|error| format!("tools: expected JSON, got {error}"))?
        }
        Some(value) => value.clone(),
    };
    match parsed {
        Value::Array(items) if items.is_empty() => Ok(None),
        Value::Array(items) if items.iter().all(Value::is_object) => Ok(Some(Value::Array(items))),
        other => Err(format!("tools: expected a list of objects, got {}", kind(&other))),
    }
}

/// Alpaca's `history`: pairs of question and answer before the instruction.
fn history(columns: &Columns) -> Result<Vec<Value>, String> {
    let pairs = match columns.get("history") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(pairs)) => pairs,
        Some(other) => return Err(format!("history: expected a list of pairs, got {}", kind(other))),
    };
    let mut turns = Vec::new();
    for (index, pair) in pairs.iter().enumerate() {
        match pair.as_array().map(Vec::as_slice) {
            Some([Value::String(question), Value::String(answer)]) => {
                turns.extend([message("user", question), message("assistant", answer)]);
            }
            _ => return Err(format!("history[{index}]: expected a pair of texts, got {}", kind(pair))),
        }
    }
    Ok(turns)
}

fn required<'a>(columns: &'a Columns, name: &str) -> Result<&'a Value, String> {
    match columns.get(name) {
        Some(Value::Null) => Err(format!("{name}: expected a value, got null")),
        Some(value) => Ok(value),
        None => Err(format!("expected a column {name}, got {}", listed_keys(columns))),
    }
}

fn text(columns: &Columns, name: &str) -> Result<String, String> {
    match required(columns, name)? {
        Value::String(text) => Ok(text.clone()),
        other => Err(format!("{name}: expected text, got {}", kind(other))),
    }
}

fn optional_text(columns: &Columns, name: &str) -> Result<Option<String>, String> {
    match columns.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => text(columns, name).map(Some),
    }
}

fn listed_keys(fields: &Columns) -> String {
    listed(&fields.keys().map(String::as_str).take(12).collect::<Vec<_>>())
}

fn listed(names: &[&str]) -> String {
    if names.is_empty() { "no columns".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(row: Value) -> Result<Example, String> {
        let Value::Object(columns) = row else { return Err("no object".to_owned()) };
        Schema::recognise(&columns)?.read(&columns, &Mapping::new())
    }

    fn talk(turns: &[(&str, &str)]) -> Vec<Value> {
        turns.iter().map(|(role, content)| message(role, content)).collect()
    }

    #[test]
    fn the_same_talk_in_every_schema() {
        let expected = talk(&[("system", "s"), ("user", "q"), ("assistant", "a")]);
        for row in [
            json!({"messages": expected}),
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}], "system": "s"}),
            json!({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}),
            json!({"instruction": "q", "input": "", "output": "a", "system": "s"}),
            json!({"prompt": talk(&[("system", "s"), ("user", "q")]), "completion": talk(&[("assistant", "a")])}),
        ] {
            match read(row.clone()) {
                Ok(Example::Conversation { messages, .. }) => assert_eq!(messages, expected, "{row}"),
                other => panic!("{row}: {other:?}"),
            }
        }
    }

    #[test]
    fn alpaca_joins_instruction_and_input() {
        let row = json!({"instruction": "Sum.", "input": "1 2", "output": "3", "history": [["a", "b"]]});
        let Ok(Example::Conversation { messages, prompt, .. }) = read(row) else { panic!() };
        let expected = talk(&[("user", "a"), ("assistant", "b"), ("user", "Sum.\n\n1 2"), ("assistant", "3")]);
        assert_eq!((messages, prompt), (expected, 3));
    }

    #[test]
    fn preferences_share_their_prompt() {
        let chosen = talk(&[("user", "q"), ("assistant", "a")]);
        let rejected = talk(&[("user", "q"), ("assistant", "b")]);
        for row in [
            json!({"prompt": "q", "chosen": "a", "rejected": "b"}),
            json!({"prompt": [{"role": "user", "content": "q"}], "chosen": [chosen[1]], "rejected": [rejected[1]]}),
            json!({"chosen": chosen, "rejected": rejected}),
            json!({"prompt": "q", "chosen": chosen, "rejected": rejected}),
        ] {
            let expected = Example::Preference { chosen: chosen.clone(), rejected: rejected.clone(), tools: None };
            assert_eq!(read(row), Ok(expected));
        }
    }

    #[test]
    fn a_label_says_whether_an_answer_is_wanted() {
        for wanted in [true, false] {
            let answer = Example::Completion { prompt: "q".to_owned(), completion: "a".to_owned() };
            let row = json!({"prompt": "q", "completion": "a", "label": wanted});
            assert_eq!(read(row), Ok(Example::Labelled { answer: Box::new(answer), wanted }));
        }
        let classified = json!({"prompt": "q", "completion": "a", "label": "positive"});
        assert!(matches!(read(classified), Ok(Example::Completion { .. })));
    }

    #[test]
    fn an_explained_answer_is_two_tasks() {
        let view = |prompt: &str, completion: &str| Example::Completion {
            prompt: prompt.to_owned(),
            completion: completion.to_owned(),
        };
        for (label, said) in [(json!("yes"), "yes"), (json!(3), "3"), (json!(true), "true")] {
            let row = json!({"prompt": "q", "label": label, "rationale": "r"});
            assert_eq!(read(row), Ok(Example::Tasks(vec![view("predict: q", said), view("explain: q", "r")])));
        }
        let row = json!({"prompt": talk(&[("user", "a"), ("assistant", "b"), ("user", "q")]), "label": "l", "rationale": "r"});
        let Ok(Example::Tasks(views)) = read(row) else { panic!() };
        let expected = talk(&[("user", "a"), ("assistant", "b"), ("user", "explain: q"), ("assistant", "r")]);
        assert_eq!(views[1], Example::Conversation { messages: expected, prompt: 3, tools: None });
        let row = json!({"prompt": talk(&[("assistant", "b")]), "label": "l", "rationale": "r"});
        assert_eq!(
            read(row),
            Err("prompt: expected the user's words at its end, got those of \"assistant\"".to_owned())
        );
    }

    #[test]
    fn arguments_that_are_text_become_objects() {
        let call = |arguments: Value| json!([{"type": "function", "function": {"name": "f", "arguments": arguments}}]);
        let row = json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null, "tool_calls": call(json!("{\"x\": 1}"))}], "tools": "[{\"type\": \"function\"}]"});
        let Ok(Example::Conversation { messages, tools, .. }) = read(row) else { panic!() };
        assert_eq!(messages[1]["tool_calls"], call(json!({"x": 1})));
        assert_eq!(tools, Some(json!([{"type": "function"}])));
    }

    #[test]
    fn a_mapping_renames_columns_and_fields() {
        let mapping: Mapping = [("messages", "dialog"), ("role", "speaker"), ("content", "says")]
            .map(|(a, b)| (a.into(), b.into()))
            .into();
        let Value::Object(columns) = json!({"dialog": [{"speaker": "human", "says": "q"}]}) else { panic!() };
        let columns = renamed(columns, &mapping);
        let example = Schema::recognise(&columns).unwrap().read(&columns, &mapping);
        assert_eq!(example, Ok(Example::Conversation { messages: talk(&[("user", "q")]), prompt: 0, tools: None }));
    }

    #[test]
    fn preferences_in_openais_words_are_preferences() {
        let (asked, good) = (json!([{"role": "user", "content": "q"}]), json!([{"role": "assistant", "content": "a"}]));
        let bad = json!([{"role": "assistant", "content": "b"}]);
        let theirs = json!({"input": {"messages": asked}, "preferred_output": good, "non_preferred_output": bad});
        assert_eq!(read(theirs), read(json!({"prompt": asked, "chosen": good, "rejected": bad})));
        let wrong = json!({"input": "q", "preferred_output": good, "non_preferred_output": bad});
        assert_eq!(read(wrong), Err("input: expected an object with messages, got a string".to_owned()));
    }

    #[test]
    fn problems_say_where_and_what() {
        for (row, expected) in [
            (
                json!({"question": "?"}),
                "expected the columns of a schema (input+preferred_output+non_preferred_output, chosen+rejected, prompt+label+rationale, messages, conversations, instruction+output, prompt+completion+label, prompt+completion, text), got question",
            ),
            (json!({"messages": "hi"}), "messages: expected a list of messages, got a string"),
            (json!({"messages": []}), "messages: expected at least one message, got an empty list"),
            (json!({"messages": [{"content": "a"}]}), "messages[0]: expected a role, got content"),
            (json!({"messages": [{"role": "user", "content": 3}]}), "messages[0].content: expected text, got a number"),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
                "messages[0].content: expected parts of type text, got \"image\"",
            ),
            (json!({"text": null}), "text: expected a value, got null"),
        ] {
            assert_eq!(read(row), Err(expected.to_owned()));
        }
    }

    fn anything() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            prop::sample::select(vec!["user", "text", "assistant", "{\"a\": 1}", ""]).prop_map(Value::from),
        ];
        let key = prop::sample::select(vec![
            "role",
            "content",
            "from",
            "value",
            "type",
            "text",
            "tool_calls",
            "function",
            "name",
            "arguments",
        ]);
        leaf.prop_recursive(4, 32, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((key.clone(), inner), 0..4).prop_map(|fields| Value::Object(
                    fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
                )),
            ]
        })
    }

    proptest! {
        // Whatever the columns hold, the answer is an example or a problem that says what was expected.
        #[test]
        fn no_row_makes_it_panic(values in prop::collection::vec(anything(), 5), schema in 0_usize..8) {
            let (schema, _, names) = Schema::ALL[schema];
            let extra = ["tools", "system", "prompt", "history", "label"];
            let columns: Columns = names.iter().chain(&extra).map(|name| (*name).to_owned()).zip(values).collect();
            if let Err(problem) = schema.read(&columns, &Mapping::new()) {
                prop_assert!(problem.contains("expected"), "{problem}");
            }
        }
    }
}
