//! Memory of packed matrices: one after the other, on large pages where the system has them.
//!
//! A product reads whole matrices in order, so what a processor fetches ahead beyond the end of one should be the next
//! one, and few pages mean few misses in its tables of them.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use memmap2::MmapMut;

use crate::error::{Error, Result};

/// Bytes that are asked of the system together; what nobody writes to takes no memory.
const CHUNK: usize = 64 << 20;
/// Where a matrix may begin: a line of the cache.
const LINE: usize = 64;

/// Bytes that belong to one matrix.
#[derive(Debug)]
pub(super) struct Bytes {
    chunk: Arc<Chunk>,
    range: Range<usize>,
}

#[derive(Debug)]
struct Chunk {
    start: *mut u8,
    len: usize,
    _map: MmapMut,
}

// SAFETY: a chunk only hands out its address; who has which range is up to `Bytes`.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(len: usize) -> Result<Self> {
        let failed =
            |error| Error::failure(format!("expected memory for {len} bytes of packed matrices, got: {error}"));
        let mut map = MmapMut::map_anon(len).map_err(failed)?;
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage); // without them it is only slower
        Ok(Self { start: map.as_mut_ptr(), len, _map: map })
    }
}

impl Bytes {
    /// Zeros, behind those of the matrix before.
    ///
    /// # Errors
    /// The system has no memory.
    pub fn zeros(len: usize) -> Result<Self> {
        /// The chunk that is being filled, and how far it is.
        static OPEN: Mutex<Option<(Weak<Chunk>, usize)>> = Mutex::new(None);
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        // it goes with the last of its matrices
        let found = open.take().and_then(|(chunk, used)| Some((chunk.upgrade()?, used)));
        let fitting = found.filter(|(chunk, used)| chunk.len - used >= len);
        let (chunk, used) = match fitting {
            Some(found) => found,
            None => (Arc::new(Chunk::new(len.max(CHUNK))?), 0),
        };
        let range = used..used + len;
        *open = Some((Arc::downgrade(&chunk), range.end.next_multiple_of(LINE).min(chunk.len)));
        Ok(Self { chunk, range })
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the range is inside the chunk, which lives as long as this, and nobody else has it: `zeros` gives each
        // place out once.
        unsafe { std::slice::from_raw_parts(self.chunk.start.add(self.range.start), self.range.len()) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and this is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.chunk.start.add(self.range.start), self.range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_zeros_of_its_own() {
        let mut all: Vec<Bytes> = [1, 64, 65, 0, 1 << 20, CHUNK + 1, 7].map(|len| Bytes::zeros(len).unwrap()).into();
        for (index, bytes) in all.iter_mut().enumerate() {
            assert!(bytes.as_slice().iter().all(|&byte| byte == 0));
            assert!(bytes.as_slice().is_empty() || bytes.as_slice().as_ptr().addr().is_multiple_of(LINE));
            bytes.as_mut_slice().fill(index as u8 + 1);
        }
        for (index, bytes) in all.iter().enumerate() {
            assert!(bytes.as_slice().iter().all(|&byte| byte == index as u8 + 1));
        }
    }
}
