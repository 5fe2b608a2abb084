//! What all routes that generate do: parse, encode, ask the engine, and answer whole or in pieces.

use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use rand::Rng;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::App;
use super::anthropic;
use super::dialect::{Answered, Context, Maker, Parts};
use super::errors::ApiError;
use super::keys::Key;
use super::meter::{Caller, Meter};
use super::parse::{Asked, Prompt};
use super::stream::Chunks;
use crate::serve::calls::{Choice, Reader};
use crate::serve::constraint::{Constraint, Format};
use crate::serve::models::{Model, now};
use crate::serve::{Author, Event, Pen, Request, Sink, Sources, Usage};
use crate::{Error, ErrorKind};

/// Reads a body: what is asked, and in whose words the answer is to be.
pub(super) type Parse = fn(&[u8]) -> Result<(Asked, Maker), ApiError>;

/// Answers a request.
pub(super) async fn complete(app: Arc<App>, caller: Caller, body: Bytes, parse: Parse) -> Result<Response, ApiError> {
    let start = Instant::now();
    tokens_left(&app, &caller)?;
    // Long texts take a while to parse and encode: not on the threads that serve everybody.
    let (shared, key) = (Arc::clone(&app), Arc::clone(&caller.key));
    let prepared = tokio::task::spawn_blocking(move || prepare(&shared, &key, parse, &body)).await;
    let Prepared { asked, maker, model, fingerprint, prompts, constraint, reader } =
        prepared.map_err(|_| ApiError::server("the request could not be read"))??;
    caller.record.model(&model.name);
    let count = prompts.len() * asked.choices;
    let meter = |prompt: &Vec<u32>, pays| {
        Meter::new(Arc::clone(&app), caller.clone(), model.clone(), prompt.len(), pays, start)
    };
    let due = app.settings.first_token.map(|time| start + time);
    let who = (caller.key.client(), due);
    let sources = Sources::default();
    let receiver = match author(&app, &asked)? {
        Some(author) => write(&app, author, &asked, &model, (prompts.as_slice(), &sources), who, meter)?,
        None => submit(&app, &asked, &model, &prompts, constraint.as_ref(), who, meter)?,
    };
    let mut dialect = maker(Context {
        id: format!("{:032x}", rand::rng().random::<u128>()),
        created: now(),
        model: model.name,
        fingerprint,
        choices: count,
        prompt_tokens: prompts.iter().map(Vec::len).sum(),
        sources,
        language: Arc::clone(&app.language),
    });
    let stops: Arc<[String]> = asked.sampling.stop.into();
    let parts = (0..count).map(|_| Parts::new(reader.clone(), Arc::clone(&stops))).collect();
    if asked.stream {
        let kind = HeaderValue::from_static(dialect.content_type());
        let mut response = Body::from_stream(Chunks::new(receiver, dialect, parts, asked.choices)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, kind);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        return Ok(response);
    }
    let (answers, usage) = collect(receiver, parts, asked.choices).await?;
    Ok(axum::Json(dialect.whole(answers, usage)).into_response())
}

/// Fails when the caller's key has no tokens left.
pub(super) fn tokens_left(app: &App, caller: &Caller) -> Result<(), ApiError> {
    caller.key.tokens().map_err(|wait| {
        app.traffic.limited.add(1);
        ApiError::limited(wait, "tokens")
    })
}

struct Prepared {
    asked: Asked,
    maker: Maker,
    model: Model,
    fingerprint: Option<String>,
    prompts: Vec<Vec<u32>>,
    constraint: Option<Constraint>,
    reader: Option<Reader>,
}

/// The number of tokens of what is asked.
pub(super) async fn count(app: Arc<App>, caller: Caller, body: Bytes) -> Result<axum::Json<Value>, ApiError> {
    let counted = tokio::task::spawn_blocking(move || {
        let asked = anthropic::count(&body)?;
        app.model(&caller.key, asked.model.as_deref())?;
        Ok(encode(&app, &asked)?.iter().map(Vec::len).sum::<usize>())
    });
    let tokens = counted.await.map_err(|_| ApiError::server("the request could not be read"))?;
    tokens.map(|tokens| axum::Json(json!({"input_tokens": tokens})))
}

fn prepare(app: &App, key: &Key, parse: Parse, body: &[u8]) -> Result<Prepared, ApiError> {
    let (asked, maker) = parse(body)?;
    let (model, fingerprint) = app.model(key, asked.model.as_deref())?;
    let reader = match (&asked.tools, app.language.syntax()) {
        (None, _) => None,
        (Some(tools), Some(syntax)) => Some(Reader::new(syntax, tools)),
        (Some(_), None) => {
            let expected =
                "tools: expected a model whose chat template writes calls as Hermes, Qwen, Llama 3 or Mistral do";
            return Err(ApiError::unsupported("tools", format!("{expected}, got another")));
        }
    };
    let prompts = encode(app, &asked)?;
    for prompt in &prompts {
        app.engine.limits().check(prompt, &asked.sampling)?;
    }
    let constraint = match (&asked.tools, &asked.format) {
        (Some(tools), _) if tools.choice != Choice::Auto => Some(app.language.calling(tools, None)?),
        (Some(tools), Some(Format::Json(schema))) => Some(app.language.calling(tools, Some(schema))?),
        (_, Some(format)) => Some(app.language.constraint(format)?),
        (_, None) => None,
    };
    Ok(Prepared { asked, maker, model, fingerprint, prompts, constraint, reader })
}

/// The tokens of each prompt.
fn encode(app: &App, asked: &Asked) -> Result<Vec<Vec<u32>>, ApiError> {
    let encode = |prompt: &Prompt| match prompt {
        Prompt::Chat(conversation) => app.language.chat(conversation),
        Prompt::Text(text) => app.language.text(text),
        Prompt::Tokens(tokens) => Ok(tokens.clone()),
    };
    Ok(asked.prompts.iter().map(encode).collect::<crate::Result<_>>()?)
}

fn submit(
    app: &App,
    asked: &Asked,
    model: &Model,
    prompts: &[Vec<u32>],
    constraint: Option<&Constraint>,
    (client, deadline): (u64, Option<Instant>),
    meter: impl Fn(&Vec<u32>, bool) -> Meter,
) -> Result<UnboundedReceiver<(usize, Event)>, ApiError> {
    let (sender, receiver) = unbounded_channel();
    let mut requests = Vec::with_capacity(prompts.len() * asked.choices);
    for prompt in prompts {
        for choice in 0..asked.choices {
            let mut sampling = asked.sampling.clone();
            // Each choice has its own random stream; the first has that of the seed itself.
            sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(choice as u64));
            let index = requests.len();
            requests.push(Request {
                prompt: prompt.clone(),
                answered: 0,
                sampling,
                constraint: constraint.cloned(),
                adapter: model.adapter,
                root: model.root,
                decoder: app.language.decoder(asked.tools.is_some()),
                sink: Box::new(Channel { sender: sender.clone(), index, meter: meter(prompt, choice == 0) }),
                client,
                priority: asked.priority,
                deadline,
                urgent: false,
                embeds: false,
            });
        }
    }
    app.engine.submit(requests)?;
    Ok(receiver)
}

/// Who writes the answer, if it is not the engine alone. What holds an answer to a form holds one part of it only, so that
/// such answers are written without retrieval.
fn author(app: &App, asked: &Asked) -> Result<Option<Arc<dyn Author>>, ApiError> {
    let plain = asked.tools.is_none()
        && asked.format.is_none()
        && asked.prompts.iter().all(|prompt| matches!(prompt, Prompt::Chat(talk) if talk.extra.is_empty()));
    match (&app.settings.author, asked.retrieval) {
        (None, Some(true)) => {
            Err(ApiError::field("retrieval", "false: this server was started without --retriever", "true"))
        }
        (Some(_), Some(true)) if !plain => Err(ApiError::field(
            "retrieval",
            "false with tools, a response format or arguments of the template",
            "true",
        )),
        (Some(author), retrieval) if plain && retrieval != Some(false) => Ok(Some(Arc::clone(author))),
        _ => Ok(None),
    }
}

/// Has the author write each choice, on a thread of its own.
fn write(
    app: &App,
    author: Arc<dyn Author>,
    asked: &Asked,
    model: &Model,
    (prompts, sources): (&[Vec<u32>], &Sources),
    (client, deadline): (u64, Option<Instant>),
    meter: impl Fn(&Vec<u32>, bool) -> Meter,
) -> Result<UnboundedReceiver<(usize, Event)>, ApiError> {
    let (sender, receiver) = unbounded_channel();
    let talks = asked.prompts.iter().zip(prompts).flat_map(|pair| (0..asked.choices).map(move |choice| (pair, choice)));
    for (index, ((prompt, tokens), choice)) in talks.enumerate() {
        let Prompt::Chat(talk) = prompt else { continue };
        let permit = Arc::clone(&app.authored).try_acquire_owned();
        let permit = permit.map_err(|_| ApiError::busy(1, "expected fewer answers with retrieval at the same time"))?;
        let mut sampling = asked.sampling.clone();
        sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(choice as u64));
        let pen = Pen {
            engine: app.engine.clone(),
            language: Arc::clone(&app.language),
            adapter: model.adapter,
            root: model.root,
            client,
            priority: asked.priority,
            deadline,
            choice: index,
            sources: sources.clone(),
            sink: Box::new(Channel { sender: sender.clone(), index, meter: meter(tokens, choice == 0) }),
        };
        let (author, messages) = (Arc::clone(&author), talk.messages.clone());
        let work = move || {
            author.answer(&messages, &sampling, pen);
            drop(permit);
        };
        let thread = std::thread::Builder::new().name("ftkit-author".to_owned()).spawn(work);
        thread.map_err(|_| ApiError::unavailable("the server has no thread for this answer"))?;
    }
    Ok(receiver)
}

/// Sends one request's events to the task that answers.
struct Channel {
    sender: UnboundedSender<(usize, Event)>,
    index: usize,
    meter: Meter,
}

impl Sink for Channel {
    fn send(&mut self, event: Event) -> bool {
        self.meter.event(&event);
        let event = match event {
            // among many adapters, whose answer it was
            Event::Failed(error) if error.kind == ErrorKind::Failure => {
                let message = format!("{}: {}", self.meter.model(), error.message);
                Event::Failed(Error { message, ..error })
            }
            event => event,
        };
        self.sender.send((self.index, event)).is_ok()
    }

    fn closed(&self) -> bool {
        self.sender.is_closed()
    }
}

/// Waits for all choices to end. The first that fails, fails the answer; the others are then cancelled.
async fn collect(
    mut receiver: UnboundedReceiver<(usize, Event)>,
    mut parts: Vec<Parts>,
    choices: usize,
) -> Result<(Vec<Answered>, Usage), ApiError> {
    let mut answers = vec![Answered::default(); parts.len()];
    let (mut open, mut total) = (parts.len(), Usage::default());
    while open > 0 {
        let Some((index, event)) = receiver.recv().await else {
            return Err(ApiError::unavailable("the answer was cut off"));
        };
        let more = match event {
            Event::Failed(error) => return Err(error.into()),
            Event::Delta(delta) => parts[index].push(delta),
            Event::Finished { delta, reason, usage } => {
                let (more, ending) = parts[index].finish(delta, reason);
                answers[index].ending = ending;
                total.add(usage, index.is_multiple_of(choices));
                open -= 1;
                more
            }
        };
        for part in more {
            answers[index].add(part);
        }
    }
    Ok((answers, total))
}
