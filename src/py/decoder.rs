//! Bindings of the `decoder` room and of the products with matrices of blocks.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use half::{bf16, f16};
use pyo3::prelude::*;

use super::form::LoraForm;
use super::quant::kind_called;
use super::tensor::{Element, Memory, of_numbers};
use crate::decoder::attention::{self, Layout, Rows, Value};
use crate::decoder::kept::Kept;
use crate::decoder::lora::Lora;
use crate::decoder::step::{Entrance, Tokens};
use crate::decoder::{Batch, Head, Layer, Layers, Linear, Weight};
use crate::error::Error;
use crate::quant::coded::{Numbers, Table};
use crate::quant::int8::{self, Packed};
use crate::quant::matmul::halves::{self, Sums};
use crate::quant::matmul::{self, Matrix};
use crate::team::{self, Team};

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<DecoderLayers>()?;
    module.add_class::<DecoderStep>()?;
    module.add_class::<PackedMatrix>()?;
    module.add_class::<CodedMatrix>()?;
    module.add_function(wrap_pyfunction!(paged_attention, module)?)?;
    module.add_function(wrap_pyfunction!(set_threads, module)?)?;
    module.add_function(wrap_pyfunction!(multiplies_bfloat16, module)?)?;
    module.add_function(wrap_pyfunction!(block_matmul, module)?)?;
    module.add_function(wrap_pyfunction!(block_matmul_transposed, module)?)
}

/// Bounds the threads of the products and steps to come.
#[pyfunction]
fn set_threads(count: usize) {
    team::set_threads(count);
}

/// Whether products in bfloat16 are ours.
#[pyfunction]
fn multiplies_bfloat16() -> bool {
    halves::usable()
}

/// Writes x Wᵀ to `out`, both float32 or both bfloat16: x [T, in], W uint8 [out, bytes of a row] in blocks of `kind`; in
/// training, in whatever order is fastest here.
#[pyfunction]
fn block_matmul(
    py: Python<'_>,
    kind: &str,
    blocks: &Bound<'_, PyAny>,
    x: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    training: bool,
) -> PyResult<()> {
    let blocks = Memory::<u8>::of("blocks", blocks)?;
    // SAFETY: the caller's tensor lives during the call and is given to be read.
    let matrix = unsafe { matrix_of(kind, &blocks, x)? };
    product(py, matrix, x, out, training)
}

/// Writes dy W to `out`: dy [T, out] and `out` [T, in] float32, or dy bfloat16 and `out` either; W uint8
/// [out, bytes of a row] in blocks of `kind`.
#[pyfunction]
fn block_matmul_transposed(
    py: Python<'_>,
    kind: &str,
    blocks: &Bound<'_, PyAny>,
    dy: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let blocks = Memory::<u8>::of("blocks", blocks)?;
    // SAFETY: the caller's tensor lives during the call and is given to be read.
    let matrix = unsafe { matrix_of(kind, &blocks, out)? };
    product_transposed(py, matrix, dy, out)
}

/// W of as many columns as `inputs` has.
///
/// # Safety
/// As of [`Memory::slice`].
pub(super) unsafe fn matrix_of<'a>(
    kind: &str,
    blocks: &'a Memory<u8>,
    inputs: &Bound<'_, PyAny>,
) -> PyResult<Matrix<'a>> {
    let shape: Vec<usize> = inputs.getattr("shape")?.extract()?;
    let (&[rows, _], &[_, columns]) = (blocks.shape.as_slice(), shape.as_slice()) else {
        return Err(Error::failure(format!("expected two matrices, got {:?} and {shape:?}", blocks.shape)).into());
    };
    // SAFETY: the caller's promise.
    Ok(Matrix::new(kind_called(kind)?, unsafe { blocks.slice() }, rows, columns)?)
}

fn product(
    py: Python<'_>,
    matrix: Matrix<'_>,
    x: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    training: bool,
) -> PyResult<()> {
    of_numbers!(x, T, {
        let (x, out) = (Memory::<T>::of("x", x)?, Memory::<T>::of("out", out)?);
        // SAFETY: the caller's tensors live during the call; `out` is new and given to be written, x to be read.
        let (x, out) = unsafe { (x.slice(), out.slice_mut()) };
        Ok(py.detach(|| Team::run(|team| T::multiply(team, matrix, x, out, training)))?)
    })
}

fn product_transposed(
    py: Python<'_>,
    matrix: Matrix<'_>,
    dy: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    if !dy.getattr("dtype")?.is(bf16::dtype(py)?) {
        let (dy, out) = (Memory::<f32>::of("dy", dy)?, Memory::<f32>::of("out", out)?);
        // SAFETY: the caller's tensors live during the call; `out` is new and given to be written, dy to be read.
        let (dy, out) = unsafe { (dy.slice(), out.slice_mut()) };
        return Ok(py.detach(|| Team::run(|team| matmul::matmul_transposed(team, matrix, dy, out)))?);
    }
    let dy = Memory::<bf16>::of("dy", dy)?;
    of_numbers!(out, T, {
        let out = Memory::<T>::of("out", out)?;
        // SAFETY: as above.
        let (dy, out) = unsafe { (dy.slice(), out.slice_mut()) };
        Ok(py.detach(|| Team::run(|team| halves::matmul_transposed(team, matrix, dy, T::sums(out))))?)
    })
}

/// What products are made of.
trait Factor: Sized {
    fn multiply(team: &Team, matrix: Matrix<'_>, x: &[Self], y: &mut [Self], training: bool) -> Result<(), Error>;
    fn sums(out: &mut [Self]) -> Sums<'_>;
}

impl Factor for f32 {
    fn multiply(team: &Team, matrix: Matrix<'_>, x: &[Self], y: &mut [Self], training: bool) -> Result<(), Error> {
        if training { matmul::matmul_in_training(team, matrix, x, y) } else { matmul::matmul(team, &[matrix], x, y) }
    }
    fn sums(out: &mut [Self]) -> Sums<'_> {
        Sums::Whole(out)
    }
}

impl Factor for bf16 {
    fn multiply(team: &Team, matrix: Matrix<'_>, x: &[Self], y: &mut [Self], _training: bool) -> Result<(), Error> {
        halves::matmul(team, matrix, x, y)
    }
    fn sums(out: &mut [Self]) -> Sums<'_> {
        Sums::Rounded(out)
    }
}

/// A matrix packed for products with activations in 8 bits.
#[pyclass(module = "ftkit._core", frozen)]
struct PackedMatrix(Arc<Packed>);

#[pymethods]
impl PackedMatrix {
    /// Packs blocks uint8 [out, bytes of a row]; None for formats that aren't whole numbers.
    #[staticmethod]
    fn of(py: Python<'_>, kind: &str, blocks: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let kind = kind_called(kind)?;
        let blocks = Memory::<u8>::of("blocks", blocks)?;
        let &[rows, bytes] = blocks.shape.as_slice() else {
            return Err(Error::failure(format!("expected a matrix of blocks, got {:?}", blocks.shape)).into());
        };
        // SAFETY: the caller's tensor lives during the call and is given to be read.
        let slice = unsafe { blocks.slice() };
        let columns = bytes / kind.block_bytes() * kind.block_size();
        let packed = py.detach(|| Packed::new(kind, slice, rows, columns))?;
        Ok(packed.map(|packed| Self(Arc::new(packed))))
    }

    /// Bytes that are held.
    #[getter]
    fn nbytes(&self) -> usize {
        self.0.nbytes()
    }

    /// Writes x Wᵀ to `out`: x float32 [T, in], rounded; out [T, out].
    fn matmul(&self, py: Python<'_>, x: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let (x, out) = (Memory::<f32>::of("x", x)?, Memory::<f32>::of("out", out)?);
        // SAFETY: the caller's tensors live during the call; `out` is new and given to be written, x to be read.
        let (x, out) = unsafe { (x.slice(), out.slice_mut()) };
        Ok(py.detach(|| Team::run(|team| int8::matmul(team, &[&*self.0], x, out)))?)
    }
}

/// A matrix of codes into a table, over the memory of tensors.
#[pyclass(module = "ftkit._core", frozen)]
pub(super) struct CodedMatrix {
    /// Borrows from the tensors that `_tensors` keeps.
    pub(super) matrix: Matrix<'static>,
    _tensors: Vec<Py<PyAny>>,
}

#[pymethods]
impl CodedMatrix {
    #[new]
    #[pyo3(signature = (codes, table, shape, group, scales, nested = None, offsets = None))]
    fn new(
        codes: &Bound<'_, PyAny>,
        table: Option<&Bound<'_, PyAny>>,
        shape: (usize, usize),
        group: usize,
        scales: &Bound<'_, PyAny>,
        nested: Option<(Bound<'_, PyAny>, Bound<'_, PyAny>, f32)>,
        offsets: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let mut keep = Keep(Vec::new());
        let codes = keep.memory::<u8>("codes", codes)?.0;
        let table = match table {
            None => Table::Signed,
            Some(table) => {
                let table = keep.vector(table)?;
                match (<&[f32; 16]>::try_from(table), <&[f32; 256]>::try_from(table)) {
                    (Ok(table), _) => Table::Four(table),
                    (_, Ok(table)) => Table::Eight(table),
                    _ => return Err(Error::failure(format!("table: expected 16 or 256, got {}", table.len())).into()),
                }
            }
        };
        let scales = match nested {
            None => keep.numbers(scales)?,
            Some((map, greatest, mean)) => {
                let map = keep.vector(&map)?;
                let map = map.try_into().map_err(|_| Error::failure("map: expected 256 numbers, got others"))?;
                let codes = keep.memory::<u8>("scales", scales)?.0;
                Numbers::Nested { codes, map, greatest: keep.vector(&greatest)?, mean }
            }
        };
        let offsets = offsets.map(|offsets| keep.numbers(offsets)).transpose()?;
        let matrix = Matrix::coded(table, codes, shape.0, shape.1, group, scales, offsets)?;
        Ok(Self { matrix, _tensors: keep.0 })
    }

    /// Writes x Wᵀ to `out`, both float32 or both bfloat16: x [T, in], out [T, out]; in training, in whatever order is
    /// fastest here.
    fn matmul(&self, py: Python<'_>, x: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>, training: bool) -> PyResult<()> {
        product(py, self.matrix, x, out, training)
    }

    /// Writes dy W to `out`: dy [T, out] and out [T, in] float32, or dy bfloat16 and `out` either.
    fn matmul_transposed(&self, py: Python<'_>, dy: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        product_transposed(py, self.matrix, dy, out)
    }

    /// Writes W to `out`, float32 [out, in].
    fn dequantize(&self, py: Python<'_>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let out = Memory::<f32>::of("out", out)?;
        // SAFETY: the caller's tensor lives during the call and is new and given to be written.
        let out = unsafe { out.slice_mut() };
        Ok(py.detach(|| Team::run(|team| self.matrix.dequantize(team, out)))?)
    }
}

/// How a matrix is given.
#[derive(FromPyObject)]
enum GivenWeight<'py> {
    Packed(Py<PackedMatrix>),
    Coded(Py<CodedMatrix>),
    /// (format, blocks uint8 [out, bytes of a row])
    Exact(String, Bound<'py, PyAny>),
}

/// (matrix, inputs, bias or None)
type GivenLinear<'py> = (GivenWeight<'py>, usize, Option<Bound<'py, PyAny>>);
/// (A, B, whether B is given by columns, scale), or None where an adapter adds nothing
type GivenLora<'py> = Option<(Bound<'py, PyAny>, Bound<'py, PyAny>, bool, f32)>;
/// (norms, norms of heads, window, linear layers from q to down)
type GivenLayer<'py> = (Vec<Bound<'py, PyAny>>, Vec<Bound<'py, PyAny>>, Option<usize>, Vec<GivenLinear<'py>>);

/// A decoder's layers over the memory of the model's tensors.
#[pyclass(module = "ftkit._core", frozen)]
struct DecoderLayers {
    /// Borrows from the tensors that `_tensors` keeps.
    layers: RwLock<Layers<'static>>,
    /// What the adapters borrow from.
    adapters: Mutex<HashMap<i32, Vec<Py<PyAny>>>>,
    _tensors: Vec<Py<PyAny>>,
}

#[pymethods]
impl DecoderLayers {
    #[new]
    fn new(
        layers: Vec<GivenLayer<'_>>,
        head: Option<(Bound<'_, PyAny>, GivenLinear<'_>)>,
        heads: usize,
        key_value_heads: usize,
        head_dim: usize,
        epsilon: f32,
    ) -> PyResult<Self> {
        let mut keep = Keep(Vec::new());
        let layers = layers.into_iter().map(|layer| keep.layer(layer)).collect::<PyResult<_>>()?;
        let head = head.map(|(norm, linear)| -> PyResult<_> {
            Ok(Head { norm: keep.vector(&norm)?, linear: keep.linear(linear)? })
        });
        let head = head.transpose()?;
        let layers = Layers::new(layers, head, heads, key_value_heads, head_dim, epsilon)?;
        Ok(Self { layers: RwLock::new(layers), adapters: Mutex::new(HashMap::new()), _tensors: keep.0 })
    }

    /// Puts an adapter on the layers: what it adds to each linear layer, in order, the head's last.
    fn add_adapter(&self, adapter: i32, loras: Vec<GivenLora<'_>>) -> PyResult<()> {
        let mut keep = Keep(Vec::new());
        let mut lora = |given: GivenLora<'_>| -> PyResult<_> {
            given
                .map(|(a, b, by_columns, scale)| {
                    let ((a, inputs), (b, outputs)) = (keep.dense(&a, true)?, keep.dense(&b, by_columns)?);
                    Ok(Lora::new((a, inputs), (b, outputs), by_columns, scale)?)
                })
                .transpose()
        };
        let loras = loras.into_iter().map(&mut lora).collect::<PyResult<_>>()?;
        self.layers.write().unwrap_or_else(PoisonError::into_inner).add_adapter(adapter, loras)?;
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner).insert(adapter, keep.0);
        Ok(())
    }

    /// Puts an adapter on the layers whose matrices lie in these pages of a pool, uint8 [P, bytes of a page].
    #[allow(clippy::needless_pass_by_value)]
    fn add_paged_adapter(
        &self,
        adapter: i32,
        form: &LoraForm,
        pool: &Bound<'_, PyAny>,
        pages: Vec<u32>,
    ) -> PyResult<()> {
        let mut keep = Keep(Vec::new());
        let pool = keep.memory::<u8>("pool", pool)?.0;
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        let loras = form.0.loras(pool, &pages, layers.linears())?;
        layers.add_adapter(adapter, loras)?;
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner).insert(adapter, keep.0);
        Ok(())
    }

    /// Takes an adapter off the layers.
    fn remove_adapter(&self, adapter: i32) {
        self.layers.write().unwrap_or_else(PoisonError::into_inner).remove_adapter(adapter);
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner).remove(&adapter);
    }

    /// Whether there is a head.
    #[getter]
    fn has_head(&self) -> bool {
        self.layers.read().unwrap_or_else(PoisonError::into_inner).has_head()
    }

    /// Computes `x` [T, d] through all layers, in place; keys and values go to `pages`.
    #[allow(clippy::too_many_arguments)]
    fn forward(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        cos: &Bound<'_, PyAny>,
        sin: &Bound<'_, PyAny>,
        positions: &Bound<'_, PyAny>,
        cu_seqlens: &Bound<'_, PyAny>,
        block_table: &Bound<'_, PyAny>,
        pages: &Bound<'_, PyAny>,
        spans: Vec<(i32, usize, usize)>,
    ) -> PyResult<()> {
        let x = Memory::<f32>::of("x", x)?;
        let (cos, sin) = (Memory::<f32>::of("cos", cos)?, Memory::<f32>::of("sin", sin)?);
        let positions = Memory::<i32>::of("positions", positions)?;
        let cu_seqlens = Memory::<i32>::of("cu_seqlens", cu_seqlens)?;
        let block_table = Memory::<i32>::of("block_table", block_table)?;
        let (pages, block_tokens) = Pages::of(pages)?;
        py.detach(|| {
            // SAFETY: the caller's tensors live during the call; `x` is given to be written and is nobody else's while
            // the engine's step runs, the rest is given to be read.
            let (rows, cos, sin, x) = unsafe {
                let rows = Rows {
                    positions: positions.slice(),
                    cu_seqlens: cu_seqlens.slice(),
                    block_table: block_table.slice(),
                };
                (rows, cos.slice(), sin.slice(), x.slice_mut())
            };
            let batch = Batch { cos, sin, rows, spans: &spans };
            let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: as `x`.
            Team::run(|team| unsafe {
                match &pages {
                    Pages::Numbers(pages) => layers.forward(team, batch, block_tokens, pages.slice_mut(), x),
                    Pages::Codes(pages) => layers.forward(team, batch, block_tokens, pages.slice_mut(), x),
                }
            })
        })?;
        Ok(())
    }
}

/// A cache as a step may have it.
enum Pages {
    Numbers(Memory<f32>),
    Codes(Memory<u8>),
}

impl Pages {
    /// Pages [P, L, 2, B, K, D or bytes], and B.
    fn of(pages: &Bound<'_, PyAny>) -> PyResult<(Self, usize)> {
        let found = if pages.getattr("dtype")?.str()? == u8::NAME {
            Self::Codes(Memory::of("pages", pages)?)
        } else {
            Self::Numbers(Memory::of("pages", pages)?)
        };
        let shape = match &found {
            Self::Numbers(pages) => &pages.shape,
            Self::Codes(pages) => &pages.shape,
        };
        let &[_, _, 2, block_tokens, _, _] = shape.as_slice() else {
            return Err(Error::failure(format!("pages: expected [P, L, 2, B, K, D], got {shape:?}")).into());
        };
        Ok((found, block_tokens))
    }
}

/// A decoder's step over a pool of pages, from token ids to logits.
#[pyclass(module = "ftkit._core", frozen)]
pub(super) struct DecoderStep {
    layers: Py<DecoderLayers>,
    /// Borrows from the tensors that `_tensors` keeps.
    entrance: Entrance<'static>,
    pages: Pages,
    block_tokens: usize,
    _tensors: Vec<Py<PyAny>>,
}

#[pymethods]
impl DecoderStep {
    #[new]
    fn new(
        layers: Py<DecoderLayers>,
        embedding: (GivenWeight<'_>, usize),
        angles: (Bound<'_, PyAny>, Bound<'_, PyAny>),
        pages: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let mut keep = Keep(Vec::new());
        let Weight::Exact(embedding) = keep.linear((embedding.0, embedding.1, None))?.weight else {
            return Err(Error::failure("embedding: expected a matrix of numbers, got a packed one").into());
        };
        let entrance = Entrance { embedding, cos: keep.vector(&angles.0)?, sin: keep.vector(&angles.1)? };
        let (memory, block_tokens) = Pages::of(pages)?;
        keep.0.push(pages.clone().unbind());
        Ok(Self { layers, entrance, pages: memory, block_tokens, _tensors: keep.0 })
    }

    /// The layers.
    #[getter]
    fn layers(&self, py: Python<'_>) -> Py<DecoderLayers> {
        self.layers.clone_ref(py)
    }

    /// Whether all of these adapters can be computed here.
    #[allow(clippy::needless_pass_by_value)]
    fn knows(&self, adapters: Vec<i32>) -> bool {
        self.all_known(&adapters)
    }

    /// Writes the float32 logits [rows, vocabulary] of a batch to `logits`; i32 tensors, as the engine has them.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        py: Python<'_>,
        tokens: &Bound<'_, PyAny>,
        positions: &Bound<'_, PyAny>,
        cu_seqlens: &Bound<'_, PyAny>,
        adapters: Vec<i32>,
        block_table: &Bound<'_, PyAny>,
        rows: &Bound<'_, PyAny>,
        logits: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (tokens, positions) = (Memory::<i32>::of("tokens", tokens)?, Memory::<i32>::of("positions", positions)?);
        let cu_seqlens = Memory::<i32>::of("cu_seqlens", cu_seqlens)?;
        let block_table = Memory::<i32>::of("block_table", block_table)?;
        let (wanted, logits) = (Memory::<i32>::of("rows", rows)?, Memory::<f32>::of("logits", logits)?);
        // SAFETY: the caller's tensors live during the call; `logits` is new and given to be written, the rest to be read.
        let (batch, logits) = unsafe {
            let rows =
                Rows { positions: positions.slice(), cu_seqlens: cu_seqlens.slice(), block_table: block_table.slice() };
            (Tokens { tokens: tokens.slice(), rows, adapters: &adapters, wanted: wanted.slice() }, logits.slice_mut())
        };
        Ok(py.detach(|| self.compute(batch, logits))?)
    }
}

impl DecoderStep {
    pub(super) fn all_known(&self, adapters: &[i32]) -> bool {
        let layers = self.layers.get().layers.read().unwrap_or_else(PoisonError::into_inner);
        adapters.iter().all(|&adapter| layers.knows(adapter))
    }

    /// Numbers in a row of logits.
    pub(super) fn vocabulary(&self) -> usize {
        self.entrance.embedding.rows()
    }

    pub(super) fn compute(&self, batch: Tokens<'_>, logits: &mut [f32]) -> crate::Result<()> {
        let layers = self.layers.get().layers.read().unwrap_or_else(PoisonError::into_inner);
        let (entrance, block_tokens) = (self.entrance, self.block_tokens);
        // SAFETY: this object keeps the tensor alive, and the pages are the engine's alone while its step runs.
        Team::run(|team| unsafe {
            match &self.pages {
                Pages::Numbers(pages) => layers.step(team, entrance, batch, block_tokens, pages.slice_mut(), logits),
                Pages::Codes(pages) => layers.step(team, entrance, batch, block_tokens, pages.slice_mut(), logits),
            }
        })
    }
}

/// Tensors that are kept alive, and borrowed from as long.
struct Keep(Vec<Py<PyAny>>);

impl Keep {
    fn memory<T: super::tensor::Element>(
        &mut self,
        name: &str,
        tensor: &Bound<'_, PyAny>,
    ) -> PyResult<(&'static [T], Vec<usize>)> {
        let memory = Memory::<T>::of(name, tensor)?;
        self.0.push(tensor.clone().unbind());
        // SAFETY: the tensor lives as long as the object that owns this list, which is as long as the slice is used;
        // weights are not written while an engine runs: whoever changes them makes new tensors.
        Ok((unsafe { &*std::ptr::from_ref(memory.slice()) }, memory.shape.clone()))
    }

    fn vector(&mut self, tensor: &Bound<'_, PyAny>) -> PyResult<&'static [f32]> {
        Ok(self.memory("weight", tensor)?.0)
    }

    /// Numbers in float32 or in half precision.
    fn numbers(&mut self, tensor: &Bound<'_, PyAny>) -> PyResult<Numbers<'static>> {
        if tensor.getattr("dtype")?.str()? == f16::NAME {
            return Ok(Numbers::Half(self.memory("numbers", tensor)?.0));
        }
        Ok(Numbers::Plain(self.vector(tensor)?))
    }

    fn matrix(&mut self, kind: &str, blocks: &Bound<'_, PyAny>, columns: usize) -> PyResult<Matrix<'static>> {
        let (bytes, shape) = self.memory::<u8>("blocks", blocks)?;
        Ok(Matrix::new(kind_called(kind)?, bytes, shape.first().copied().unwrap_or(0), columns)?)
    }

    /// A matrix's numbers, and its columns or rows.
    fn dense(&mut self, tensor: &Bound<'_, PyAny>, columns: bool) -> PyResult<(&'static [f32], usize)> {
        let (values, shape) = self.memory::<f32>("weight", tensor)?;
        match shape.as_slice() {
            &[rows, width] => Ok((values, if columns { width } else { rows })),
            other => Err(Error::failure(format!("expected a matrix, got {other:?}")).into()),
        }
    }

    fn linear(&mut self, (weight, columns, bias): GivenLinear<'_>) -> PyResult<Linear<'static>> {
        let bias = bias.map(|bias| self.vector(&bias)).transpose()?;
        let weight = match weight {
            GivenWeight::Packed(packed) => Weight::Packed(packed.get().0.clone()),
            GivenWeight::Coded(coded) => {
                let matrix = coded.get().matrix;
                self.0.push(coded.into_any());
                Weight::Exact(matrix)
            }
            GivenWeight::Exact(kind, blocks) => Weight::Exact(self.matrix(&kind, &blocks, columns)?),
        };
        Ok(Linear { weight, bias })
    }

    fn layer(&mut self, (norms, head_norms, window, linears): GivenLayer<'_>) -> PyResult<Layer<'static>> {
        let vectors = |keep: &mut Self, tensors: &[Bound<'_, PyAny>]| -> PyResult<Option<[&'static [f32]; 2]>> {
            match tensors {
                [] => Ok(None),
                [first, second] => Ok(Some([keep.vector(first)?, keep.vector(second)?])),
                others => Err(Error::failure(format!("expected two norms, got {}", others.len())).into()),
            }
        };
        let norms = vectors(self, &norms)?.ok_or_else(|| Error::failure("expected two norms, got none"))?;
        let head_norms = vectors(self, &head_norms)?;
        let linears = linears.into_iter().map(|linear| self.linear(linear)).collect::<PyResult<Vec<_>>>()?;
        let [q, k, v, o, gate, up, down] = <[_; 7]>::try_from(linears)
            .map_err(|given| Error::failure(format!("expected 7 linear layers, got {}", given.len())))?;
        Ok(Layer { norms, head_norms, window, qkv: [q, k, v], o, gate_up: [gate, up], down })
    }
}

#[pyfunction]
#[pyo3(signature = (q, pages, block_table, cu_seqlens, positions, out, layer, scale, window = None))]
#[allow(clippy::too_many_arguments)]
fn paged_attention(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    pages: &Bound<'_, PyAny>,
    block_table: &Bound<'_, PyAny>,
    cu_seqlens: &Bound<'_, PyAny>,
    positions: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    layer: usize,
    scale: f32,
    window: Option<usize>,
) -> PyResult<()> {
    let rows = [
        Memory::<i32>::of("block_table", block_table)?,
        Memory::<i32>::of("cu_seqlens", cu_seqlens)?,
        Memory::<i32>::of("positions", positions)?,
    ];
    let (numbers, kept) = (q.getattr("dtype")?.str()?, pages.getattr("dtype")?.str()?);
    match (numbers == bf16::NAME, kept == u8::NAME) {
        (false, false) => typed::<f32, f32>(py, q, pages, &rows, out, layer, scale, window),
        (true, false) => typed::<bf16, bf16>(py, q, pages, &rows, out, layer, scale, window),
        (false, true) => typed::<f32, u8>(py, q, pages, &rows, out, layer, scale, window),
        (true, true) => typed::<bf16, u8>(py, q, pages, &rows, out, layer, scale, window),
    }
}

#[allow(clippy::too_many_arguments)]
fn typed<T: Element + Value, P: Element + Kept>(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    pages: &Bound<'_, PyAny>,
    rows: &[Memory<i32>; 3],
    out: &Bound<'_, PyAny>,
    layer: usize,
    scale: f32,
    window: Option<usize>,
) -> PyResult<()> {
    let (q, pages, out) = (Memory::<T>::of("q", q)?, Memory::<P>::of("pages", pages)?, Memory::<T>::of("out", out)?);
    let (&[_, heads, head_dim], &[_, layers, 2, block_tokens, key_value_heads, room]) =
        (q.shape.as_slice(), pages.shape.as_slice())
    else {
        let message =
            format!("expected q [T, H, D] and pages [P, L, 2, B, K, D], got {:?} and {:?}", q.shape, pages.shape);
        return Err(Error::failure(message).into());
    };
    if room != P::room(head_dim) {
        let message = format!("pages: expected {} for a head of {head_dim}, got {room}", P::room(head_dim));
        return Err(Error::failure(message).into());
    }
    let layout = Layout { layer, layers, block_tokens, heads, key_value_heads, head_dim };
    // SAFETY: the caller's tensors live during the call; `out` is given to be written and is new, the rest to be read.
    let (rows, q, pages, out) = unsafe {
        let rows = Rows { block_table: rows[0].slice(), cu_seqlens: rows[1].slice(), positions: rows[2].slice() };
        (rows, q.slice(), pages.slice(), out.slice_mut())
    };
    Ok(py.detach(|| Team::run(|team| attention::paged_attention(team, q, pages, rows, layout, scale, window, out)))?)
}
