//! From a conversation to ids, and which of them are trained on.
//!
//! A turn of the assistant is found by rendering prefixes, not by searching for marker strings. `p` is the text of the
//! messages before the turn with a generation prompt, `q` the text up to and with the turn. A turn is proven when `p`
//! begins the text of the whole conversation, and `q` has with it in common, after `p`, a special token of the template
//! at which generation stops. Trained is what comes after `p`, up to and with the first such token: just what a server
//! that prompts with the ids of `p` would let the model say.

use std::ops::Range;

use serde_json::Value;

use super::added::Found;
use super::conversation::{Conversation, TrainOn};
use super::provenance::{self, Rendered};
use super::template::{Prepared, Template};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// The ids of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Whether the model is trained to say the token; as long as `ids`.
    pub trained: Vec<bool>,
    /// Numbers of tokens after which the conversation can be cut: the ends of the proven turns, ascending.
    pub turn_ends: Vec<usize>,
}

/// The ids that ask the model for the assistant's next turn.
pub fn encode_prompt(template: &Template, tokenizer: &Tokenizer, conversation: &Conversation) -> Result<Vec<u32>> {
    let prepared = Prepared::new(conversation);
    let rendered = provenance::render(template, tokenizer.added(), conversation, &prepared, true)?;
    Ok(Stream::of(tokenizer, &rendered, &[])?.ids)
}

/// The ids of a whole conversation, and which of them are trained on.
///
/// Raises what the template raises; and, where a turn that is to be trained on cannot be told from the rest, or nothing
/// in it ends generation, an error that says so.
pub fn encode_conversation(
    template: &Template,
    tokenizer: &Tokenizer,
    conversation: &Conversation,
    train_on: TrainOn,
) -> Result<Encoded> {
    let prepared = Prepared::new(conversation);
    let rendered = provenance::render(template, tokenizer.added(), conversation, &prepared, false)?;
    let mut wanted: Vec<usize> = conversation.assistant_turns().collect();
    if train_on == TrainOn::Last {
        wanted.drain(..wanted.len().saturating_sub(1));
    }
    if train_on != TrainOn::All {
        written(conversation, &wanted, &rendered.text)?;
    }
    let proofs = wanted.iter().map(|&turn| prove(template, conversation, &prepared, &rendered.text, turn));
    let turns: Vec<Turn> = match train_on {
        // turns only say where a row may be cut
        TrainOn::All => proofs.filter_map(Result::ok).collect(),
        TrainOn::Assistant | TrainOn::Last => proofs.collect::<Result<_>>()?,
    };
    let boundaries: Vec<usize> = match train_on {
        TrainOn::All => Vec::new(),
        TrainOn::Assistant | TrainOn::Last => turns.iter().map(|turn| turn.start).collect(),
    };
    let stream = Stream::of(tokenizer, &rendered, &boundaries)?;
    let mut trained = vec![train_on == TrainOn::All; stream.ids.len()];
    let mut turn_ends = Vec::with_capacity(turns.len());
    for (number, turn) in turns.iter().enumerate() {
        match (stream.end_of_turn(tokenizer, turn), stream.positions.get(number)) {
            (Some(last), first) => {
                trained[first.copied().unwrap_or(last)..=last].fill(true);
                turn_ends.push(last + 1);
            }
            (None, Some(_)) => return Err(turn.unproven(tokenizer, &rendered.text)),
            (None, None) => {}
        }
    }
    Ok(Encoded { ids: stream.ids, trained, turn_ends })
}

/// Checks that the template writes the calls of tools; many templates know none, and would teach to say nothing instead.
fn written(conversation: &Conversation, turns: &[usize], text: &str) -> Result<()> {
    for &index in turns {
        let calls = conversation.messages[index].get("tool_calls").and_then(Value::as_array);
        for name in calls.into_iter().flatten().filter_map(|call| call.pointer("/function/name")?.as_str()) {
            if !text.contains(name) {
                return Err(Error::input(format!(
                    "message {}: expected a chat template that writes calls of tools, got one that leaves out {name:?}",
                    index + 1
                ))
                .hint("train a model whose template knows tools"));
            }
        }
    }
    Ok(())
}

/// Where an assistant's message stands in the text of the whole conversation.
struct Turn {
    /// The message's index.
    message: usize,
    /// The end of its generation prompt, in bytes.
    start: usize,
    /// How far the whole is the text of the conversation up to this message, in bytes.
    end: usize,
    /// What that text has where the whole goes on differently; empty where it doesn't.
    differs: String,
}

/// Finds the message at index `turn` in `whole`.
fn prove(
    template: &Template,
    conversation: &Conversation,
    prepared: &Prepared,
    whole: &str,
    turn: usize,
) -> Result<Turn> {
    let render = |messages: Range<usize>, prompt: bool| -> Result<String> {
        template.render_messages(prepared, messages, prompt).map_err(|error| {
            let what = if prompt { "before" } else { "up to" };
            let message =
                format!("message {}: the conversation {what} it cannot be rendered: {}", turn + 1, error.message);
            Error { message, ..error }
        })
    };
    let prompt = render(0..turn, true)?;
    if !whole.starts_with(&prompt) {
        let same = common(whole, &prompt);
        return Err(cannot_prove(turn, "before it, with a generation prompt,", &prompt[same..], &whole[same..]).hint(
            "the template's generation prompt has text that a finished turn lacks, or it rewrites earlier turns; use a \
             template that doesn't, train on the last turn (`last`) or on every token (`all`)",
        ));
    }
    let start = prompt.len();
    if turn + 1 == conversation.messages.len() {
        return Ok(Turn { message: turn, start, end: whole.len(), differs: String::new() });
    }
    let finished = render(0..turn + 1, false)?;
    let end = common(whole, &finished);
    Ok(Turn { message: turn, start, end: end.max(start), differs: finished[end..].chars().take(EXCERPT).collect() })
}

/// How many characters of a text an error shows.
const EXCERPT: usize = 24;

/// How many bytes both texts have in common, in whole characters.
fn common(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    same.map(|(character, _)| character.len_utf8()).sum()
}

fn cannot_prove(message: usize, what: &str, got: &str, whole: &str) -> Error {
    let excerpt = |text: &str| text.chars().take(EXCERPT).collect::<String>();
    Error::input(format!(
        "message {}: which tokens are the assistant's cannot be proven with this chat template: expected the \
         conversation {what} to begin the whole text, got {:?} where the whole has {:?}",
        message + 1,
        excerpt(got),
        excerpt(whole),
    ))
}

impl Turn {
    /// Why there is no end of generation in it.
    fn unproven(&self, tokenizer: &Tokenizer, whole: &str) -> Error {
        if !self.differs.is_empty() {
            return cannot_prove(self.message, "up to it", &self.differs, &whole[self.end..]).hint(
                "the template rewrites earlier turns; train on the last turn (`last`) or on every token (`all`)",
            );
        }
        let names: Vec<String> = tokenizer.end_ids().iter().filter_map(|&id| tokenizer.token_of(id)).collect();
        let names =
            if names.is_empty() { "the tokenizer's end tokens (it names none)".to_owned() } else { names.join(", ") };
        let turn = &whole[self.start..self.end];
        let tail = turn.char_indices().rev().nth(EXCERPT - 1).map_or(turn, |(at, _)| &turn[at..]);
        Error::input(format!(
            "message {}: the chat template writes no token that ends the turn: expected one of {names}, got {tail:?} at its end",
            self.message + 1,
        ))
        .hint("a model trained on this would never stop; use a template that writes the end-of-sequence token after the assistant's text")
    }
}

/// A text's tokens, with the places of special tokens and boundaries.
struct Stream {
    ids: Vec<u32>,
    /// The special tokens that were parsed, with their index in `ids`.
    specials: Vec<(usize, Found)>,
    /// For each boundary the number of tokens before it.
    positions: Vec<usize>,
}

impl Stream {
    /// Encodes `rendered`. The tokens before each of the ascending `boundaries` are those of the text before it.
    fn of(tokenizer: &Tokenizer, rendered: &Rendered, boundaries: &[usize]) -> Result<Self> {
        let text = rendered.text.as_str();
        let mut stream = Self { ids: Vec::new(), specials: Vec::new(), positions: Vec::new() };
        let mut boundaries = boundaries;
        let mut done = 0;
        for mut found in tokenizer.added().special(text, |range| rendered.is_text(range)) {
            // white space that a special token takes in ends at a boundary: a prompt would not hold the rest
            for &boundary in boundaries {
                if found.core.start < boundary && boundary < found.core.end {
                    return Err(Error::input("chat template: a turn begins within a special token"));
                }
                if boundary <= found.core.start {
                    found.whole.start = found.whole.start.max(boundary);
                } else {
                    found.whole.end = found.whole.end.min(boundary);
                }
            }
            let before = boundaries.partition_point(|&boundary| boundary <= found.whole.start);
            let (inside, after) = boundaries.split_at(before);
            stream.text(tokenizer, text, done..found.whole.start, inside)?;
            boundaries = after;
            done = found.whole.end;
            stream.ids.push(found.id);
            stream.specials.push((stream.ids.len() - 1, found));
        }
        stream.text(tokenizer, text, done..text.len(), boundaries)?;
        Ok(stream)
    }

    /// Encodes a stretch without special tokens that has `boundaries` within.
    fn text(&mut self, tokenizer: &Tokenizer, text: &str, range: Range<usize>, boundaries: &[usize]) -> Result<()> {
        let encode = |range: Range<usize>| tokenizer.encode_between(&text[range.clone()], range.start == 0);
        let ids = encode(range.clone())?;
        let first = self.ids.len();
        let mut positions = Vec::with_capacity(boundaries.len());
        for &boundary in boundaries {
            let before = encode(range.start..boundary)?;
            if !ids.starts_with(&before) {
                break;
            }
            positions.push(first + before.len());
        }
        if positions.len() == boundaries.len() {
            self.positions.extend(positions);
            self.ids.extend(ids);
            return Ok(());
        }
        // the whole would join characters of a prompt and of its answer, which no generation does
        let mut start = range.start;
        for &boundary in boundaries {
            self.ids.extend(encode(start..boundary)?);
            self.positions.push(self.ids.len());
            start = boundary;
        }
        self.ids.extend(encode(start..range.end)?);
        Ok(())
    }

    /// The index of the first token within `turn` at which generation stops.
    fn end_of_turn(&self, tokenizer: &Tokenizer, turn: &Turn) -> Option<usize> {
        let within = |found: &Found| found.core.start >= turn.start && found.core.end <= turn.end;
        let mut ends = self.specials.iter().filter(|(_, found)| within(found));
        ends.find(|(_, found)| tokenizer.ends(found.id)).map(|&(index, _)| index)
    }
}
