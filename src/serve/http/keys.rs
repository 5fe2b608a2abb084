//! API keys: known by their hashes only, each with limits of its own.
//!
//! A limit is a bucket that holds a minute's worth and refills steadily. What an answer costs is known at its end, so a
//! bucket of tokens may fall below nothing; then the key waits until it has filled up again.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::{Error, Result};

/// The hash of a key's text, as files hold it: `blake3:` and 64 hexadecimal digits.
pub fn hashed(key: &str) -> String {
    format!("blake3:{}", blake3::hash(key.as_bytes()).to_hex())
}

/// A key as it is configured.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Given {
    name: String,
    hash: String,
    /// May manage adapters, files and jobs, and read the metrics.
    #[serde(default)]
    admin: bool,
    /// The models it may ask for; all when not given.
    models: Option<Vec<String>>,
    requests_per_minute: Option<f64>,
    tokens_per_minute: Option<f64>,
}

/// Somebody who asks.
#[derive(Debug)]
pub(super) struct Key {
    /// In metrics and logs.
    pub name: String,
    hash: Option<blake3::Hash>,
    /// May manage adapters, files and jobs, and read the metrics.
    pub admin: bool,
    models: Option<Vec<String>>,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    /// What it was made from.
    given: Option<Given>,
}

impl Key {
    /// Who asks, for fair shares.
    pub fn client(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.name.hash(&mut hasher);
        hasher.finish()
    }

    /// Everybody, where no key is asked for.
    pub fn anonymous(admin: bool) -> Self {
        Self {
            name: "anonymous".to_owned(),
            hash: None,
            admin,
            models: None,
            requests: None,
            tokens: None,
            given: None,
        }
    }

    /// The only key, with all rights.
    pub fn only(text: &str) -> Self {
        Self { name: "default".to_owned(), hash: Some(blake3::hash(text.as_bytes())), ..Self::anonymous(true) }
    }

    /// Whether it may ask for a model of this name.
    pub fn may(&self, model: &str) -> bool {
        self.models.as_ref().is_none_or(|models| models.iter().any(|name| name == model))
    }

    /// Takes a request from the limit, or says how long to wait.
    pub fn request(&self) -> Result<(), Duration> {
        self.requests.as_ref().map_or(Ok(()), |bucket| bucket.take(1.0, Instant::now()))
    }

    /// Whether tokens are left, or how long to wait for them.
    pub fn tokens(&self) -> Result<(), Duration> {
        self.tokens.as_ref().map_or(Ok(()), |bucket| bucket.take(0.0, Instant::now()))
    }

    /// Takes what an answer cost from the limit.
    pub fn spend(&self, tokens: usize) {
        if let Some(bucket) = &self.tokens {
            bucket.spend(tokens as f64, Instant::now());
        }
    }
}

/// All keys.
#[derive(Debug, Default)]
pub(super) struct Keys(Vec<Arc<Key>>);

impl Keys {
    /// Keys from JSON: a list of objects; see `python/ftkit/serve/keys.py`, which reads the file.
    pub fn parse(text: &str) -> Result<Self> {
        let given: Vec<Given> = serde_json::from_str(text)
            .map_err(|error| Error::input(format!("keys: expected a list of keys, got {error}")))?;
        let mut keys = Vec::with_capacity(given.len());
        for given in given {
            let whole = Some(given.clone());
            let Given { name, hash, admin, models, requests_per_minute, tokens_per_minute } = given;
            let digits = hash.strip_prefix("blake3:").and_then(|digits| blake3::Hash::from_hex(digits).ok());
            let Some(hash) = digits else {
                return Err(Error::input(format!("keys: {name}: expected blake3: and 64 hexadecimal digits as hash")));
            };
            let bucket = |limit: Option<f64>| match limit {
                None => Ok(None),
                Some(limit) if (1.0..=1e12).contains(&limit) => Ok(Some(Bucket::new(limit))),
                Some(limit) => Err(Error::input(format!("keys: {name}: expected a limit of at least 1, got {limit}"))),
            };
            let (requests, tokens) = (bucket(requests_per_minute)?, bucket(tokens_per_minute)?);
            keys.push(Arc::new(Key { name, hash: Some(hash), admin, models, requests, tokens, given: whole }));
        }
        Ok(Self(keys))
    }

    /// The key of this text. Takes as long whether there is one or not, and whichever it is: hashes compare in constant
    /// time, and all of them are compared.
    pub fn find(&self, text: &str) -> Option<Arc<Key>> {
        let hash = blake3::hash(text.as_bytes());
        let mut found = None;
        for key in &self.0 {
            if key.hash.is_some_and(|known| known == hash) {
                found = Some(Arc::clone(key));
            }
        }
        found
    }
}

/// The keys of a server, which may change while it answers.
#[derive(Debug, Default)]
pub struct Ring(RwLock<Keys>);

impl Ring {
    /// These keys, as [`Keys::parse`] reads them, are all from now on. One that is as it was goes on where it is with
    /// its limits.
    ///
    /// # Errors
    /// They are no keys; then the ones before stay.
    pub fn replace(&self, text: &str) -> Result<()> {
        let mut keys = Keys::parse(text)?;
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for key in &mut keys.0 {
            if let Some(same) = all.0.iter().find(|old| old.given.is_some() && old.given == key.given) {
                *key = Arc::clone(same);
            }
        }
        // the one of the command line has no entry in a file
        keys.0.extend(all.0.iter().filter(|key| key.given.is_none()).cloned());
        *all = keys;
        Ok(())
    }

    /// One key more.
    pub(super) fn add(&self, key: Key) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).0.push(Arc::new(key));
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }

    /// The key of a text; see [`Keys::find`].
    pub(super) fn find(&self, text: &str) -> Option<Arc<Key>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).find(text)
    }
}

/// A minute's worth of something.
#[derive(Debug)]
struct Bucket {
    room: f64,
    /// What is left, and when that was.
    left: Mutex<(f64, Instant)>,
}

impl Bucket {
    fn new(a_minute: f64) -> Self {
        Self { room: a_minute, left: Mutex::new((a_minute, Instant::now())) }
    }

    /// Takes an amount if there is something left; else how long to wait.
    fn take(&self, amount: f64, now: Instant) -> Result<(), Duration> {
        let least = amount.max(f64::MIN_POSITIVE);
        let left = self.spend(0.0, now);
        if left >= least {
            self.spend(amount, now);
            return Ok(());
        }
        Err(Duration::from_secs_f64((least.max(1.0) - left) * 60.0 / self.room))
    }

    /// Takes an amount whether it is there or not; what is left.
    fn spend(&self, amount: f64, now: Instant) -> f64 {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let refilled = left.0 + now.saturating_duration_since(left.1).as_secs_f64() * self.room / 60.0;
        *left = (refilled.min(self.room) - amount, now);
        left.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_by_its_text_alone() {
        let hash = hashed("secret");
        let keys = Keys::parse(&format!("[{{\"name\": \"a\", \"hash\": \"{hash}\", \"models\": [\"m\"]}}]")).unwrap();
        let key = keys.find("secret").unwrap();
        assert!(key.may("m") && !key.may("M") && !key.admin);
        for other in ["", "Secret", "secret ", "secret\0", &hash] {
            assert!(keys.find(other).is_none(), "{other:?}");
        }
        for bad in [
            "{}",
            "[{\"name\": \"a\"}]",
            "[{\"name\": \"a\", \"hash\": \"secret\"}]",
            "[{\"name\": \"a\", \"hash\": \"blake3:00\"}]",
        ] {
            assert!(Keys::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_change_and_what_stays_keeps_its_limits() {
        let entry = |name: &str, limit: u32| {
            let hash = hashed(name);
            format!("{{\"name\": \"{name}\", \"hash\": \"{hash}\", \"requests_per_minute\": {limit}}}")
        };
        let ring = Ring::default();
        assert!(ring.is_empty());
        ring.add(Key::only("boss"));
        ring.replace(&format!("[{}, {}]", entry("a", 1), entry("b", 1))).unwrap();
        for name in ["a", "b"] {
            let key = ring.find(name).unwrap();
            assert!(key.request().is_ok() && key.request().is_err());
        }
        assert!(ring.replace("[{}]").is_err() && ring.find("b").is_some());
        ring.replace(&format!("[{}, {}]", entry("a", 1), entry("c", 1))).unwrap();
        assert!(ring.find("b").is_none() && ring.find("c").is_some() && ring.find("boss").unwrap().admin);
        assert!(ring.find("a").unwrap().request().is_err());
        ring.replace(&format!("[{}]", entry("a", 2))).unwrap();
        assert!(ring.find("a").unwrap().request().is_ok() && !ring.is_empty());
    }

    #[test]
    fn buckets_empty_and_refill() {
        let (bucket, start) = (Bucket::new(60.0), Instant::now());
        for _ in 0..60 {
            assert!(bucket.take(1.0, start).is_ok());
        }
        let wait = bucket.take(1.0, start).unwrap_err();
        assert!((0.9..=1.1).contains(&wait.as_secs_f64()), "{wait:?}");
        assert!(bucket.take(1.0, start + Duration::from_millis(1001)).is_ok());
        // An answer that cost more than was left: the key waits until it is paid.
        bucket.spend(30.0, start + Duration::from_millis(1001));
        let wait = bucket.take(0.0, start + Duration::from_millis(1001)).unwrap_err();
        assert!((29.0..=32.0).contains(&wait.as_secs_f64()), "{wait:?}");
        assert!(bucket.take(0.0, start + Duration::from_secs(33)).is_ok());
    }
}
