//! Bindings of the `training` room. Tensors are float32, or bfloat16 where all but those that are named are.

use half::bf16;
use pyo3::prelude::*;

use super::decoder::{CodedMatrix, matrix_of};
use super::tensor::{Element, Memory, of_numbers};
use crate::error::Error;
use crate::quant::matmul::Path;
use crate::quant::matmul::halves::{self, Forward, LowRank};
use crate::team::Team;
use crate::training::attention::{self, Kept, Shape};
use crate::training::linear::{self, Back, Part};
use crate::training::passes;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(lora_forward, module)?)?;
    module.add_function(wrap_pyfunction!(lora_backward, module)?)?;
    module.add_function(wrap_pyfunction!(low_rank_forward, module)?)?;
    module.add_function(wrap_pyfunction!(low_rank_backward, module)?)?;
    module.add_function(wrap_pyfunction!(attention_forward, module)?)?;
    module.add_function(wrap_pyfunction!(attention_backward, module)?)?;
    module.add_function(wrap_pyfunction!(rms_norm_forward, module)?)?;
    module.add_function(wrap_pyfunction!(rms_norm_backward, module)?)?;
    module.add_function(wrap_pyfunction!(swiglu_forward, module)?)?;
    module.add_function(wrap_pyfunction!(swiglu_backward, module)?)?;
    module.add_function(wrap_pyfunction!(rotate, module)?)?;
    module.add_function(wrap_pyfunction!(cross_entropy, module)?)
}

type Tensors<'py> = Vec<Bound<'py, PyAny>>;
type Maybe<'py> = Vec<Option<Bound<'py, PyAny>>>;

fn all<T: Element>(name: &str, tensors: &[Bound<'_, PyAny>]) -> PyResult<Vec<Memory<T>>> {
    tensors.iter().map(|tensor| Memory::of(name, tensor)).collect()
}

fn some(name: &str, tensors: &[Option<Bound<'_, PyAny>>]) -> PyResult<Vec<Option<Memory<f32>>>> {
    tensors.iter().map(|tensor| tensor.as_ref().map(|tensor| Memory::of(name, tensor)).transpose()).collect()
}

fn inputs<T>(x: &Memory<T>) -> PyResult<usize> {
    match x.shape.as_slice() {
        &[_, inputs] => Ok(inputs),
        shape => Err(Error::failure(format!("x: expected a matrix, got {shape:?}")).into()),
    }
}

/// The matrices of several layers.
struct Layers {
    a: Vec<Memory<f32>>,
    b: Vec<Memory<f32>>,
    scales: Vec<f32>,
}

impl Layers {
    fn of(a: &Tensors<'_>, b: &Tensors<'_>, scales: Vec<f32>) -> PyResult<Self> {
        let counts = [b.len(), scales.len()];
        if counts.iter().any(|&count| count != a.len()) {
            return Err(Error::failure(format!("expected {} of all parts, got {counts:?}", a.len())).into());
        }
        Ok(Self { a: all("a", a)?, b: all("b", b)?, scales })
    }

    /// # Safety
    /// The tensors live, and nobody writes to them, while the parts are in use.
    unsafe fn parts(&self) -> Vec<Part<'_>> {
        let parts = self.a.iter().zip(&self.b).zip(&self.scales);
        parts
            .map(|((a, b), &scale)| {
                // SAFETY: the caller's promise.
                unsafe { Part { a: a.slice(), b: b.slice(), scale } }
            })
            .collect()
    }
}

/// Adds s low Bᵀ to each of `y` float32 [T, out], and writes x Aᵀ to each of `low` [T, rank]: x [T, in], A [rank, in],
/// B [out, rank].
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn lora_forward(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    a: Tensors<'_>,
    b: Tensors<'_>,
    scales: Vec<f32>,
    y: Tensors<'_>,
    low: Tensors<'_>,
) -> PyResult<()> {
    let x = Memory::<f32>::of("x", x)?;
    let inputs = inputs(&x)?;
    let layers = Layers::of(&a, &b, scales)?;
    let (y, low) = (all("y", &y)?, all("low", &low)?);
    // SAFETY: the caller's tensors live during the call; `y` and `low` are given to be written, the rest to be read.
    let (x, parts) = unsafe { (x.slice(), layers.parts()) };
    // SAFETY: as above.
    let mut y: Vec<&mut [f32]> = y.iter().map(|y| unsafe { y.slice_mut() }).collect();
    // SAFETY: as above.
    let mut low: Vec<&mut [f32]> = low.iter().map(|low| unsafe { low.slice_mut() }).collect();
    Ok(py.detach(|| Team::run(|team| linear::forward(Path::best(), team, x, inputs, &parts, &mut y, &mut low)))?)
}

/// Writes the gradients of `lora_forward`: s dy B to each of `dlow` [T, rank], and those of A and B where they are asked
/// for; adds to that of x.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn lora_backward(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    a: Tensors<'_>,
    b: Tensors<'_>,
    scales: Vec<f32>,
    dy: Tensors<'_>,
    low: Tensors<'_>,
    dlow: Tensors<'_>,
    da: Maybe<'_>,
    db: Maybe<'_>,
    dx: Option<Bound<'_, PyAny>>,
) -> PyResult<()> {
    let x = Memory::<f32>::of("x", x)?;
    let inputs = inputs(&x)?;
    let layers = Layers::of(&a, &b, scales)?;
    let (dy, low, dlow) = (all("dy", &dy)?, all("low", &low)?, all("dlow", &dlow)?);
    let (da, db) = (some("da", &da)?, some("db", &db)?);
    let dx = dx.as_ref().map(|dx| Memory::<f32>::of("dx", dx)).transpose()?;
    // SAFETY: the caller's tensors live during the call; gradients are given to be written, the rest to be read.
    let (x, parts, dx) = unsafe { (x.slice(), layers.parts(), dx.as_ref().map(|dx| dx.slice_mut())) };
    let each = dy.iter().zip(&low).zip(&dlow).zip(da.iter().zip(&db));
    let mut back: Vec<Back<'_>> = each
        .map(|(((dy, low), dlow), (da, db))| {
            // SAFETY: as above.
            unsafe {
                Back {
                    dy: dy.slice(),
                    low: low.slice(),
                    dlow: dlow.slice_mut(),
                    da: da.as_ref().map(|da| da.slice_mut()),
                    db: db.as_ref().map(|db| db.slice_mut()),
                }
            }
        })
        .collect();
    Ok(py.detach(|| Team::run(|team| linear::backward(Path::best(), team, x, inputs, &parts, &mut back, dx)))?)
}

/// A frozen matrix as the core multiplies with it.
#[derive(FromPyObject)]
enum Frozen<'py> {
    Coded(PyRef<'py, CodedMatrix>),
    /// (format, blocks uint8 [out, bytes of a row])
    Blocks(String, Bound<'py, PyAny>),
}

/// Frozen matrices, and the low-rank ones beside them.
struct LowRanks<'py> {
    frozen: Vec<Frozen<'py>>,
    blocks: Vec<Option<Memory<u8>>>,
    layers: Layers,
}

impl<'py> LowRanks<'py> {
    fn of(frozen: Vec<Frozen<'py>>, a: &Tensors<'_>, b: &Tensors<'_>, scales: Vec<f32>) -> PyResult<Self> {
        let blocks = frozen.iter().map(|frozen| match frozen {
            Frozen::Blocks(_, blocks) => Memory::of("blocks", blocks).map(Some),
            Frozen::Coded(_) => Ok(None),
        });
        let blocks = blocks.collect::<PyResult<_>>()?;
        Ok(Self { frozen, blocks, layers: Layers::of(a, b, scales)? })
    }

    /// # Safety
    /// The tensors live, and nobody writes to them, while the parts are in use.
    unsafe fn parts(&self, x: &Bound<'_, PyAny>) -> PyResult<Vec<LowRank<'_>>> {
        // SAFETY: the caller's promise.
        let lows = unsafe { self.layers.parts() };
        let each = self.frozen.iter().zip(&self.blocks).zip(lows);
        each.map(|((frozen, blocks), Part { a, b, scale })| {
            let matrix = match (frozen, blocks) {
                // SAFETY: as above.
                (Frozen::Blocks(kind, _), Some(blocks)) => unsafe { matrix_of(kind, blocks, x)? },
                (Frozen::Coded(coded), _) => coded.matrix,
                (Frozen::Blocks(..), None) => return Err(Error::failure("expected blocks, got none").into()),
            };
            Ok(LowRank { matrix, a, b, scale })
        })
        .collect()
    }
}

/// Writes x Wᵀ + s low Bᵀ to each of `y` bfloat16 [T, out], and low = x Aᵀ to each of `low` bfloat16 [T, rank]: x
/// bfloat16 [T, in], A [rank, in] and B [out, rank] float32.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn low_rank_forward(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    frozen: Vec<Frozen<'_>>,
    a: Tensors<'_>,
    b: Tensors<'_>,
    scales: Vec<f32>,
    y: Tensors<'_>,
    low: Tensors<'_>,
) -> PyResult<()> {
    let ranks = LowRanks::of(frozen, &a, &b, scales)?;
    // SAFETY: the caller's tensors live during the call; `y` and `low` are given to be written, the rest to be read.
    let parts = unsafe { ranks.parts(x)? };
    let x = Memory::<bf16>::of("x", x)?;
    let inputs = inputs(&x)?;
    let (y, low) = (all("y", &y)?, all("low", &low)?);
    let out = y.iter().zip(&low);
    // SAFETY: as above.
    let mut out: Vec<_> = out.map(|(y, low)| unsafe { Forward { y: y.slice_mut(), low: low.slice_mut() } }).collect();
    // SAFETY: as above.
    let x = unsafe { x.slice() };
    Ok(py.detach(|| Team::run(|team| halves::low_rank(team, x, inputs, &parts, &mut out)))?)
}

/// Writes the gradients of `low_rank_forward`: those of A and B, float32, and that of x, bfloat16, where they are asked
/// for.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn low_rank_backward(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    frozen: Vec<Frozen<'_>>,
    a: Tensors<'_>,
    b: Tensors<'_>,
    scales: Vec<f32>,
    dy: Tensors<'_>,
    low: Tensors<'_>,
    da: Maybe<'_>,
    db: Maybe<'_>,
    dx: Option<Bound<'_, PyAny>>,
) -> PyResult<()> {
    let ranks = LowRanks::of(frozen, &a, &b, scales)?;
    // SAFETY: the caller's tensors live during the call; gradients are given to be written, the rest to be read.
    let parts = unsafe { ranks.parts(x)? };
    let x = Memory::<bf16>::of("x", x)?;
    let inputs = inputs(&x)?;
    let (dy, low) = (all("dy", &dy)?, all("low", &low)?);
    let (da, db) = (some("da", &da)?, some("db", &db)?);
    let dx = dx.as_ref().map(|dx| Memory::<bf16>::of("dx", dx)).transpose()?;
    let each = dy.iter().zip(&low).zip(da.iter().zip(&db));
    let mut back: Vec<_> = each
        .map(|((dy, low), (da, db))| {
            // SAFETY: as above.
            unsafe {
                let (da, db) = (da.as_ref().map(|da| da.slice_mut()), db.as_ref().map(|db| db.slice_mut()));
                halves::Back { dy: dy.slice(), low: low.slice(), da, db }
            }
        })
        .collect();
    // SAFETY: as above.
    let (x, dx) = unsafe { (x.slice(), dx.as_ref().map(|dx| dx.slice_mut())) };
    Ok(py.detach(|| Team::run(|team| halves::low_rank_back(team, x, inputs, &parts, &mut back, dx)))?)
}

/// Heads of q and of k, and their width.
fn heads<T>(q: &Memory<T>, k: &Memory<T>) -> PyResult<(usize, usize, usize)> {
    match (q.shape.as_slice(), k.shape.as_slice()) {
        (&[_, heads, head_dim], &[_, key_value_heads, _]) => Ok((heads, key_value_heads, head_dim)),
        (q, k) => Err(Error::failure(format!("expected q and k of three axes, got {q:?} and {k:?}")).into()),
    }
}

/// Writes attention inside sequences to `y`, like q [T, heads, head_dim], and each row's log-sum-exp to `m` [T, heads].
#[pyfunction]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
fn attention_forward(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    lengths: Vec<usize>,
    shared: Vec<usize>,
    scale: f32,
    window: Option<usize>,
    y: &Bound<'_, PyAny>,
    m: &Bound<'_, PyAny>,
) -> PyResult<()> {
    of_numbers!(q, T, {
        let (q, k, v) = (Memory::<T>::of("q", q)?, Memory::<T>::of("k", k)?, Memory::<T>::of("v", v)?);
        let (y, m) = (Memory::<T>::of("y", y)?, Memory::<f32>::of("m", m)?);
        let (heads, key_value_heads, head_dim) = heads(&q, &k)?;
        let shape = Shape { lengths: &lengths, shared: &shared, heads, key_value_heads, head_dim, window, scale };
        // SAFETY: the caller's tensors live during the call; `y` and `m` are given to be written, the rest to be read.
        let (q, k, v, y, m) = unsafe { (q.slice(), k.slice(), v.slice(), y.slice_mut(), m.slice_mut()) };
        Ok(py.detach(|| Team::run(|team| attention::forward(Path::best(), team, shape, q, k, v, y, m)))?)
    })
}

/// Writes the gradients of `attention_forward` to `dq`, `dk` and `dv`, which are float32.
#[pyfunction]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
fn attention_backward(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    lengths: Vec<usize>,
    shared: Vec<usize>,
    scale: f32,
    window: Option<usize>,
    y: &Bound<'_, PyAny>,
    m: &Bound<'_, PyAny>,
    dy: &Bound<'_, PyAny>,
    dq: &Bound<'_, PyAny>,
    dk: &Bound<'_, PyAny>,
    dv: &Bound<'_, PyAny>,
) -> PyResult<()> {
    of_numbers!(q, T, {
        let (q, k, v) = (Memory::<T>::of("q", q)?, Memory::<T>::of("k", k)?, Memory::<T>::of("v", v)?);
        let (y, m, dy) = (Memory::<T>::of("y", y)?, Memory::<f32>::of("m", m)?, Memory::<T>::of("dy", dy)?);
        let (dq, dk, dv) = (Memory::<f32>::of("dq", dq)?, Memory::<f32>::of("dk", dk)?, Memory::<f32>::of("dv", dv)?);
        let (heads, key_value_heads, head_dim) = heads(&q, &k)?;
        let shape = Shape { lengths: &lengths, shared: &shared, heads, key_value_heads, head_dim, window, scale };
        // SAFETY: the caller's tensors live during the call; `dq`, `dk` and `dv` are given to be written, the rest to be read.
        let kept =
            unsafe { Kept { q: q.slice(), k: k.slice(), v: v.slice(), y: y.slice(), m: m.slice(), dy: dy.slice() } };
        // SAFETY: as above.
        let (dq, dk, dv) = unsafe { (dq.slice_mut(), dk.slice_mut(), dv.slice_mut()) };
        Ok(py.detach(|| Team::run(|team| attention::backward(Path::best(), team, shape, kept, dq, dk, dv)))?)
    })
}

/// Writes weight ⊙ x r to `y` and r = 1 / √(mean(x²) + ε) to `roots`: x [..., d], weight [d], roots float32
/// [...].
#[pyfunction]
fn rms_norm_forward(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    weight: &Bound<'_, PyAny>,
    epsilon: f32,
    y: &Bound<'_, PyAny>,
    roots: &Bound<'_, PyAny>,
) -> PyResult<()> {
    of_numbers!(x, T, {
        let (x, weight) = (Memory::<T>::of("x", x)?, Memory::<T>::of("weight", weight)?);
        let (y, roots) = (Memory::<T>::of("y", y)?, Memory::<f32>::of("roots", roots)?);
        // SAFETY: the caller's tensors live during the call; `y` and `roots` are given to be written, the rest to be read.
        let (x, weight, y, roots) = unsafe { (x.slice(), weight.slice(), y.slice_mut(), roots.slice_mut()) };
        Ok(py.detach(|| Team::run(|team| passes::rms_norm(team, x, weight, epsilon, y, roots)))?)
    })
}

/// Writes the gradient of `rms_norm_forward` in x to `dx`.
#[pyfunction]
fn rms_norm_backward(
    py: Python<'_>,
    dy: &Bound<'_, PyAny>,
    x: &Bound<'_, PyAny>,
    weight: &Bound<'_, PyAny>,
    roots: &Bound<'_, PyAny>,
    dx: &Bound<'_, PyAny>,
) -> PyResult<()> {
    of_numbers!(x, T, {
        let (dy, x, weight) =
            (Memory::<T>::of("dy", dy)?, Memory::<T>::of("x", x)?, Memory::<T>::of("weight", weight)?);
        let (roots, dx) = (Memory::<f32>::of("roots", roots)?, Memory::<T>::of("dx", dx)?);
        // SAFETY: the caller's tensors live during the call; `dx` is given to be written, the rest to be read.
        let (dy, x, weight, roots, dx) =
            unsafe { (dy.slice(), x.slice(), weight.slice(), roots.slice(), dx.slice_mut()) };
        Ok(py.detach(|| Team::run(|team| passes::rms_norm_back(team, dy, x, weight, roots, dx)))?)
    })
}

/// Writes silu(gate) ⊙ up to `y`, all of one shape.
#[pyfunction]
fn swiglu_forward(
    py: Python<'_>,
    gate: &Bound<'_, PyAny>,
    up: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
) -> PyResult<()> {
    of_numbers!(gate, T, {
        let (gate, up, y) = (Memory::<T>::of("gate", gate)?, Memory::<T>::of("up", up)?, Memory::<T>::of("y", y)?);
        // SAFETY: the caller's tensors live during the call; `y` is given to be written, the rest to be read.
        let (gate, up, y) = unsafe { (gate.slice(), up.slice(), y.slice_mut()) };
        Ok(py.detach(|| Team::run(|team| passes::swiglu(team, gate, up, y)))?)
    })
}

/// Writes the gradients of `swiglu_forward` to `dgate` and `dup`.
#[pyfunction]
fn swiglu_backward(
    py: Python<'_>,
    dy: &Bound<'_, PyAny>,
    gate: &Bound<'_, PyAny>,
    up: &Bound<'_, PyAny>,
    dgate: &Bound<'_, PyAny>,
    dup: &Bound<'_, PyAny>,
) -> PyResult<()> {
    of_numbers!(gate, T, {
        let (dy, gate, up) = (Memory::<T>::of("dy", dy)?, Memory::<T>::of("gate", gate)?, Memory::<T>::of("up", up)?);
        let (dgate, dup) = (Memory::<T>::of("dgate", dgate)?, Memory::<T>::of("dup", dup)?);
        // SAFETY: the caller's tensors live during the call; gradients are given to be written, the rest to be read.
        let (dy, gate, up, dgate, dup) =
            unsafe { (dy.slice(), gate.slice(), up.slice(), dgate.slice_mut(), dup.slice_mut()) };
        Ok(py.detach(|| Team::run(|team| passes::swiglu_back(team, dy, gate, up, dgate, dup)))?)
    })
}

/// Writes each head of x [T, heads, head_dim], turned by cos and sin [T, head_dim / 2], or back, to `y`.
#[pyfunction]
fn rotate(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    cos: &Bound<'_, PyAny>,
    sin: &Bound<'_, PyAny>,
    back: bool,
    y: &Bound<'_, PyAny>,
) -> PyResult<()> {
    of_numbers!(x, T, {
        let (x, y) = (Memory::<T>::of("x", x)?, Memory::<T>::of("y", y)?);
        let (cos, sin) = (Memory::<T>::of("cos", cos)?, Memory::<T>::of("sin", sin)?);
        let &[tokens, heads, _] = x.shape.as_slice() else {
            return Err(Error::failure(format!("x: expected three axes, got {:?}", x.shape)).into());
        };
        // SAFETY: the caller's tensors live during the call; `y` is given to be written, the rest to be read.
        let (x, cos, sin, y) = unsafe { (x.slice(), cos.slice(), sin.slice(), y.slice_mut()) };
        Ok(py.detach(|| Team::run(|team| passes::rotate(team, x, (tokens, heads), cos, sin, back, y)))?)
    })
}

/// Writes log Σ exp(z) − z[target] of each row of z [rows, V] to `losses` float32 [rows], and its gradient to `slopes`
/// [rows, V] where it is asked for; targets int64 [rows].
#[pyfunction]
fn cross_entropy(
    py: Python<'_>,
    z: &Bound<'_, PyAny>,
    targets: &Bound<'_, PyAny>,
    losses: &Bound<'_, PyAny>,
    slopes: Option<Bound<'_, PyAny>>,
) -> PyResult<()> {
    of_numbers!(z, T, {
        let (z, targets) = (Memory::<T>::of("z", z)?, Memory::<i64>::of("targets", targets)?);
        let losses = Memory::<f32>::of("losses", losses)?;
        let slopes = slopes.as_ref().map(|slopes| Memory::<T>::of("slopes", slopes)).transpose()?;
        // SAFETY: the caller's tensors live during the call; `losses` and `slopes` are given to be written, the rest to
        // be read.
        let (z, targets, losses) = unsafe { (z.slice(), targets.slice(), losses.slice_mut()) };
        // SAFETY: as above.
        let slopes = slopes.as_ref().map(|slopes| unsafe { slopes.slice_mut() });
        Ok(py.detach(|| Team::run(|team| passes::cross_entropy(team, z, targets, losses, slopes)))?)
    })
}
