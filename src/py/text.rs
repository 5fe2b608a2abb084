//! Bindings of the `text` room.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::gguf;
use crate::text::{self, Conversation, Specials, StreamDecoder, TrainOn};

#[pyclass(name = "Tokenizer", module = "ftkit._core", frozen)]
pub(super) struct Tokenizer(pub(super) text::Tokenizer);

#[pymethods]
impl Tokenizer {
    #[staticmethod]
    fn from_dir(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self(py.detach(|| text::Tokenizer::from_dir(&path))?))
    }

    #[staticmethod]
    fn from_gguf(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self(py.detach(|| text::Tokenizer::from_gguf(&gguf::File::open(&path)?))?))
    }

    #[pyo3(signature = (text, specials = true))]
    fn encode(&self, py: Python<'_>, text: &str, specials: bool) -> PyResult<Vec<u32>> {
        let specials = if specials { Specials::Parse } else { Specials::Literal };
        Ok(py.detach(|| self.0.encode(text, specials))?)
    }

    fn encode_prompt(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        Ok(py.detach(|| self.0.encode_prompt(text))?)
    }

    #[pyo3(signature = (ids, skip_special = true))]
    fn decode(&self, py: Python<'_>, ids: Vec<u32>, skip_special: bool) -> String {
        py.detach(|| self.0.decode(&ids, skip_special))
    }

    fn stream(&self) -> PyStreamDecoder {
        PyStreamDecoder(StreamDecoder::new(self.0.clone()))
    }

    fn id_of(&self, token: &str) -> Option<u32> {
        self.0.id_of(token)
    }

    fn token_of(&self, id: u32) -> Option<String> {
        self.0.token_of(id)
    }

    fn is_special(&self, id: u32) -> bool {
        self.0.is_special(id)
    }

    #[getter]
    fn bos_id(&self) -> Option<u32> {
        self.0.bos()
    }

    #[getter]
    fn eos_id(&self) -> Option<u32> {
        self.0.eos()
    }

    #[getter]
    fn end_ids(&self) -> Vec<u32> {
        self.0.end_ids()
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    #[getter]
    fn hash(&self, py: Python<'_>) -> String {
        py.detach(|| self.0.hash())
    }

    #[pyo3(signature = (path, template = None))]
    fn save(&self, py: Python<'_>, path: PathBuf, template: Option<&ChatTemplate>) -> PyResult<()> {
        let template = template.map(|template| template.0.clone());
        Ok(py.detach(|| text::save(&self.0, template.as_ref(), &path))?)
    }
}

#[pyclass(name = "StreamDecoder", module = "ftkit._core")]
struct PyStreamDecoder(StreamDecoder);

#[pymethods]
impl PyStreamDecoder {
    fn push(&mut self, id: u32) -> String {
        self.0.push(id)
    }

    fn finish(&mut self) -> String {
        self.0.finish()
    }
}

#[pyclass(name = "ChatTemplate", module = "ftkit._core", frozen)]
pub(super) struct ChatTemplate(pub(super) text::Template);

#[pymethods]
impl ChatTemplate {
    #[staticmethod]
    fn from_dir(path: PathBuf) -> PyResult<Option<Self>> {
        Ok(text::Template::from_dir(&path)?.map(Self))
    }

    #[staticmethod]
    fn from_gguf(path: PathBuf) -> PyResult<Option<Self>> {
        Ok(text::Template::from_gguf(&gguf::File::open(&path)?)?.map(Self))
    }

    #[staticmethod]
    #[pyo3(signature = (source, bos_token = None, eos_token = None))]
    fn from_source(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> PyResult<Self> {
        Ok(Self(text::Template::from_source(source, bos_token, eos_token)?))
    }

    #[pyo3(signature = (messages, tools = None, add_generation_prompt = false, **extra))]
    fn render(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        tools: Option<&Bound<'_, PyAny>>,
        add_generation_prompt: bool,
        extra: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<String> {
        let conversation = conversation(messages, tools, extra)?;
        Ok(py.detach(|| self.0.render(&conversation, add_generation_prompt))?)
    }

    #[getter]
    fn source(&self) -> &str {
        self.0.source()
    }

    #[getter]
    fn hash(&self) -> String {
        self.0.hash()
    }
}

#[pyfunction]
#[pyo3(signature = (template, tokenizer, messages, tools = None, train_on = "assistant", **extra))]
fn encode_conversation(
    py: Python<'_>,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &Bound<'_, PyAny>,
    tools: Option<&Bound<'_, PyAny>>,
    train_on: &str,
    extra: Option<&Bound<'_, PyDict>>,
) -> PyResult<(Vec<u32>, Vec<bool>)> {
    let conversation = conversation(messages, tools, extra)?;
    let train_on: TrainOn = train_on.parse()?;
    let (template, tokenizer) = (&template.0, &tokenizer.0);
    let encoded = py.detach(|| text::encode_conversation(template, tokenizer, &conversation, train_on))?;
    Ok((encoded.ids, encoded.trained))
}

#[pyfunction]
#[pyo3(signature = (template, tokenizer, messages, tools = None, **extra))]
fn encode_prompt(
    py: Python<'_>,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &Bound<'_, PyAny>,
    tools: Option<&Bound<'_, PyAny>>,
    extra: Option<&Bound<'_, PyDict>>,
) -> PyResult<Vec<u32>> {
    let conversation = conversation(messages, tools, extra)?;
    let (template, tokenizer) = (&template.0, &tokenizer.0);
    Ok(py.detach(|| text::encode_prompt(template, tokenizer, &conversation))?)
}

/// Python's objects by way of JSON, which is what conversations are.
fn conversation(
    messages: &Bound<'_, PyAny>,
    tools: Option<&Bound<'_, PyAny>>,
    extra: Option<&Bound<'_, PyDict>>,
) -> PyResult<Conversation> {
    let expected = |what: &str| PyErr::from(Error::input(format!("{what}: expected a list of objects")));
    let Value::Array(messages) = json("messages", messages)? else { return Err(expected("messages")) };
    if !messages.iter().all(Value::is_object) {
        return Err(expected("messages"));
    }
    let tools = tools.map(|tools| json("tools", tools)).transpose()?.filter(|tools| !tools.is_null());
    let extra = match extra.map(|extra| json("template variables", extra.as_any())).transpose()? {
        Some(Value::Object(extra)) => extra,
        _ => Map::new(),
    };
    Ok(Conversation { messages, tools, extra })
}

fn json(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Value> {
    let py = value.py();
    let options = PyDict::new(py);
    options.set_item("allow_nan", false)?;
    let text = py.import("json")?.getattr("dumps")?.call((value,), Some(&options));
    let text: String = text.and_then(|text| text.extract()).map_err(|error| {
        PyErr::from(Error::input(format!("{name}: expected what JSON can hold, got an error: {}", error.value(py))))
    })?;
    Ok(text::parse_json(&text, name)?)
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()?;
    module.add_class::<PyStreamDecoder>()?;
    module.add_class::<ChatTemplate>()?;
    module.add_function(wrap_pyfunction!(encode_conversation, module)?)?;
    module.add_function(wrap_pyfunction!(encode_prompt, module)?)?;
    Ok(())
}
