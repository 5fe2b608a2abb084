//! torch tensors as slices: the one place where a tensor's memory becomes ours for the length of a call.
//!
//! torch allocates, the core computes: ops get tensors that the caller made, check what they are, and write into them.

use bytemuck::Pod;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::error::Error;

/// Element types that the core shares with torch, by torch's names.
pub(super) trait Element: Pod {
    /// torch's name of the type, such as `torch.float32`.
    const NAME: &'static str;
    /// torch's object of the type, of which there is one.
    fn dtype(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>>;
}

macro_rules! elements {
    ($($rust:ty => $torch:literal),* $(,)?) => {
        $(impl Element for $rust {
            const NAME: &'static str = concat!("torch.", $torch);
            fn dtype(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
                static FOUND: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
                let found = FOUND.get_or_try_init(py, || Ok::<_, PyErr>(py.import("torch")?.getattr($torch)?.unbind()))?;
                Ok(found.bind(py))
            }
        })*
    };
}
elements! {
    u8 => "uint8", i32 => "int32", i64 => "int64", f32 => "float32", half::bf16 => "bfloat16", half::f16 => "float16",
}

/// The block with `$T` as what the tensor's numbers are: bf16, or else float32.
macro_rules! of_numbers {
    ($tensor:expr, $T:ident, $block:block) => {
        if $tensor.getattr("dtype")?.is(<half::bf16 as crate::py::tensor::Element>::dtype($tensor.py())?) {
            type $T = half::bf16;
            $block
        } else {
            type $T = f32;
            $block
        }
    };
}
pub(super) use of_numbers;

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
        let py = tensor.py();
        let dtype = tensor.getattr(intern!(py, "dtype"))?;
        if !dtype.is(T::dtype(py)?) {
            return Err(Error::failure(format!("{name}: expected dtype {}, got {dtype}", T::NAME)).into());
        }
        if !tensor.getattr(intern!(py, "is_cpu"))?.extract::<bool>()? {
            let device = tensor.getattr(intern!(py, "device"))?;
            return Err(Error::failure(format!("{name}: expected a cpu tensor, got {device}")).into());
        }
        if !tensor.call_method0(intern!(py, "is_contiguous"))?.extract::<bool>()? {
            return Err(Error::failure(format!("{name}: expected a contiguous tensor")).into());
        }
        let shape: Vec<usize> = tensor.getattr(intern!(py, "shape"))?.extract()?;
        let pointer: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
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
