//! Whether the server can answer: `/health` decodes a token, `/ready` looks whether the engine moves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::App;
use super::errors::ApiError;
use crate::serve::models::NO_ADAPTER;
use crate::serve::{Engine, Event, Language, Request, Sampling, Sink};

/// A health check that is no older answers the next one too.
const AGE: Duration = Duration::from_secs(1);

/// What the checks remember.
#[derive(Default)]
pub(super) struct Checks {
    /// When a token was last asked for, and whether it came.
    health: tokio::sync::Mutex<Option<(Instant, bool)>>,
    /// The number of steps when it was last seen to change, and when that was.
    steps: std::sync::Mutex<Option<(u64, Instant)>>,
}

/// `/health`: decodes a token, past the queue. Checks that come together share one.
pub(super) async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    // A step that hangs is known already: nobody has to wait for it again.
    stuck(&app)?;
    let mut last = app.checks.health.lock().await;
    let healthy = match *last {
        Some((at, healthy)) if at.elapsed() < AGE => healthy,
        _ => {
            let limit = app.settings.stuck_after;
            let healthy = tokio::time::timeout(limit, decodes(&app.engine, &app.language)).await.unwrap_or(false);
            *last = Some((Instant::now(), healthy));
            healthy
        }
    };
    if healthy { Ok(Json(json!({"status": "ok"}))) } else { Err(ApiError::unavailable("the engine decodes no token")) }
}

/// `/ready`: whether to send requests here. Costs nothing and never waits.
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    if !app.engine.running() {
        return Err(ApiError::unavailable("the engine has stopped"));
    }
    stuck(&app)?;
    let waiting = app.engine.metrics().waiting.get();
    if waiting as usize >= app.engine.limits().waiting {
        return Err(ApiError::unavailable(format!("the queue is full: {waiting} requests are waiting")));
    }
    Ok(Json(json!({"status": "ready"})))
}

/// Fails when there is work and no step has ended for too long: since an earlier check saw the same.
fn stuck(app: &App) -> Result<(), ApiError> {
    let metrics = app.engine.metrics();
    let (steps, works) = (metrics.step_seconds.count(), metrics.running.get() + metrics.waiting.get() > 0);
    let mut seen = app.checks.steps.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match *seen {
        Some((before, since)) if works && before == steps => {
            if since.elapsed() > app.settings.stuck_after {
                let seconds = since.elapsed().as_secs();
                return Err(ApiError::unavailable(format!("the engine is stuck: no step has ended for {seconds} s")));
            }
        }
        _ => *seen = works.then(|| (steps, Instant::now())),
    }
    Ok(())
}

async fn decodes(engine: &Engine, language: &Arc<dyn Language>) -> bool {
    struct Probe(Option<tokio::sync::oneshot::Sender<bool>>);
    impl Sink for Probe {
        fn send(&mut self, event: Event) -> bool {
            match event {
                Event::Delta(_) => true,
                Event::Finished { .. } => self.0.take().is_some_and(|sender| sender.send(true).is_ok()),
                Event::Failed(_) => self.0.take().is_some_and(|sender| sender.send(false).is_ok()),
            }
        }
        fn closed(&self) -> bool {
            self.0.as_ref().is_none_or(tokio::sync::oneshot::Sender::is_closed)
        }
    }
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let sampling = Sampling { max_tokens: Some(1), temperature: 0.0, ignore_end: true, ..Sampling::default() };
    let request = Request {
        prompt: vec![0],
        answered: 0,
        sampling,
        constraint: None,
        adapter: NO_ADAPTER,
        root: None,
        decoder: language.decoder(false),
        sink: Box::new(Probe(Some(sender))),
        client: 0,
        priority: 0,
        deadline: None,
        urgent: true,
        embeds: false,
    };
    engine.submit(vec![request]).is_ok() && receiver.await.unwrap_or(false)
}
