//! From a conversation to ids, and which of them are trained on.
//!
//! A turn of the assistant is found by rendering prefixes, not by searching for marker strings: with `p` the text of the
//! messages before the turn and a generation prompt, and `q` the text up to and with the turn, the turn is proven when
//! both `p` and `q` begin the text of the whole conversation. Trained is what comes after `p`, up to and with the last
//! token within `q` at which generation would stop; the ids of `p` are then exactly those that a server would prompt
//! with.

use std::ops::Range;

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
    let proofs = wanted.iter().map(|&turn| prove(template, conversation, &prepared, &rendered.text, turn));
    let turns: Vec<Range<usize>> = match train_on {
        // turns only say where a row may be cut
        TrainOn::All => proofs.filter_map(Result::ok).collect(),
        TrainOn::Assistant | TrainOn::Last => proofs.collect::<Result<_>>()?,
    };
    let boundaries: Vec<usize> = turns.iter().map(|turn| turn.start).collect();
    let stream = Stream::of(tokenizer, &rendered, &boundaries)?;
    let mut trained = vec![train_on == TrainOn::All; stream.ids.len()];
    let mut turn_ends = Vec::with_capacity(turns.len());
    for ((turn, &first), &message) in turns.iter().zip(&stream.positions).zip(&wanted) {
        match stream.end_of_turn(tokenizer, turn) {
            Some(last) => {
                trained[first..=last].fill(true);
                turn_ends.push(last + 1);
            }
            None if train_on == TrainOn::All => {}
            None => return Err(no_end(tokenizer, message, &rendered.text[turn.clone()])),
        }
    }
    Ok(Encoded { ids: stream.ids, trained, turn_ends })
}

/// The bytes of the whole text that the assistant's message `turn` takes, after its generation prompt.
fn prove(
    template: &Template,
    conversation: &Conversation,
    prepared: &Prepared,
    whole: &str,
    turn: usize,
) -> Result<Range<usize>> {
    let render = |messages: Range<usize>, prompt: bool, what: &str| -> Result<usize> {
        if !prompt && messages.end == conversation.messages.len() {
            return Ok(whole.len());
        }
        let text = template.render_messages(prepared, messages, prompt).map_err(|error| Error {
            message: format!("message {}: the conversation {what} cannot be rendered: {}", turn + 1, error.message),
            ..error
        })?;
        if whole.starts_with(&text) {
            return Ok(text.len());
        }
        let same = whole.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        Err(Error::input(format!(
            "message {}: which tokens are the assistant's cannot be proven with this chat template: expected the \
             conversation {what} to begin the whole text, got {:?} where the whole has {:?}",
            turn + 1,
            excerpt(&text, same),
            excerpt(whole, same),
        ))
        .hint("the template rewrites earlier turns; train on the last turn (`last`) or on every token (`all`)"))
    };
    let start = render(0..turn, true, "before it, with a generation prompt,")?;
    let end = render(0..turn + 1, false, "up to it")?;
    if start > end {
        return Err(Error::input(format!("message {}: expected text after the generation prompt, got none", turn + 1)));
    }
    Ok(start..end)
}

/// Some characters from `from` on.
fn excerpt(text: &str, from: usize) -> String {
    let from = (0..=from.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    text[from..].chars().take(24).collect()
}

fn no_end(tokenizer: &Tokenizer, message: usize, text: &str) -> Error {
    let names: Vec<String> = tokenizer.end_ids().iter().filter_map(|&id| tokenizer.token_of(id)).collect();
    let tail: String = text.chars().rev().take(24).collect::<Vec<_>>().into_iter().rev().collect();
    Error::input(format!(
        "message {}: the chat template writes no token that ends the turn: expected one of {}, got {tail:?} at its end",
        message + 1,
        if names.is_empty() { "the tokenizer's end tokens (it names none)".to_owned() } else { names.join(", ") },
    ))
    .hint("a model trained on this would never stop; use a template that writes the end-of-sequence token after the assistant's text")
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

    /// The index of the last token within `turn` at which generation would stop.
    fn end_of_turn(&self, tokenizer: &Tokenizer, turn: &Range<usize>) -> Option<usize> {
        let within = |found: &Found| found.core.start >= turn.start && found.core.end <= turn.end;
        let mut ends = self.specials.iter().rev().filter(|(_, found)| within(found));
        ends.find(|(_, found)| tokenizer.end_ids().contains(&found.id)).map(|&(index, _)| index)
    }
}
