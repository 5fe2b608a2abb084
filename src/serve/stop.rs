//! Stop strings: text ends before the first of them, and no part of one is ever shown.
//!
//! What has been generated is shown as soon as it cannot be the beginning of a stop string any more; the rest is held.
//! The first stop string to be complete wins, so that the answer does not depend on how the text was cut in pieces.

/// What may be shown after a piece of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// This much more text; generation goes on.
    More(String),
    /// This much more text, and then the stop string of this number.
    Stopped(String, usize),
}

/// Watches one answer's text for stop strings.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// A watch for these strings; empty ones are ignored.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new() }
    }

    /// The strings that are watched for, each with its number.
    fn stops(&self) -> impl Iterator<Item = (usize, &String)> {
        self.stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty())
    }

    /// Takes the next piece of text and says what may be shown.
    pub fn push(&mut self, text: &str) -> Shown {
        self.held.push_str(text);
        let first = self.stops().filter_map(|(number, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, number))
        });
        if let Some((_, start, number)) = first.min() {
            self.held.truncate(start);
            return Shown::Stopped(std::mem::take(&mut self.held), number);
        }
        let kept = self.stops().map(|(_, stop)| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        Shown::More(std::mem::replace(&mut self.held, rest))
    }

    /// The answer ended otherwise: what was held is ordinary text after all.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that `stop` begins with, shorter than `stop`.
pub(super) fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|&length| {
            text.is_char_boundary(text.len() - length)
                && stop.as_bytes().starts_with(&text.as_bytes()[text.len() - length..])
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same in the slowest way: the text before the stop string that is complete first.
    fn expected(text: &str, stops: &[String]) -> (String, bool) {
        for end in 0..=text.len() {
            if !text.is_char_boundary(end) {
                continue;
            }
            let starts = stops.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()));
            if let Some(start) = starts.map(|stop| end - stop.len()).min() {
                return (text[..start].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter_and_nothing_leaks(
            pieces in prop::collection::vec("[abé]{0,3}", 0..20),
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
        ) {
            let text = pieces.concat();
            let (answer, stopped) = expected(&text, &stops);
            let mut watch = StopStrings::new(&stops);
            let mut shown = String::new();
            let mut ended = false;
            for piece in &pieces {
                match watch.push(piece) {
                    Shown::More(more) => shown.push_str(&more),
                    Shown::Stopped(more, number) => {
                        shown.push_str(&more);
                        prop_assert!(text[shown.len()..].starts_with(&stops[number]) && !stops[number].is_empty());
                        ended = true;
                        break;
                    }
                }
                prop_assert!(answer.starts_with(&shown), "{shown:?} was shown, but the answer is {answer:?}");
            }
            if !ended {
                shown.push_str(&watch.finish());
            }
            prop_assert_eq!((shown, ended), (answer, stopped));
        }
    }

    #[test]
    fn text_that_cannot_become_a_stop_string_is_shown_at_once() {
        let mut watch = StopStrings::new(&["</s>".into()]);
        assert_eq!(watch.push("a <"), Shown::More("a ".into()));
        assert_eq!(watch.push("b"), Shown::More("<b".into()));
        assert_eq!(watch.push("</s"), Shown::More(String::new()));
        assert_eq!(watch.push("> c"), Shown::Stopped(String::new(), 0));
    }
}
