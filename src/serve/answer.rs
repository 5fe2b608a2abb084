//! One answer's text while it grows: decoded, watched for stop strings, given out with the tokens that made it.

use super::request::{Decoder, Delta, Token};
use super::stop::{Shown, StopStrings};

/// The visible side of a running request.
pub struct Answer {
    decoder: Box<dyn Decoder>,
    stop: StopStrings,
    /// Bytes decoded and bytes shown so far.
    decoded: usize,
    shown: usize,
    /// Tokens not yet given out, with the range of text they made.
    waiting: Vec<(usize, usize, Token)>,
}

impl Answer {
    /// An empty answer that ends at one of `stops`.
    pub fn new(decoder: Box<dyn Decoder>, stops: &[String]) -> Self {
        Self { decoder, stop: StopStrings::new(stops), decoded: 0, shown: 0, waiting: Vec::new() }
    }

    /// Adds a token: what becomes visible, and the number of the stop string that ended the answer, if one did.
    pub fn push(&mut self, token: Token) -> (Delta, Option<usize>) {
        let text = self.decoder.push(token.id);
        let start = self.decoded;
        self.decoded += text.len();
        self.waiting.push((start, self.decoded, token));
        self.show(&text)
    }

    /// The answer ended without a stop string: what was held back.
    pub fn finish(&mut self) -> Delta {
        let rest = self.decoder.finish();
        self.decoded += rest.len();
        if let Some(last) = self.waiting.last_mut() {
            last.1 = self.decoded;
        }
        let (mut delta, stopped) = self.show(&rest);
        if stopped.is_none() {
            let held = self.stop.finish();
            self.shown += held.len();
            delta.text.push_str(&held);
            delta.tokens.extend(self.waiting.drain(..).map(|(_, _, token)| token));
        }
        delta
    }

    fn show(&mut self, text: &str) -> (Delta, Option<usize>) {
        let (text, stopped) = match self.stop.push(text) {
            Shown::More(text) => (text, None),
            Shown::Stopped(text, number) => (text, Some(number)),
        };
        self.shown += text.len();
        // Log-probabilities give text away as well: a token goes out with its text, and one inside a stop string never.
        let count = if stopped.is_some() {
            self.waiting.iter().take_while(|(start, _, _)| *start < self.shown).count()
        } else {
            self.waiting.iter().take_while(|(_, end, _)| *end <= self.shown).count()
        };
        let tokens = self.waiting.drain(..count).map(|(_, _, token)| token).collect();
        (Delta { text, tokens }, stopped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Letters;
    impl Decoder for Letters {
        fn push(&mut self, id: u32) -> String {
            char::from_u32(id).map_or_else(String::new, String::from)
        }
        fn finish(&mut self) -> String {
            "!".into()
        }
    }

    fn run(text: &str, stop: &str) -> (String, String) {
        let mut answer = Answer::new(Box::new(Letters), &[stop.to_owned()]);
        let (mut shown, mut tokens) = (String::new(), String::new());
        let mut take = |delta: Delta| {
            shown.push_str(&delta.text);
            tokens.extend(delta.tokens.iter().filter_map(|token| char::from_u32(token.id)));
        };
        for letter in text.chars() {
            let (delta, stopped) = answer.push(Token { id: letter.into(), logprob: None, top: Vec::new() });
            take(delta);
            if stopped.is_some() {
                return (shown, tokens);
            }
        }
        take(answer.finish());
        (shown, tokens)
    }

    #[test]
    fn tokens_come_with_their_text() {
        assert_eq!(run("hello", "xyz"), ("hello!".into(), "hello".into()));
        assert_eq!(run("hello", "lo"), ("hel".into(), "hel".into()));
        assert_eq!(run("héllo", "l?"), ("héllo!".into(), "héllo".into()));
        // The rest of the decoder's text is watched too.
        assert_eq!(run("hello", "o!"), ("hell".into(), "hell".into()));
    }
}
