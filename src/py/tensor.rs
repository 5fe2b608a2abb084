//! torch tensors as slices: the one place where a tensor's memory becomes ours for the length of a call.
//!
//! torch allocates, the core computes: ops get tensors that the caller made, check what they are, and write into them.

use bytemuck::Pod;
use pyo3::prelude::*;

use crate::error::Error;

/// Element types that the core shares with torch, by torch's names.
pub(super) trait Element: Pod {
    /// torch's name of the type, such as `torch.float32`.
    const NAME: &'static str;
}

macro_rules! elements {
    ($($rust:ty => $torch:literal),* $(,)?) => {
        $(impl Element for $rust { const NAME: &'static str = $torch; })*
    };
}
elements! {
    u8 => "torch.uint8", i32 => "torch.int32", i64 => "torch.int64",
    f32 => "torch.float32", half::bf16 => "torch.bfloat16", half::f16 => "torch.float16",
}

/// A contiguous CPU tensor's memory. Holds no reference: the caller keeps the tensor alive during the call.
pub(super) struct Memory<T> {
    pointer: *mut T,
    /// Number of elements.
    pub len: usize,
    /// The tensor's shape.
    pub shape: Vec<usize>,
}

// SAFETY: the memory belongs to a tensor that the calling thread keeps alive for the whole call; exclusive or shared
// use is the contract of `slice` and `slice_mut`.
unsafe impl<T: Send> Send for Memory<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Sync> Sync for Memory<T> {}

impl<T: Element> Memory<T> {
    /// Checks dtype, device and contiguity of the tensor called `name` in messages.
    pub fn of(name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        let dtype = tensor.getattr("dtype")?.str()?.to_string();
        if dtype != T::NAME {
            return Err(Error::failure(format!("{name}: expected dtype {}, got {dtype}", T::NAME)).into());
        }
        let device: String = tensor.getattr("device")?.getattr("type")?.extract()?;
        if device != "cpu" {
            return Err(Error::failure(format!("{name}: expected a cpu tensor, got {device}")).into());
        }
        if !tensor.call_method0("is_contiguous")?.extract::<bool>()? {
            return Err(Error::failure(format!("{name}: expected a contiguous tensor")).into());
        }
        let shape: Vec<usize> = tensor.getattr("shape")?.extract()?;
        let pointer: usize = tensor.call_method0("data_ptr")?.extract()?;
        if !pointer.is_multiple_of(align_of::<T>()) {
            return Err(Error::failure(format!("{name}: expected memory aligned to {} bytes", align_of::<T>())).into());
        }
        Ok(Self { pointer: pointer as *mut T, len: shape.iter().product(), shape })
    }

    /// The elements, for reading.
    ///
    /// # Safety
    /// The tensor lives, and nobody writes to it, while the slice is in use.
    pub unsafe fn slice(&self) -> &[T] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: non-null (len > 0), aligned (checked), `len` elements of a Pod type; the rest is the caller's.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }

    /// The elements, for writing.
    ///
    /// # Safety
    /// The tensor lives, and nobody else touches it, while the slice is in use.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice_mut(&self) -> &mut [T] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: non-null (len > 0), aligned (checked), `len` elements of a Pod type; the rest is the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}
