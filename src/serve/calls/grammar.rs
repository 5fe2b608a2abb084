//! The grammar of an answer that calls: names that exist, arguments that follow their schemas.

use std::fmt::Write as _;

use serde_json::Value;

use super::{Choice, Syntax, Tools};

/// Most calls of one answer.
const MOST: usize = 16;

/// The grammar in llguidance's variant of Lark. `marker` is the id of the syntax's marker where that is a special token,
/// `otherwise` the schema of an answer that doesn't call, where one may. `schema` prepares a schema for the parser.
pub fn grammar(
    syntax: Syntax,
    tools: &Tools,
    marker: Option<u32>,
    otherwise: Option<&Value>,
    schema: impl Fn(&Value) -> Value,
) -> String {
    let literal = |text: &str| Value::from(text).to_string();
    let marker = marker.map_or_else(|| literal(syntax.marker()), |id| format!("<[{id}]>"));
    let more = |one: &str| if tools.parallel { format!("({one}){{0,{}}}", MOST - 1) } else { String::new() };
    let calls = match syntax {
        Syntax::Hermes => {
            format!("one {}\none: {marker} \"\\n\" call \"\\n</tool_call>\"", more("\"\\n\" one"))
        }
        // its template knows single calls only
        Syntax::Llama => "call".to_owned(),
        Syntax::Mistral => format!("{marker} /( )?\\[/ call {} \"]\"", more("\", \" call")),
    };
    let mut text = match otherwise {
        Some(answer) => format!("start: answer | calls\nanswer: %json {}\ncalls: {calls}\n", schema(answer)),
        None => format!("start: {calls}\n"),
    };
    let wanted = |name: &str| if let Choice::Named(only) = &tools.choice { only == name } else { true };
    let wanted: Vec<_> = tools.list.iter().filter(|tool| wanted(&tool.name)).collect();
    let names: Vec<String> = (0..wanted.len()).map(|index| format!("call_{index}")).collect();
    let _ = writeln!(text, "call: {}", names.join(" | "));
    for (name, tool) in names.iter().zip(wanted) {
        let head = format!("{{\"name\": {}, \"{}\": ", literal(&tool.name), syntax.arguments());
        let _ = writeln!(text, "{name}: {} {name}_arguments \"}}\"", literal(&head));
        let _ = writeln!(text, "{name}_arguments: %json {}", schema(&tool.parameters));
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::{Piece, Reader, Tool};
    use super::*;
    use crate::serve::constraint::{Constraints, Format, prepared};
    use crate::serve::{Sampler, Sampling};
    use crate::text::tests::tokenizer;

    /// `<|im_start|>` of the tests' tokenizer, whose tokens are bytes but for three; the other two end an answer.
    const SPECIAL: u32 = 256;

    fn tools(choice: Choice, parallel: bool) -> Tools {
        let place = json!({
            "type": "object", "properties": {"place": {"enum": ["Ulm", "K\u{f6}ln \"}"]}, "days": {"type": "integer"}},
            "required": ["place"], "additionalProperties": false,
        });
        let none = json!({"type": "object", "properties": {}, "additionalProperties": false});
        let tool = |name: &str, parameters| Tool { name: name.to_owned(), parameters };
        Tools { list: vec![tool("weather \u{e9}", place), tool("now", none)], choice, parallel }
    }

    /// What a model of random logits answers under a grammar; none where it was cut off.
    fn answer(grammar: String, marker: &str, seed: u64) -> Option<String> {
        let constraint = Constraints::new(&tokenizer()).unwrap().constraint(&Format::Calls(grammar)).unwrap();
        let sampling = Sampling { seed: Some(seed), temperature: 1.5, ..Sampling::default() };
        let mut sampler = Sampler::new(sampling, &[], Some(constraint));
        let mut logits = vec![0.0; 259];
        for liked in [b'"', b'}', b']'] {
            logits[liked as usize] = 6.0;
        }
        logits[258] = 9.0;
        let mut bytes = Vec::new();
        for _ in 0..600 {
            match sampler.choose(&logits).unwrap().token {
                257 | 258 => return Some(String::from_utf8(bytes).unwrap()),
                SPECIAL => bytes.extend(marker.bytes()),
                token => bytes.push(u8::try_from(token).unwrap()),
            }
        }
        None
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the model says is read as calls of functions that exist, with arguments of their schemas.
        #[test]
        fn what_is_held_to_calls_is_read_as_calls(
            syntax in prop::sample::select(vec![Syntax::Hermes, Syntax::Llama, Syntax::Mistral]),
            special: bool, named: bool, parallel: bool, seed: u64,
        ) {
            let choice = if named { Choice::Named("weather \u{e9}".to_owned()) } else { Choice::Required };
            let tools = tools(choice, parallel);
            let text = grammar(syntax, &tools, special.then_some(SPECIAL), None, prepared);
            let Some(text) = answer(text, syntax.marker(), seed) else { return Ok(()) };
            let mut reader = Reader::new(syntax, &tools);
            let mut pieces = reader.push(&text);
            pieces.extend(reader.finish());
            prop_assert!(reader.calls() > 0 && (parallel || reader.calls() == 1), "{text}");
            let mut name = String::new();
            for piece in pieces {
                match piece {
                    Piece::Text(rest) => prop_assert!(false, "{rest:?} of {text:?}"),
                    Piece::Call { name: called, .. } => name = called,
                    Piece::Arguments { text, .. } => {
                        let arguments: Value = serde_json::from_str(&text).unwrap();
                        if name == "now" {
                            prop_assert!(!named && arguments == json!({}), "{text}");
                        } else {
                            prop_assert!(["Ulm", "K\u{f6}ln \"}"].contains(&arguments["place"].as_str().unwrap()), "{text}");
                            // -0 is an integer to JSON Schema and to Python, and a float to serde_json.
                            let whole = |days: &Value| days.as_f64().is_some_and(|days| days.fract() == 0.0);
                            prop_assert!(arguments.get("days").is_none_or(whole), "{text}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn an_answer_is_a_call_or_of_its_schema() {
        let schema = json!({"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3});
        let (mut called, mut answered) = (0, 0);
        for seed in 0..40 {
            let text = grammar(Syntax::Hermes, &tools(Choice::Auto, true), None, Some(&schema), prepared);
            let Some(text) = answer(text, "", seed) else { continue };
            match serde_json::from_str::<Vec<u8>>(&text) {
                Ok(_) => answered += 1,
                Err(_) => called += u32::from(text.starts_with("<tool_call>")),
            }
        }
        assert!(called > 0 && answered > 0, "{called} {answered}");
    }
}
