//! The names that a request may call a model by: the base, and the adapters on it.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use super::prefix::{Key, root};
use crate::{Error, Result};

/// The id of the base model, which has no adapter.
pub const NO_ADAPTER: i32 = -1;

/// One name.
#[derive(Clone, Debug)]
pub struct Model {
    /// What requests call it.
    pub name: String,
    /// The adapter that answers, or [`NO_ADAPTER`].
    pub adapter: i32,
    /// Where the keys of the base model's pages begin; those of an adapter's are known once it was read.
    pub root: Option<Key>,
    /// When it was added, in seconds since 1970.
    pub created: u64,
    /// Who holds a clone of it holds the adapter; see [`Models::held`].
    pub pin: Arc<()>,
}

/// All names.
#[derive(Debug)]
pub struct Models {
    named: RwLock<Vec<Model>>,
    /// Those whose names were taken away while somebody held them.
    leaving: Mutex<Vec<Model>>,
}

impl Models {
    /// The base model's name alone; `content` is a hash of its weights.
    pub fn new(name: &str, content: &str) -> Self {
        let (root, created) = (Some(root(content, "")), now());
        let base = Model { name: name.to_owned(), adapter: NO_ADAPTER, root, created, pin: Arc::default() };
        Self { named: RwLock::new(vec![base]), leaving: Mutex::default() }
    }

    /// Adds an adapter's name.
    pub fn add(&self, name: &str, adapter: i32) -> Result<()> {
        let mut models = self.named.write().unwrap_or_else(PoisonError::into_inner);
        if name.is_empty() || name.len() > 256 || name.chars().any(char::is_control) {
            return Err(Error::input(format!("adapter name: expected 1 to 256 printable bytes, got {name:?}")));
        }
        if models.iter().any(|model| model.name == name) {
            return Err(Error::input(format!("adapter name: expected one not in use, got {name:?}")));
        }
        models.push(Model { name: name.to_owned(), adapter, root: None, created: now(), pin: Arc::default() });
        Ok(())
    }

    /// Removes an adapter's name and returns its id. New requests no longer find it.
    pub fn remove(&self, name: &str) -> Result<i32> {
        let mut models = self.named.write().unwrap_or_else(PoisonError::into_inner);
        match models.iter().position(|model| model.name == name && model.adapter != NO_ADAPTER) {
            Some(index) => {
                let model = models.remove(index);
                let adapter = model.adapter;
                self.leaving.lock().unwrap_or_else(PoisonError::into_inner).push(model);
                Ok(adapter)
            }
            None => Err(Error::input(format!("adapter: expected the name of one, got {name:?}"))),
        }
    }

    /// Lets a name that is in use mean another adapter from now on, and returns the one that it meant.
    pub fn replace(&self, name: &str, adapter: i32) -> Result<i32> {
        let mut models = self.named.write().unwrap_or_else(PoisonError::into_inner);
        match models.iter_mut().find(|model| model.name == name && model.adapter != NO_ADAPTER) {
            Some(model) => {
                let new = Model { name: name.to_owned(), adapter, root: None, created: now(), pin: Arc::default() };
                let old = std::mem::replace(model, new);
                let meant = old.adapter;
                self.leaving.lock().unwrap_or_else(PoisonError::into_inner).push(old);
                Ok(meant)
            }
            None => Err(Error::input(format!("adapter: expected the name of one, got {name:?}"))),
        }
    }

    /// Whether somebody found an adapter before its name was taken away and still holds it: its request may not have
    /// reached the engine yet.
    pub fn held(&self, adapter: i32) -> bool {
        let mut leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        leaving.retain(|model| Arc::strong_count(&model.pin) > 1);
        leaving.iter().any(|model| model.adapter == adapter)
    }

    /// The model of a name; the base for none.
    pub fn find(&self, name: Option<&str>) -> Option<Model> {
        let models = self.named.read().unwrap_or_else(PoisonError::into_inner);
        let wanted = |model: &&Model| name.map_or(model.adapter == NO_ADAPTER, |name| model.name == name);
        models.iter().find(wanted).cloned()
    }

    /// All of them.
    pub fn list(&self) -> Vec<Model> {
        self.named.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_found_an_adapter_holds_it_when_its_name_is_gone() {
        let models = Models::new("base", "content");
        models.add("a", 3).unwrap();
        let found = models.find(Some("a")).unwrap();
        assert!(!models.held(3), "it has its name");
        assert_eq!(models.remove("a").unwrap(), 3);
        assert!(models.find(Some("a")).is_none() && models.held(3) && !models.held(4));
        let pin = Arc::clone(&found.pin);
        drop(found);
        assert!(models.held(3));
        drop(pin);
        assert!(!models.held(3));
    }
}
