//! The two completion routes: parse, encode, ask the engine, and answer whole or in pieces.

use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use rand::Rng;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::App;
use super::answers::{Envelope, Route};
use super::errors::ApiError;
use super::parse::{self, Asked, Prompt};
use super::stream::Chunks;
use crate::serve::constraint::Constraint;
use crate::serve::models::{Model, now};
use crate::serve::{Delta, Event, Request, Sink, Usage};

/// Answers a request of either route.
pub(super) async fn complete(app: Arc<App>, route: Route, body: Bytes) -> Result<Response, ApiError> {
    let start = Instant::now();
    // Long texts take a while to parse and encode: not on the threads that serve everybody.
    let shared = Arc::clone(&app);
    let prepared = tokio::task::spawn_blocking(move || prepare(&shared, route, &body)).await;
    let (asked, model, prompts, constraint) =
        prepared.map_err(|_| ApiError::server("the request could not be read"))??;
    let count = prompts.len() * asked.choices;
    let receiver = submit(&app, &asked, &model, &prompts, constraint.as_ref(), start)?;
    let envelope = Envelope {
        route,
        id: format!("{}-{:032x}", if route == Route::Chat { "chatcmpl" } else { "cmpl" }, rand::rng().random::<u128>()),
        created: now(),
        model: model.name,
        logprobs: asked.sampling.logprobs.is_some(),
    };
    if asked.stream {
        let language = Arc::clone(&app.language);
        let chunks = Chunks::new(receiver, envelope, language, count, asked.choices, asked.include_usage);
        let mut response = Body::from_stream(chunks).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        return Ok(response);
    }
    let (answers, usage) = collect(receiver, count, asked.choices).await?;
    let choices = answers.iter().enumerate();
    let choices =
        choices.map(|(index, (answer, reason))| envelope.choice(index, answer, reason, &*app.language)).collect();
    Ok(axum::Json(envelope.whole(choices, usage)).into_response())
}

type Prepared = (Asked, Model, Vec<Vec<u32>>, Option<Constraint>);

fn prepare(app: &App, route: Route, body: &[u8]) -> Result<Prepared, ApiError> {
    let asked = match route {
        Route::Chat => parse::chat(body)?,
        Route::Completion => parse::completion(body)?,
    };
    let name = asked.model.as_deref().unwrap_or(&app.settings.model);
    let Some(model) = app.models.find(Some(name)) else {
        let known: Vec<String> = app.models.list().into_iter().map(|model| model.name).collect();
        return Err(ApiError::no_model(name, &known.join(", ")));
    };
    let limits = app.engine.limits();
    let mut prompts = Vec::with_capacity(asked.prompts.len());
    for prompt in &asked.prompts {
        let tokens = match prompt {
            Prompt::Chat(conversation) => app.language.chat(conversation)?,
            Prompt::Text(text) => app.language.text(text)?,
            Prompt::Tokens(tokens) => tokens.clone(),
        };
        limits.check(&tokens, &asked.sampling)?;
        prompts.push(tokens);
    }
    let constraint = asked.format.as_ref().map(|format| app.language.constraint(format)).transpose()?;
    Ok((asked, model, prompts, constraint))
}

fn submit(
    app: &App,
    asked: &Asked,
    model: &Model,
    prompts: &[Vec<u32>],
    constraint: Option<&Constraint>,
    start: Instant,
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
                sampling,
                constraint: constraint.cloned(),
                adapter: model.adapter,
                decoder: app.language.decoder(),
                sink: Box::new(Channel { sender: sender.clone(), index, first: Some((start, app.engine.clone())) }),
                urgent: false,
            });
        }
    }
    app.engine.submit(requests)?;
    Ok(receiver)
}

/// Sends one request's events to the task that answers.
struct Channel {
    sender: UnboundedSender<(usize, Event)>,
    index: usize,
    /// Until the first event: when the request came, and where to note how long that took.
    first: Option<(Instant, crate::serve::Engine)>,
}

impl Sink for Channel {
    fn send(&mut self, event: Event) -> bool {
        if let Some((start, engine)) = self.first.take() {
            engine.metrics().first_token_seconds.record(start.elapsed());
        }
        self.sender.send((self.index, event)).is_ok()
    }

    fn closed(&self) -> bool {
        self.sender.is_closed()
    }
}

/// Waits for all choices to end. The first that fails, fails the answer; the others are then cancelled.
async fn collect(
    mut receiver: UnboundedReceiver<(usize, Event)>,
    count: usize,
    choices: usize,
) -> Result<(Vec<(Delta, &'static str)>, Usage), ApiError> {
    let mut answers = vec![(Delta::default(), ""); count];
    let (mut open, mut total) = (count, Usage::default());
    while open > 0 {
        let Some((index, event)) = receiver.recv().await else {
            return Err(ApiError::unavailable("the answer was cut off"));
        };
        let delta = match event {
            Event::Failed(error) => return Err(error.into()),
            Event::Delta(delta) => delta,
            Event::Finished { delta, reason, usage } => {
                answers[index].1 = reason.as_str();
                total.completion_tokens += usage.completion_tokens;
                if index.is_multiple_of(choices) {
                    total.prompt_tokens += usage.prompt_tokens;
                }
                open -= 1;
                delta
            }
        };
        answers[index].0.text.push_str(&delta.text);
        answers[index].0.tokens.extend(delta.tokens);
    }
    Ok((answers, total))
}
