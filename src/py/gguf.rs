//! Bindings of the `gguf` room.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};
use rayon::prelude::*;

use super::quant::{Values, importance_of, kind_called};
use super::tensor::Memory;
use crate::error::{Error, Result};
use crate::gguf::{Array, Declared, File, TensorInfo, Value, Writer};
use crate::quant;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<GgufFile>()?;
    module.add_class::<GgufWriter>()?;
    Ok(())
}

/// An open, memory-mapped and checked GGUF file.
#[pyclass(frozen, module = "ftkit._core")]
pub(super) struct GgufFile {
    file: Arc<File>,
}

#[pymethods]
impl GgufFile {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let file = py.detach(|| File::open(&path))?;
        Ok(Self { file: Arc::new(file) })
    }

    /// Metadata: key → int, float, bool, str or list of these, in the file's order.
    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (key, value) in self.file.metadata().iter() {
            dict.set_item(key, value_to_python(py, value)?)?;
        }
        Ok(dict)
    }

    /// The types of the metadata: key → `u32`, `string`, `[f32]` and so on, in the file's order.
    #[getter]
    fn metadata_types<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (key, value) in self.file.metadata().iter() {
            dict.set_item(key, value.type_name())?;
        }
        Ok(dict)
    }

    /// Tensors in the file's order: (name, shape in torch's order, block format).
    #[getter]
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Vec<(String, Bound<'py, PyTuple>, &'static str)>> {
        self.file
            .tensors()
            .iter()
            .map(|tensor| Ok((tensor.name.clone(), PyTuple::new(py, &tensor.shape)?, tensor.kind.name())))
            .collect()
    }

    /// Writes a tensor's values to `out`: contiguous, on the CPU, of the same shape, float32, bfloat16 or float16.
    ///
    /// Raises InputError when there is no such tensor, the shape differs, or a value is NaN or infinite.
    fn read(&self, py: Python<'_>, name: &str, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let tensor = self.tensor(name)?;
        let dtype = out.getattr("dtype")?.str()?.to_string();
        match dtype.as_str() {
            "torch.bfloat16" => self.convert::<bf16>(py, tensor, out, bf16::from_f32),
            "torch.float16" => self.convert::<f16>(py, tensor, out, f16::from_f32),
            _ => self.convert::<f32>(py, tensor, out, |value| value),
        }
    }

    /// Writes a tensor's blocks as they are to `out`: contiguous uint8 on the CPU, as many as the tensor has bytes.
    fn read_blocks(&self, py: Python<'_>, name: &str, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let tensor = self.tensor(name)?;
        let memory = Memory::<u8>::of(name, out)?;
        if memory.len != tensor.nbytes {
            return Err(Error::failure(format!("{name}: expected {} bytes, got {}", tensor.nbytes, memory.len)).into());
        }
        // SAFETY: the caller's tensor lives during the call, and the caller gives it to be written.
        let out = unsafe { memory.slice_mut() };
        py.detach(|| out.copy_from_slice(self.file.data(tensor)));
        Ok(())
    }

    /// Where a tensor's blocks stand in the file: (first byte, number of bytes).
    fn place(&self, name: &str) -> PyResult<(usize, usize)> {
        let tensor = self.tensor(name)?;
        Ok((tensor.offset(), tensor.nbytes))
    }

    /// Raises InputError when a value of the tensor is NaN or infinite.
    fn check(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        let tensor = self.tensor(name)?;
        let (kind, blocks) = (tensor.kind, self.file.data(tensor));
        let size = quant::TASK_VALUES / kind.block_size() * kind.block_bytes();
        let checked = py.detach(|| {
            blocks.par_chunks(size).enumerate().try_for_each(|(task, blocks)| {
                let mut values = [0.0; quant::TASK_VALUES];
                let values = &mut values[..blocks.len() / kind.block_bytes() * kind.block_size()];
                kind.dequantize(blocks, values);
                quant::check_finite(values, task * quant::TASK_VALUES)
            })
        });
        self.file.let_go(tensor); // whoever uses the tensor maps the file on their own
        checked.map_err(|error| self.about(tensor, error))
    }

    fn __repr__(&self) -> String {
        format!("GgufFile({:?}, {} tensors)", self.file.path().display().to_string(), self.file.tensors().len())
    }
}

impl GgufFile {
    fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.file.tensor(name).ok_or_else(|| {
            Error::input(format!(
                "{}: expected a tensor {name:?}, got {} others",
                self.file.path().display(),
                self.file.tensors().len()
            ))
        })
    }

    fn convert<T: super::tensor::Element + Send + Sync>(
        &self,
        py: Python<'_>,
        tensor: &TensorInfo,
        out: &Bound<'_, PyAny>,
        round: impl Fn(f32) -> T + Sync,
    ) -> PyResult<()> {
        let memory = Memory::<T>::of(&tensor.name, out)?;
        if memory.shape != tensor.shape {
            return Err(Error::input(format!(
                "{}: tensor {:?}: expected the shape {:?}, got {:?}",
                self.file.path().display(),
                tensor.name,
                memory.shape,
                tensor.shape
            ))
            .into());
        }
        // SAFETY: the caller's tensor lives during the call, and the caller gives it to be written.
        let out = unsafe { memory.slice_mut() };
        let kind = tensor.kind;
        let blocks = self.file.data(tensor);
        let read = py.detach(|| {
            blocks
                .par_chunks(quant::TASK_VALUES / kind.block_size() * kind.block_bytes())
                .zip(out.par_chunks_mut(quant::TASK_VALUES))
                .enumerate()
                .try_for_each(|(task, (blocks, out))| {
                    let mut values = [0.0; quant::TASK_VALUES];
                    let values = &mut values[..out.len()];
                    kind.dequantize(blocks, values);
                    quant::check_finite(values, task * quant::TASK_VALUES)?;
                    for (out, &value) in out.iter_mut().zip(&*values) {
                        *out = round(value);
                    }
                    Ok(())
                })
        });
        read.map_err(|error: Error| self.about(tensor, error))
    }

    /// The error, with the tensor that it is about.
    fn about(&self, tensor: &TensorInfo, error: Error) -> PyErr {
        let place = format!("{}: tensor {:?}", self.file.path().display(), tensor.name);
        PyErr::from(Error { message: format!("{place}: {}", error.message), ..error })
    }
}

/// Writes a GGUF file: all is declared when it is made, then the tensors follow in that order; `finish` gives it its name.
#[pyclass(module = "ftkit._core")]
pub(super) struct GgufWriter {
    writer: Option<Writer>,
    tensors: HashMap<String, Declared>,
}

#[pymethods]
impl GgufWriter {
    /// `metadata`: (key, type, value) with the types of `GgufFile.metadata_types`; `tensors`: (name, shape, format).
    #[new]
    #[pyo3(signature = (path, metadata, tensors, overwrite = false))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        metadata: Vec<(String, String, Bound<'_, PyAny>)>,
        tensors: Vec<(String, Vec<usize>, String)>,
        overwrite: bool,
    ) -> PyResult<Self> {
        let metadata = metadata
            .into_iter()
            .map(|(key, kind, value)| {
                let value = value_from_python(&key, &kind, &value)?;
                Ok((key, value))
            })
            .collect::<PyResult<Vec<_>>>()?;
        let tensors = tensors
            .into_iter()
            .map(|(name, shape, kind)| Ok(Declared { name, shape, kind: kind_called(&kind)? }))
            .collect::<Result<Vec<_>>>()?;
        let writer = py.detach(|| Writer::create(&path, overwrite, &metadata, &tensors))?;
        let tensors = tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        Ok(Self { writer: Some(writer), tensors })
    }

    /// Quantizes the values (float32, bfloat16 or float16, contiguous, on the CPU) to the tensor's format and writes them;
    /// errors count by their column's `importance` (float32).
    #[pyo3(signature = (name, values, importance = None))]
    fn write(
        &mut self,
        py: Python<'_>,
        name: &str,
        values: &Bound<'_, PyAny>,
        importance: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let declared = declared(&self.tensors, name)?;
        let values = Values::of(name, values)?;
        if values.shape() != declared.shape {
            return Err(Error::failure(format!(
                "tensor {name:?}: expected the shape {:?}, got {:?}",
                declared.shape,
                values.shape()
            ))
            .into());
        }
        let importance = importance_of(importance, values.shape())?;
        let writer = open(&mut self.writer)?;
        py.detach(|| values.in_pieces(declared.kind, importance.as_ref(), |blocks| writer.write(name, blocks)))
            .map_err(|error| PyErr::from(Error { message: format!("tensor {name:?}: {}", error.message), ..error }))
    }

    /// Writes the tensor's blocks as they are (uint8, contiguous, on the CPU).
    fn write_blocks(&mut self, py: Python<'_>, name: &str, blocks: &Bound<'_, PyAny>) -> PyResult<()> {
        let expected = declared(&self.tensors, name)?.nbytes()?;
        let memory = Memory::<u8>::of(name, blocks)?;
        if memory.len != expected {
            return Err(Error::failure(format!("{name}: expected {expected} bytes, got {}", memory.len)).into());
        }
        // SAFETY: the caller's tensor lives during the call and nobody writes to it.
        let blocks = unsafe { memory.slice() };
        let writer = open(&mut self.writer)?;
        Ok(py.detach(|| writer.write(name, blocks))?)
    }

    /// Syncs the file, gives it its name, and returns its size in bytes.
    fn finish(&mut self, py: Python<'_>) -> PyResult<u64> {
        open(&mut self.writer)?;
        match self.writer.take() {
            Some(writer) => Ok(py.detach(|| writer.finish())?),
            None => Ok(0), // not reached: `open` found it
        }
    }

    /// Drops what was written so far; nothing remains of the file.
    fn abandon(&mut self) {
        self.writer = None;
    }
}

fn open(writer: &mut Option<Writer>) -> Result<&mut Writer> {
    writer.as_mut().ok_or_else(|| Error::failure("expected an open writer, got one that has ended"))
}

fn declared<'a>(tensors: &'a HashMap<String, Declared>, name: &str) -> Result<&'a Declared> {
    tensors.get(name).ok_or_else(|| Error::failure(format!("expected a declared tensor, got {name:?}")))
}

fn value_from_python(key: &str, kind: &str, value: &Bound<'_, PyAny>) -> PyResult<Value> {
    let wrong = |error: PyErr| {
        PyErr::from(Error::input(format!(
            "metadata {key:?}: expected a value of the type {kind}, got {value:?}: {error}"
        )))
    };
    let read = || -> PyResult<Option<Value>> {
        Ok(Some(match kind {
            "u8" => Value::U8(value.extract()?),
            "i8" => Value::I8(value.extract()?),
            "u16" => Value::U16(value.extract()?),
            "i16" => Value::I16(value.extract()?),
            "u32" => Value::U32(value.extract()?),
            "i32" => Value::I32(value.extract()?),
            "f32" => Value::F32(value.extract()?),
            "bool" => Value::Bool(value.extract()?),
            "string" => Value::String(value.extract()?),
            "u64" => Value::U64(value.extract()?),
            "i64" => Value::I64(value.extract()?),
            "f64" => Value::F64(value.extract()?),
            "[u8]" => Value::Array(Array::U8(value.try_iter()?.map(|item| item?.extract()).collect::<PyResult<_>>()?)),
            "[i8]" => Value::Array(Array::I8(value.extract()?)),
            "[u16]" => Value::Array(Array::U16(value.extract()?)),
            "[i16]" => Value::Array(Array::I16(value.extract()?)),
            "[u32]" => Value::Array(Array::U32(value.extract()?)),
            "[i32]" => Value::Array(Array::I32(value.extract()?)),
            "[f32]" => Value::Array(Array::F32(value.extract()?)),
            "[bool]" => Value::Array(Array::Bool(value.extract()?)),
            "[string]" => Value::Array(Array::String(value.extract()?)),
            "[u64]" => Value::Array(Array::U64(value.extract()?)),
            "[i64]" => Value::Array(Array::I64(value.extract()?)),
            "[f64]" => Value::Array(Array::F64(value.extract()?)),
            _ => return Ok(None),
        }))
    };
    read().map_err(wrong)?.ok_or_else(|| {
        Error::input(format!("metadata {key:?}: expected a type such as u32, string or [f32], got {kind:?}")).into()
    })
}

fn value_to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::U8(value) => value.into_pyobject(py)?.into_any(),
        Value::I8(value) => value.into_pyobject(py)?.into_any(),
        Value::U16(value) => value.into_pyobject(py)?.into_any(),
        Value::I16(value) => value.into_pyobject(py)?.into_any(),
        Value::U32(value) => value.into_pyobject(py)?.into_any(),
        Value::I32(value) => value.into_pyobject(py)?.into_any(),
        Value::F32(value) => value.into_pyobject(py)?.into_any(),
        Value::Bool(value) => value.into_pyobject(py)?.to_owned().into_any(),
        Value::String(value) => value.into_pyobject(py)?.into_any(),
        Value::Array(value) => array_to_python(py, value)?.into_any(),
        Value::U64(value) => value.into_pyobject(py)?.into_any(),
        Value::I64(value) => value.into_pyobject(py)?.into_any(),
        Value::F64(value) => value.into_pyobject(py)?.into_any(),
    })
}

fn array_to_python<'py>(py: Python<'py>, array: &Array) -> PyResult<Bound<'py, PyList>> {
    match array {
        Array::U8(items) => PyList::new(py, items),
        Array::I8(items) => PyList::new(py, items),
        Array::U16(items) => PyList::new(py, items),
        Array::I16(items) => PyList::new(py, items),
        Array::U32(items) => PyList::new(py, items),
        Array::I32(items) => PyList::new(py, items),
        Array::F32(items) => PyList::new(py, items),
        Array::Bool(items) => PyList::new(py, items),
        Array::String(items) => PyList::new(py, items),
        Array::U64(items) => PyList::new(py, items),
        Array::I64(items) => PyList::new(py, items),
        Array::F64(items) => PyList::new(py, items),
        Array::Array(items) => {
            let lists = items.iter().map(|item| array_to_python(py, item)).collect::<PyResult<Vec<_>>>()?;
            PyList::new(py, lists)
        }
    }
}
