//! What an answer must look like: JSON of a schema, a regular expression, or a grammar.
//!
//! Before each token, all tokens that can't continue a valid answer are forbidden; where nothing can follow, only the
//! end is left. So an answer that isn't cut off is valid, whatever the model, the adapter and the temperature are. The
//! parsing is llguidance's; its limits of memory and time hold for every request.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory, token_bytes_from_tokenizer_json};
use serde_json::Value;

use crate::text::Tokenizer;
use crate::{Error, Result};

/// Longest expression or grammar, in bytes.
pub const MAX_BYTES: usize = 64 << 10;
/// White space between the parts of JSON: a space, or a new line and its indentation. Small models get lost in more.
const JSON_SPACE: &str = r"\x20|\n(\x20{0,24}|\t{0,8})";

/// A form that answers can be asked in.
#[derive(Clone, Debug, PartialEq)]
pub enum Format {
    /// JSON that is valid under this schema, an object.
    Json(Value),
    /// Text that this regular expression matches as a whole, in the syntax of Rust's `regex`.
    Regex(String),
    /// Text of this context-free grammar, in llguidance's variant of Lark.
    Grammar(String),
    /// The same, made by `calls::grammar`.
    Calls(String),
}

/// Makes constraints for one tokenizer.
pub struct Constraints(ParserFactory);

impl Constraints {
    /// The tokens' bytes, in an order to search. Takes some tens of milliseconds.
    ///
    /// # Errors
    /// The tokens' bytes can't be told: neither byte-level nor with byte fallback.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let unfit = |reason: String| {
            Error::input(format!("response_format: expected a tokenizer whose tokens are bytes, got {reason}"))
        };
        let json = serde_json::from_str(&tokenizer.to_json()?).map_err(|error| unfit(error.to_string()))?;
        let made = catch_unwind(AssertUnwindSafe(|| {
            let tokens = token_bytes_from_tokenizer_json(&json)?;
            let ends: Vec<u32> = tokenizer.end_ids().into_iter().filter(|&id| (id as usize) < tokens.len()).collect();
            let &first = ends.first().ok_or_else(|| anyhow::anyhow!("none that ends a text"))?;
            let size = u32::try_from(tokens.len())?;
            let trie = TokTrie::from(&TokRxInfo::new(size, first), &tokens).with_eos_tokens(&ends);
            let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let mut factory = ParserFactory::new_simple(&environment)?;
            factory.quiet();
            *factory.limits_mut() = ParserLimits { verbose_errors: false, ..ParserLimits::default() };
            anyhow::Ok(factory)
        }));
        match made {
            Ok(Ok(factory)) => Ok(Self(factory)),
            Ok(Err(error)) => Err(unfit(error.to_string())),
            Err(_) => Err(unfit("one that is inconsistent".to_owned())),
        }
    }

    /// A constraint at the beginning of an answer.
    ///
    /// # Errors
    /// A schema, expression or grammar that is malformed, that nothing satisfies, or that is too large.
    pub fn constraint(&self, format: &Format) -> Result<Constraint> {
        let (grammar, what) = match format {
            Format::Json(schema) => {
                if !schema.is_object() {
                    return Err(Error::input("response_format: expected a schema that is an object, got another"));
                }
                (TopLevelGrammar::from_json_schema(prepared(schema)), "JSON schema")
            }
            Format::Regex(text) => (TopLevelGrammar::from_regex(bounded(text)?), "regular expression"),
            Format::Grammar(text) => (TopLevelGrammar::from_lark(bounded(text)?.to_owned()), "grammar"),
            Format::Calls(text) => (TopLevelGrammar::from_lark(text.clone()), "schema of arguments"),
        };
        let field = if matches!(format, Format::Calls(_)) { "tools" } else { "response_format" };
        let made = catch_unwind(AssertUnwindSafe(|| self.0.create_parser(grammar)));
        let refused = |reason: &str| {
            let reason: String = reason.lines().next().unwrap_or_default().chars().take(400).collect();
            Error::input(format!("{field}: expected a {what} that can be followed, got: {reason}"))
        };
        match made {
            Ok(Ok(parser)) => {
                let mut matcher = Matcher::new(Ok(parser));
                match matcher.compute_mask() {
                    Ok(first) if !first.is_zero() => Ok(Constraint(Box::new(matcher))),
                    _ => Err(refused("one that no answer satisfies")),
                }
            }
            Ok(Err(error)) => Err(refused(&error.to_string())),
            Err(_) => Err(refused("one that the parser gave up on")),
        }
    }
}

/// A schema with the house's rules of white space, and no other's.
pub(super) fn prepared(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Value::Object(map) = &mut schema {
        map.shift_remove("x-guidance");
        let options = JsonCompileOptions { whitespace_pattern: Some(JSON_SPACE.to_owned()), ..Default::default() };
        options.apply_to(&mut schema);
    }
    schema
}

fn bounded(text: &str) -> Result<&str> {
    if text.len() > MAX_BYTES {
        let message = format!("response_format: expected at most {MAX_BYTES} bytes, got {}", text.len());
        return Err(Error::input(message));
    }
    Ok(text)
}

/// Where an answer stands in its format. Clones go their own ways.
#[derive(Clone)]
pub struct Constraint(Box<Matcher>);

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Constraint")
    }
}

impl Constraint {
    /// Makes the logits of all tokens that can't come next -∞.
    pub fn forbid(&mut self, logits: &mut [f32]) -> Result<()> {
        let allowed = self.0.compute_mask_or_eos().map_err(|error| failed(&error))?;
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= allowed.len() || !allowed.get(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if logits.iter().all(|logit| logit.is_infinite()) {
            return Err(Error::failure("response_format: expected a token that can follow, got none"));
        }
        Ok(())
    }

    /// Takes the token that was chosen.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        if self.0.is_stopped() {
            return Ok(()); // the end, after the last token
        }
        self.0.consume_token(token).map_err(|error| failed(&error))
    }
}

/// Some formats show only on the way that they are too large to be followed: theirs is the fault, not the server's.
fn failed(error: &anyhow::Error) -> Error {
    let reason: String = error.to_string().lines().next().unwrap_or_default().chars().take(400).collect();
    Error::input(format!("response_format: expected one that can be followed, got: {reason}"))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::serve::{Sampler, Sampling};
    use crate::text::tests::tokenizer;

    /// `<|im_end|>` and `</s>` of the tests' tokenizer, whose tokens are bytes but for these and `<|im_start|>`.
    const END_OF_TURN: u32 = 257;
    const END: u32 = 258;
    const VOCABULARY: usize = 259;

    fn constraint(format: &Format) -> Result<Constraint> {
        Constraints::new(&tokenizer())?.constraint(format)
    }

    /// What a model of random logits answers; none where it was cut off.
    fn answer(constraint: Constraint, seed: u64, most: usize) -> Option<String> {
        // a hot model that likes quotes and the end, so that its answers do end
        let sampling = Sampling { seed: Some(seed), temperature: 1.5, ..Sampling::default() };
        let mut sampler = Sampler::new(sampling, &[], Some(constraint));
        let mut logits = vec![0.0; VOCABULARY];
        for liked in [b'"', b'}', b']'] {
            logits[liked as usize] = 6.0;
        }
        logits[END as usize] = 9.0;
        let mut bytes = Vec::new();
        for _ in 0..most {
            match sampler.choose(&logits).expect("a token").token {
                END_OF_TURN | END => return Some(String::from_utf8(bytes).expect("UTF-8")),
                token => bytes.push(u8::try_from(token).expect("no special token but those that end")),
            }
        }
        None
    }

    fn schema() -> Value {
        json!({
            "type": "object", "additionalProperties": false, "required": ["name", "tags"],
            "properties": {
                "name": {"type": "string", "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
            },
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn an_answer_that_ends_is_valid_json_of_its_schema(seed: u64) {
            let Some(text) = answer(constraint(&Format::Json(schema())).unwrap(), seed, 400) else { return Ok(()) };
            let value: Value = serde_json::from_str(&text).unwrap();
            prop_assert!(value["name"].as_str().unwrap().chars().count() <= 12, "{text}");
            let tags = value["tags"].as_array().unwrap();
            prop_assert!(tags.len() <= 3 && tags.iter().all(|tag| tag == "a" || tag == "b"), "{text}");
            prop_assert!(value.get("age").is_none_or(|age| age.as_u64().is_some_and(|age| age <= 150)), "{text}");
            prop_assert!(value.as_object().unwrap().keys().all(|key| ["name", "age", "tags"].contains(&key.as_str())));
        }

        #[test]
        fn an_answer_matches_its_expression(seed: u64) {
            let pattern = "[a-c]{1,4}-[0-9]+(x|yé)?";
            let Some(text) = answer(constraint(&Format::Regex(pattern.to_owned())).unwrap(), seed, 200) else { return Ok(()) };
            prop_assert!(regex::Regex::new(&format!("^({pattern})$")).unwrap().is_match(&text), "{text}");
        }

        #[test]
        fn any_text_is_a_format_or_refused(text in "[ -~\n]{0,60}", schema in "\\PC{0,40}") {
            let _ = constraint(&Format::Regex(text.clone()));
            let _ = constraint(&Format::Grammar(text));
            let _ = constraint(&Format::Json(json!({"type": schema, "pattern": schema, "$ref": schema})));
        }
    }

    #[test]
    fn a_grammar_is_followed() {
        let grammar = "start: \"(\" start \")\" | \"x\"";
        let text =
            (0..20).find_map(|seed| answer(constraint(&Format::Grammar(grammar.to_owned())).unwrap(), seed, 200));
        let text = text.expect("one that ends");
        let depth = text.matches('(').count();
        assert_eq!(text, format!("{}x{}", "(".repeat(depth), ")".repeat(depth)));
    }

    #[test]
    fn only_the_end_follows_a_whole_answer() {
        let mut constraint = constraint(&Format::Regex("ab".to_owned())).unwrap();
        for token in [b'a', b'b'] {
            constraint.accept(u32::from(token)).unwrap();
        }
        let mut logits = vec![0.0; VOCABULARY + 5]; // a model's vocabulary may be padded
        constraint.forbid(&mut logits).unwrap();
        let left: Vec<usize> = (0..logits.len()).filter(|&id| logits[id].is_finite()).collect();
        assert!(left.contains(&(END as usize)) && left.iter().all(|id| (256..VOCABULARY).contains(id)), "{left:?}");
        constraint.accept(END).unwrap();
    }

    #[test]
    fn what_cannot_be_followed_is_refused_in_time() {
        let nested = |open: &str, close: &str, depth: usize| format!("{}a{}", open.repeat(depth), close.repeat(depth));
        let mut deep = json!({"type": "string"});
        for _ in 0..100 {
            deep = json!({"type": "object", "properties": {"a": deep}, "required": ["a"]});
        }
        let formats = [
            Format::Regex("(".to_owned()),
            Format::Regex(nested("(", ")", 20_000)),
            Format::Regex("((a{1,1000}){1,1000}){1,1000}".to_owned()),
            Format::Regex("x".repeat(MAX_BYTES + 1)),
            Format::Grammar("start: ".to_owned()),
            Format::Grammar("start: missing".to_owned()),
            Format::Grammar(format!("start: {}", nested("(", ")", 20_000).replace('a', "\"a\""))),
            Format::Grammar("start: start".to_owned()),
            Format::Grammar("%import https://example.org/x".to_owned()),
            Format::Json(json!({"type": "nonsense"})),
            Format::Json(json!({"$ref": "https://example.org/schema.json"})),
            Format::Json(json!({"$ref": "file:///etc/passwd"})),
            Format::Json(json!({"$ref": "#"})),
            Format::Json(json!({"type": "string", "pattern": "(((((((((a*)*)*)*)*)*)*)*)*)*"})),
            Format::Json(json!({"type": "array", "minItems": 1_000_000_000, "items": {"type": "string"}})),
            Format::Json(json!({"allOf": [{"type": "string"}, {"type": "integer"}]})),
            Format::Json(json!(false)),
            Format::Json(deep),
        ];
        for format in formats {
            let shown: String = format!("{format:?}").chars().take(80).collect();
            let begun = Instant::now();
            let outcome = constraint(&format).and_then(|mut constraint| constraint.forbid(&mut vec![0.0; VOCABULARY]));
            assert!(begun.elapsed() < Duration::from_secs(20), "{shown} took {:?}", begun.elapsed());
            println!("{shown}: {:?} {:?}", begun.elapsed(), outcome.as_ref().map_err(|error| error.message.clone()));
            if let Err(error) = outcome {
                assert!(error.message.starts_with("response_format: "), "{}", error.message);
            }
        }
    }
}
