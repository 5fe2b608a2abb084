//! Names for names: an alias is answered by one model, or by several, each with its share of the requests.
//!
//! A managed adapter is an alias, too: its name leads to the model of its newest generation, so that a new generation
//! takes over between two requests, and requests under way stay with the one that they began with.

use std::collections::{BTreeMap, HashMap};
use std::sync::{PoisonError, RwLock};

use crate::{Error, Result};

/// Aliases of aliases end here.
const DEPTH: usize = 4;

/// One alias: (model, weight), the weights above 0.
pub type Targets = Vec<(String, u32)>;

/// What a name came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The model's own name.
    pub model: String,
    /// What the answer calls it: the name that was asked for, or the target that was drawn.
    pub shown: String,
}

/// All aliases, and the fingerprints of what models are made of.
#[derive(Debug, Default)]
pub struct Names {
    aliases: RwLock<BTreeMap<String, Targets>>,
    fingerprints: RwLock<HashMap<String, String>>,
}

impl Names {
    /// Sets an alias, or another one of this name anew.
    pub fn set(&self, name: &str, targets: Targets) -> Result<()> {
        let sum: u64 = targets.iter().map(|&(_, weight)| u64::from(weight)).sum();
        if targets.is_empty() || targets.len() > 100 || targets.iter().any(|&(_, weight)| weight == 0) || sum > 1 << 31
        {
            return Err(Error::input(format!("{name}: expected 1 to 100 targets with weights from 1 on")));
        }
        self.aliases.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), targets);
        Ok(())
    }

    /// Takes an alias away; whether there was one.
    pub fn remove(&self, name: &str) -> bool {
        self.aliases.write().unwrap_or_else(PoisonError::into_inner).remove(name).is_some()
    }

    /// Follows a name to a model's; `draw` gives a number below its argument.
    pub fn resolve(&self, name: &str, mut draw: impl FnMut(u64) -> u64) -> Resolved {
        let aliases = self.aliases.read().unwrap_or_else(PoisonError::into_inner);
        let (mut model, mut shown) = (name, name);
        for _ in 0..DEPTH {
            let Some(targets) = aliases.get(model) else { break };
            let mut left = draw(targets.iter().map(|&(_, weight)| u64::from(weight)).sum());
            for (target, weight) in targets {
                model = target;
                match left.checked_sub(u64::from(*weight)) {
                    Some(rest) => left = rest,
                    None => break,
                }
            }
            if targets.len() > 1 {
                shown = model;
            }
        }
        Resolved { model: model.to_owned(), shown: shown.to_owned() }
    }

    /// Every alias by name.
    pub fn list(&self) -> Vec<String> {
        self.aliases.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Notes what a model is made of; nothing: forgets it.
    pub fn describe(&self, model: &str, fingerprint: Option<&str>) {
        let mut known = self.fingerprints.write().unwrap_or_else(PoisonError::into_inner);
        match fingerprint {
            Some(text) => known.insert(model.to_owned(), text.to_owned()),
            None => known.remove(model),
        };
    }

    /// What a model is made of.
    pub fn fingerprint(&self, model: &str) -> Option<String> {
        self.fingerprints.read().unwrap_or_else(PoisonError::into_inner).get(model).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(targets: &[(&str, u32)]) -> Targets {
        targets.iter().map(|&(name, weight)| (name.to_owned(), weight)).collect()
    }

    #[test]
    fn shares_are_those_of_the_weights() {
        let names = Names::default();
        names.set("support", named(&[("v3", 9), ("v4", 1)])).unwrap();
        names.set("v3", named(&[("v3@aa", 1)])).unwrap();
        let drawn: Vec<Resolved> = (0..10).map(|number| names.resolve("support", |below| number % below)).collect();
        let third = Resolved { model: "v3@aa".into(), shown: "v3".into() };
        assert_eq!(drawn.iter().filter(|&resolved| *resolved == third).count(), 9);
        assert_eq!(drawn[9], Resolved { model: "v4".into(), shown: "v4".into() });
        assert_eq!(names.resolve("v3", |_| 0), Resolved { model: "v3@aa".into(), shown: "v3".into() });
        assert_eq!(names.resolve("other", |_| 0).model, "other");
    }

    #[test]
    fn circles_end_and_bad_weights_are_refused() {
        let names = Names::default();
        names.set("a", named(&[("b", 1)])).unwrap();
        names.set("b", named(&[("a", 1)])).unwrap();
        assert!(["a", "b"].contains(&names.resolve("a", |_| 0).model.as_str()));
        for bad in [named(&[]), named(&[("x", 0)]), named(&[("x", u32::MAX)])] {
            assert!(names.set("c", bad).is_err());
        }
        assert!(names.remove("a") && !names.remove("a"));
    }
}
