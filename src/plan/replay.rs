//! Replays a trace and finds its peak.

use std::collections::HashMap;

use crate::error::{Error, Result};

/// One line of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A storage is born.
    Allocate {
        /// Name of the storage, unique among the living.
        id: u64,
        /// Its size.
        bytes: u64,
        /// Index of the category that it is counted under.
        category: usize,
    },
    /// A storage dies.
    Free {
        /// Name of the storage.
        id: u64,
    },
}

/// The moment at which most memory is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peak {
    /// Bytes in use at the peak.
    pub bytes: u64,
    /// The same, by category.
    pub by_category: Vec<u64>,
    /// Index of the event that reached it; 0 for an empty trace.
    pub event: usize,
    /// Bytes in use when the trace ends.
    pub left: u64,
}

/// The peak of `events` over `categories` categories, counting every storage at its exact size.
///
/// # Errors
/// A trace that frees what does not live, allocates what lives, names an unknown category or exceeds 2⁶⁴ bytes.
pub fn peak(events: &[Event], categories: usize) -> Result<Peak> {
    let mut living: HashMap<u64, (u64, usize)> = HashMap::new();
    let mut used = vec![0_u64; categories];
    let mut total = 0_u64;
    let mut best = Peak { bytes: 0, by_category: used.clone(), event: 0, left: 0 };
    for (index, event) in events.iter().enumerate() {
        match *event {
            Event::Allocate { id, bytes, category } => {
                let Some(share) = used.get_mut(category) else {
                    return Err(Error::failure(format!(
                        "trace event {index}: expected a category below {categories}, got {category}"
                    )));
                };
                if living.insert(id, (bytes, category)).is_some() {
                    return Err(Error::failure(format!("trace event {index}: storage {id} is allocated twice")));
                }
                total = total
                    .checked_add(bytes)
                    .ok_or_else(|| Error::failure(format!("trace event {index}: more than 2^64 bytes in use")))?;
                *share += bytes; // no overflow: a share is at most the total
                if total > best.bytes {
                    best = Peak { bytes: total, by_category: used.clone(), event: index, left: 0 };
                }
            }
            Event::Free { id } => {
                let Some((bytes, category)) = living.remove(&id) else {
                    return Err(Error::failure(format!("trace event {index}: storage {id} is freed but not in use")));
                };
                total -= bytes;
                used[category] -= bytes;
            }
        }
    }
    best.left = total;
    Ok(best)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn allocate(id: u64, bytes: u64, category: usize) -> Event {
        Event::Allocate { id, bytes, category }
    }

    #[test]
    fn the_peak_is_where_most_lives_at_once() {
        let events = [allocate(1, 100, 0), allocate(2, 50, 1), Event::Free { id: 1 }, allocate(3, 70, 1)];
        let found = peak(&events, 2).unwrap();
        assert_eq!(found, Peak { bytes: 150, by_category: vec![100, 50], event: 1, left: 120 });
    }

    #[test]
    fn a_broken_trace_is_an_error() {
        assert!(peak(&[Event::Free { id: 1 }], 1).is_err());
        assert!(peak(&[allocate(1, 1, 1)], 1).is_err());
        assert!(peak(&[allocate(1, 1, 0), allocate(1, 1, 0)], 1).is_err());
        assert!(peak(&[allocate(1, u64::MAX, 0), allocate(2, 1, 0)], 1).is_err());
    }

    proptest! {
        // Against the definition: the largest sum of what lives after any event.
        #[test]
        fn equals_the_definition(steps in prop::collection::vec((0_u64..20, 0_u64..1000, 0_usize..3), 0..200)) {
            let mut events = Vec::new();
            let mut living: Vec<(u64, u64, usize)> = Vec::new();
            let (mut expected, mut shares) = (0, vec![0; 3]);
            for (id, bytes, category) in steps {
                if let Some(at) = living.iter().position(|&(other, _, _)| other == id) {
                    living.remove(at);
                    events.push(Event::Free { id });
                } else {
                    living.push((id, bytes, category));
                    events.push(allocate(id, bytes, category));
                }
                let sum: u64 = living.iter().map(|l| l.1).sum();
                if sum > expected {
                    expected = sum;
                    shares = (0..3).map(|c| living.iter().filter(|l| l.2 == c).map(|l| l.1).sum()).collect();
                }
            }
            let found = peak(&events, 3).unwrap();
            prop_assert_eq!(found.bytes, expected);
            prop_assert_eq!(found.by_category, shares);
            prop_assert_eq!(found.left, living.iter().map(|l| l.1).sum::<u64>());
        }
    }
}
