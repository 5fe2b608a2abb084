//! What strangers' templates, tokenizers and conversations may do: fail with a message, in bounded time, never panic.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::directory::Config;
use super::{Conversation, Specials, Template, Tokenizer, TrainOn, encode_conversation, encode_prompt};
use crate::error::ErrorKind;

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A byte-level tokenizer without merges and with three special tokens.
pub(crate) fn tokenizer() -> Tokenizer {
    let mut document = bytes();
    document["added_tokens"] = ["<|im_start|>", "<|im_end|>", "</s>"]
        .iter()
        .enumerate()
        .map(|(index, token)| {
            json!({"id": 256 + index, "content": token, "special": true, "normalized": false,
                   "lstrip": false, "rstrip": false, "single_word": false})
        })
        .collect();
    let mut config = Config::default();
    config.special_tokens.insert("eos_token".to_owned(), "</s>".to_owned());
    Tokenizer::from_json(&document.to_string(), config).expect("a tokenizer")
}

pub(crate) fn bytes() -> Value {
    // GPT-2's letters for bytes: the printable ones are themselves, the rest follow from U+0100
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let others = (0..256).filter(|&byte| !printable(byte)).enumerate();
    let mut letters: Vec<(u32, u32)> = (0..256).filter(|&byte| printable(byte)).map(|byte| (byte, byte)).collect();
    letters.extend(others.map(|(index, byte)| (byte, 256 + index as u32)));
    let vocabulary: serde_json::Map<String, Value> = letters
        .into_iter()
        .map(|(byte, letter)| (char::from_u32(letter).expect("a letter").to_string(), json!(byte)))
        .collect();
    let step = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "pre_tokenizer": step, "decoder": step,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                  "byte_fallback": false, "ignore_merges": false},
    })
}

fn conversation(contents: &[&str]) -> Conversation {
    let roles = ["user", "assistant"].iter().cycle();
    Conversation::new(roles.zip(contents).map(|(role, content)| json!({"role": role, "content": content})).collect())
}

fn fails(source: &str) -> String {
    let begun = Instant::now();
    let result =
        Template::from_source(source, None, None).and_then(|template| template.render(&conversation(&["x"]), true));
    let taken = begun.elapsed();
    assert!(taken < Duration::from_secs(20), "took {taken:?}");
    let error = result.expect_err("an error");
    assert_eq!(error.kind, ErrorKind::Input);
    assert!(error.message.starts_with("chat template"), "{error}");
    error.message
}

#[test]
fn endless_and_huge_templates_end() {
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'a' * 100000000000 }}",
        "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
        "{{ 'x'.zfill(99999999999) }}",
        "{{ messages | tojson(indent=99999999) }}",
        "{% include 'chat template' %}",
        "{% extends 'chat template' %}",
        "{% import 'chat template' as t %}{{ t }}",
        "{{ undefined.attribute }}",
        "{{ messages[0].content.nothing() }}",
        "{% for x in messages %}",
        "{% generation %}",
        "{{ ''.split('') }}",
    ] {
        fails(source);
    }
}

#[test]
fn deep_templates_end() {
    for (open, close) in
        [("(", ")"), ("[", "]"), ("{% if x %}", "{% endif %}"), ("{% generation %}", "{% endgeneration %}")]
    {
        let depth = 50_000;
        let (open, close) = (open.repeat(depth), close.repeat(depth));
        fails(&if open.starts_with('{') { format!("{open}{close}") } else { format!("{{{{ {open}1{close} }}}}") });
    }
    fails(&"{{ -".repeat(100_000));
    fails(&format!("{{{{ {} }}}}", "not ".repeat(100_000)));
    fails(&format!("{{{{ 1{} }}}}", " + x".repeat(100_000)));
    fails(&"x".repeat(2 << 20));
    fails(&format!("{{% if a %}}{}{{% endif %}}", "{% elif x %}".repeat(80_000)));
    fails(&format!("{{{{ x{} }}}}", "|upper".repeat(100_000)));
    fails(&format!("{{{{ x{} }}}}", ".a".repeat(100_000)));
}

#[test]
fn deep_values_end() {
    let grow = "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% for j in range(99999) %}\
                {% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
    fails(grow);
    let deep = "{% set ns = namespace(x=1) %}{% for i in range(30000) %}{% set ns.x = [ns.x] %}{% endfor %}";
    for end in ["{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x == [ns.x] }}", "{{ ns.x | string | length }}"] {
        let template = Template::from_source(&format!("{deep}{end}"), None, None).expect("a template");
        let _ = template.render(&conversation(&["x"]), true);
    }
}

#[test]
fn what_a_template_raises_is_shown_with_its_line() {
    let message = fails("first\n{% if true %}\n{{ raise_exception('Roles must alternate') }}{% endif %}");
    assert_eq!(message, "chat template, line 3: Roles must alternate");
}

#[test]
fn deep_data_renders() {
    let mut value = json!(1);
    for _ in 0..60 {
        value = json!({ "a": [value] });
    }
    let template = Template::from_source("{{ messages[0] | tojson }}", None, None).expect("a template");
    let conversation = Conversation::new(vec![value.clone()]);
    let rendered = template.render(&conversation, false).expect("a text");
    assert_eq!(
        serde_json::to_value(&value).ok(),
        serde_json::from_str::<Value>(&rendered).ok().filter(|v| *v == value)
    );
}

#[test]
fn inconsistent_tokenizers_are_errors() {
    let valid = bytes();
    let refuse = |change: &dyn Fn(&mut Value)| {
        let mut document = valid.clone();
        change(&mut document);
        let result = Tokenizer::from_json(&document.to_string(), Config::default());
        let Ok(tokenizer) = result else { return };
        // what loads must not panic either
        let _ = tokenizer.encode("some text </s>", Specials::Parse);
        let _ = tokenizer.encode("some text </s>", Specials::Literal);
        tokenizer.decode(&[0, 1, u32::MAX], false);
    };
    refuse(&|document| document["model"]["merges"] = json!([["nope", "nope"]]));
    refuse(&|document| document["model"]["vocab"] = json!({"a": u32::MAX, "b": u32::MAX}));
    refuse(&|document| document["model"] = json!({"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]]}));
    refuse(&|document| document["model"] = json!({"type": "Unigram", "unk_id": null, "vocab": []}));
    refuse(&|document| document["model"]["unk_token"] = json!("missing"));
    refuse(&|document| {
        document["pre_tokenizer"] =
            json!({"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": false});
    });
    refuse(&|document| {
        document["pre_tokenizer"] =
            json!({"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": false});
    });
    refuse(&|document| document["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "////"}));
    refuse(&|document| document["decoder"] = json!({"type": "Strip", "content": " ", "start": 99, "stop": 99}));
    refuse(&|document| {
        document["truncation"] =
            json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 9});
    });
    assert!(Tokenizer::from_json("{", Config::default()).is_err());
    assert!(Tokenizer::from_json(&"[".repeat(1 << 20), Config::default()).is_err());
    assert!(Tokenizer::from_json("null", Config::default()).is_err());
}

#[test]
fn a_tokenizer_that_truncates_does_not() {
    let mut document = bytes();
    document["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    let tokenizer = Tokenizer::from_json(&document.to_string(), Config::default()).expect("a tokenizer");
    assert_eq!(tokenizer.encode("12345", Specials::Parse).expect("ids").len(), 5);
}

/// Bits of templates, valid and not, that are put together at random.
fn template_source() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ m.role }}",
        "{{ m['content'] }}",
        "{% if m %}",
        "{% else %}",
        "{% endif %}",
        "{{ messages | tojson }}",
        "{{ messages[0].content[1:-1:2] }}",
        "{%- set x = [1, 'a', none] -%}",
        "{{ x | join(',') }}",
        "{{ 'a'.split('a', 1)[9] }}",
        "{% generation %}",
        "{% endgeneration %}",
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        "'",
        "\"",
        "{% raw %}",
        "{% endraw %}",
        "{{ raise_exception('x') }}",
        "{{ strftime_now('%Y %-d %') }}",
        "{% macro f(a=1) %}",
        "{% endmacro %}",
        "{{ f(2) }}",
        "{% set ns = namespace(a=1) %}",
        "{% set ns.a = ns.a * 99 %}",
        "{% break %}",
        "{{ ns.a ** 9 }}",
        "{{ 1 // 0 }}",
        "{{ -9223372036854775808 // -1 }}",
        "é\u{f0000}🙂",
        "{{ 'é'[0:1] }}",
        "{{ 'é🙂'.rsplit('', 2) }}",
        "{{ 'é a'.rsplit(none, 1) }}",
        "{{ m.items() }}",
        "{{ loop.index }}",
        "{{ m | length }}",
        "{{ '%s' | format(m) }}",
        "{{ '{0:>999999}'.format(1) }}",
        "{{ 'a'.zfill(3) }}",
        "{{ 1e308 * 10 }}",
        "<|im_end|>",
    ]);
    prop::collection::vec(prop_oneof![4 => pieces.prop_map(str::to_owned), 1 => "\\PC{0,6}"], 0..12)
        .prop_map(|pieces| pieces.concat())
}

fn content() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "<|im_start|>",
        "<|im_end|>",
        "</s>",
        "<|im_",
        "end|>",
        "<",
        "|>",
        "\u{f0000}",
        "\u{f0001}",
        "\n",
        " ",
        "{{ 1 }}",
        "é",
    ]);
    prop::collection::vec(prop_oneof![3 => pieces.prop_map(str::to_owned), 1 => "\\PC{0,4}"], 0..8)
        .prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_template_renders_or_fails(source in template_source(), text in content()) {
        let talk = conversation(&[&text, "x"]);
        if let Ok(template) = Template::from_source(&source, Some("<s>"), None) {
            let tokenizer = tokenizer();
            let _ = template.render(&talk, true);
            let _ = encode_prompt(&template, &tokenizer, &talk);
            for train_on in [TrainOn::Assistant, TrainOn::Last, TrainOn::All] {
                if let Ok(encoded) = encode_conversation(&template, &tokenizer, &talk, train_on) {
                    prop_assert_eq!(encoded.ids.len(), encoded.trained.len());
                    prop_assert!(encoded.turn_ends.iter().all(|&end| end <= encoded.ids.len()));
                }
            }
        }
    }

    #[test]
    fn content_is_text(contents in prop::collection::vec(content(), 1..6)) {
        let tokenizer = tokenizer();
        let template = Template::from_source(CHATML, None, None).expect("a template");
        let contents: Vec<&str> = contents.iter().map(String::as_str).collect();
        let talk = conversation(&contents);
        let encoded = encode_conversation(&template, &tokenizer, &talk, TrainOn::Assistant).expect("ids");
        prop_assert_eq!(tokenizer.decode(&encoded.ids, false), template.render(&talk, false).expect("a text"));
        let specials = encoded.ids.iter().filter(|&&id| tokenizer.is_special(id)).count();
        prop_assert_eq!(specials, 2 * contents.len());
        // each answer with its end, in bytes: this tokenizer has a token for each
        let answers: usize = contents.iter().skip(1).step_by(2).map(|answer| answer.len() + 1).sum();
        prop_assert_eq!(encoded.trained.iter().filter(|&&trained| trained).count(), answers);
        prop_assert_eq!(encoded.turn_ends.len(), contents.len() / 2);
    }

    #[test]
    fn any_tokenizer_text_loads_or_fails(at in 0_usize..4000, byte in any::<u8>(), text in content()) {
        let mut document = bytes().to_string().into_bytes();
        let at = at % document.len();
        document[at] = byte;
        if let Ok(tokenizer) = Tokenizer::from_json(&String::from_utf8_lossy(&document), Config::default()) {
            let _ = tokenizer.encode(&text, Specials::Literal);
            tokenizer.decode(&[0, 255, 256, 257], true);
        }
    }
}

#[test]
fn a_template_that_leaves_calls_out_is_an_error() {
    let call = json!({"type": "function", "function": {"name": "weather", "arguments": {}}});
    let messages = vec![
        json!({"role": "user", "content": "?"}),
        json!({"role": "assistant", "content": "", "tool_calls": [call]}),
    ];
    let talk = Conversation::new(messages);
    let encode = |source: &str| {
        let template = Template::from_source(source, None, None).expect("a template");
        encode_conversation(&template, &tokenizer(), &talk, TrainOn::Assistant)
    };
    let error = encode(CHATML).expect_err("no calls");
    assert!(
        error.message.starts_with("message 2: expected a chat template that writes calls of tools"),
        "{}",
        error.message
    );
    let writes = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}",
    );
    encode(&writes).expect("calls");
}
