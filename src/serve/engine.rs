//! The engine: one thread that owns the scheduler and calls the model's step, and a handle to it that can be shared.
//!
//! Requests come in through a channel and answers go out through each request's sink, so no caller waits for a lock that
//! a step holds. A step that fails, fails its batch; the thread lives until it is told to stop.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::limits::Limits;
use super::metrics::Metrics;
use super::request::Request;
use super::residency::Fetched;
use super::scheduler::Scheduler;
use super::step::{Batch, Shelf, Step};
use crate::{Error, Result};

enum Command {
    Add(Box<Request>),
    /// Answers whether somebody still uses the adapter.
    Uses(i32, Sender<bool>),
    /// Requests may name an adapter that is on disk.
    Know(i32),
    /// No more requests for the adapter will come.
    Forget(i32),
    /// An adapter was read, or could not be.
    Fetched(i32, Result<Fetched>),
    Stop,
}

struct Shared {
    limits: Limits,
    metrics: Arc<Metrics>,
    /// Requests handed over and not admitted yet.
    queued: AtomicUsize,
    /// Microseconds from one request that leaves the queue to the next, of late.
    turnover: AtomicU64,
    stopped: AtomicBool,
    commands: Mutex<Sender<Command>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A handle to a running engine; clones are handles to the same.
#[derive(Clone)]
pub struct Engine(Arc<Shared>);

/// Why a request was not taken.
#[derive(Clone, Debug)]
pub enum Refused {
    /// The queue is full.
    Full {
        /// So many wait.
        waiting: usize,
        /// In so many seconds, one will have left.
        retry_after: u64,
    },
    /// The engine has been stopped.
    Stopped,
    /// It cannot be answered.
    Invalid(Error),
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full { waiting, .. } => {
                Self::failure(format!("the queue is full: {waiting} requests are waiting")).hint("try again later")
            }
            Refused::Stopped => Self::failure("the engine is closed"),
            Refused::Invalid(error) => error,
        }
    }
}

impl Engine {
    /// Starts the engine's thread, and one that reads adapters.
    pub fn start(limits: Limits, step: impl Step + 'static, shelf: impl Shelf + 'static) -> Result<Self> {
        if limits.sequences == 0 || limits.batch_tokens < limits.sequences || limits.vocabulary == 0 {
            let (tokens, sequences) = (limits.batch_tokens, limits.sequences);
            let message = format!("batch_tokens: expected at least sequences ({sequences}) and 1, got {tokens}");
            return Err(Error::input(message));
        }
        if limits.longest() < 2 {
            return Err(Error::input(format!("pool: expected room for at least 2 tokens, got {}", limits.longest())));
        }
        let (commands, inbox) = channel();
        let metrics = Arc::new(Metrics::default());
        metrics.blocks_total.set(limits.pages as u64);
        let shared = Arc::new(Shared {
            limits,
            metrics,
            queued: AtomicUsize::new(0),
            turnover: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            commands: Mutex::new(commands),
            thread: Mutex::new(None),
        });
        let failed = |error| Error::failure(format!("the engine's threads: {error}"));
        let (errands, list) = channel();
        let clerk = Arc::clone(&shared);
        let reader = std::thread::Builder::new()
            .name("ftkit-adapters".into())
            .spawn(move || read(&clerk, &list, shelf))
            .map_err(failed)?;
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("ftkit-engine".into())
            .spawn(move || {
                work(&worker, &inbox, step, &errands);
                drop(errands);
                let _ = reader.join();
            })
            .map_err(failed)?;
        *shared.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(Self(shared))
    }

    /// The engine's bounds.
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// What the engine counts and times.
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Hands requests over: all of them, or none.
    pub fn submit(&self, requests: Vec<Request>) -> Result<(), Refused> {
        let urgent = requests.iter().all(|request| request.urgent);
        self.hand_over(requests, if urgent { usize::MAX } else { self.0.limits.waiting })
    }

    /// Hands over one more request of a caller who has had others answered: it waits its turn, but is not refused when
    /// the queue is full, since what he has would be lost.
    pub fn submit_more(&self, request: Request) -> Result<(), Refused> {
        self.hand_over(vec![request], usize::MAX)
    }

    fn hand_over(&self, requests: Vec<Request>, most: usize) -> Result<(), Refused> {
        for request in &requests {
            self.0.limits.check(&request.prompt, &request.sampling).map_err(Refused::Invalid)?;
        }
        let count = requests.len();
        let take = |queued: usize| queued.checked_add(count).filter(|&sum| sum <= most);
        if let Err(queued) = self.0.queued.fetch_update(Ordering::AcqRel, Ordering::Acquire, take) {
            self.0.metrics.refused.add(1);
            // A client that comes back earlier finds it full again.
            let retry_after = (self.0.turnover.load(Ordering::Relaxed).div_ceil(1_000_000)).clamp(1, 60);
            return Err(Refused::Full { waiting: queued, retry_after });
        }
        for request in requests {
            self.send(Command::Add(Box::new(request))).map_err(|()| Refused::Stopped)?;
        }
        Ok(())
    }

    /// Requests may name an adapter from now on, which the shelf has.
    pub fn know(&self, adapter: i32) {
        let _ = self.send(Command::Know(adapter));
    }

    /// No more requests will name the adapter; those under way keep it until they end.
    pub fn forget(&self, adapter: i32) {
        let _ = self.send(Command::Forget(adapter));
    }

    /// Whether a waiting or running request uses the adapter.
    pub fn uses(&self, adapter: i32) -> bool {
        let (answer, inbox) = channel();
        self.send(Command::Uses(adapter, answer)).is_ok() && inbox.recv().unwrap_or(false)
    }

    /// Whether the engine takes requests.
    pub fn running(&self) -> bool {
        !self.0.stopped.load(Ordering::Acquire)
    }

    /// Fails what is under way, ends the thread and waits for it. Does nothing the second time.
    pub fn stop(&self) {
        let _ = self.send(Command::Stop);
        let thread = self.0.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A garbage collector may run this on the thread itself, which then ends after its step.
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }

    fn send(&self, command: Command) -> Result<(), ()> {
        if self.0.stopped.load(Ordering::Acquire) {
            return Err(());
        }
        self.0.commands.lock().unwrap_or_else(PoisonError::into_inner).send(command).map_err(|_| ())
    }
}

/// What the reader of adapters is asked for.
enum Errand {
    Fetch(i32),
    Forget(i32),
}

fn read(shared: &Shared, list: &Receiver<Errand>, mut shelf: impl Shelf) {
    for errand in list {
        match errand {
            Errand::Fetch(adapter) => {
                let command = Command::Fetched(adapter, shelf.fetch(adapter));
                let _ = shared.commands.lock().unwrap_or_else(PoisonError::into_inner).send(command);
            }
            Errand::Forget(adapter) => shelf.forget(adapter),
        }
    }
}

/// Requests that wait only for an adapter are looked at this often, whether their callers have left or they are late.
const GLANCE: Duration = Duration::from_millis(50);

fn work(shared: &Shared, inbox: &Receiver<Command>, mut step: impl Step, errands: &Sender<Errand>) {
    let mut scheduler = Scheduler::new(shared.limits.clone());
    let mut logits = Vec::new();
    let mut taken = Taken { waiting: 0, left: Instant::now() };
    // Whether there is something to do without another command.
    let mut busy = false;
    'life: loop {
        let mut next = if busy {
            inbox.try_recv().ok()
        } else if scheduler.idle() {
            match inbox.recv() {
                Ok(command) => Some(command),
                Err(_) => break 'life,
            }
        } else {
            inbox.recv_timeout(GLANCE).ok()
        };
        while let Some(command) = next {
            match command {
                Command::Add(request) => {
                    taken.waiting += 1;
                    scheduler.add(*request);
                }
                Command::Uses(adapter, answer) => {
                    scheduler.drop_cancelled();
                    let _ = answer.send(scheduler.uses(adapter));
                }
                Command::Know(adapter) => scheduler.residency().know(adapter),
                Command::Forget(adapter) => scheduler.residency().forget(adapter),
                Command::Fetched(adapter, outcome) => scheduler.fetched(adapter, outcome),
                Command::Stop => break 'life,
            }
            next = inbox.try_recv().ok();
        }
        scheduler.drop_cancelled();
        scheduler.drop_late(Instant::now());
        let batch = scheduler.plan();
        let moved = arrange(&mut scheduler, &mut step, errands);
        busy = batch.is_some();
        if let Some(batch) = batch.filter(|_| moved) {
            // Before the step: who waits now waits for it.
            publish(shared, &mut scheduler, &mut taken);
            let planned = batch.tokens.len();
            let start = Instant::now();
            let computed = drafts(&mut scheduler, &mut step, &mut logits, batch).and_then(|batch| {
                logits.clear();
                step.run(&batch, &mut logits)?;
                Ok(batch.tokens.len())
            });
            let tokens = match computed {
                Ok(tokens) => {
                    scheduler.apply(&logits);
                    tokens
                }
                Err(error) => {
                    scheduler.fail(&error);
                    planned
                }
            };
            scheduler.took(tokens, start.elapsed());
            shared.metrics.step_seconds.record(start.elapsed());
            shared.metrics.batch_tokens.add(tokens as u64);
        }
        publish(shared, &mut scheduler, &mut taken);
    }
    shared.stopped.store(true, Ordering::Release);
    scheduler.fail_all(&Error::failure("the engine is shutting down"));
    for command in inbox.try_iter() {
        if let Command::Add(mut request) = command {
            request.sink.send(super::Event::Failed(Error::failure("the engine is shutting down")));
        }
    }
    publish(shared, &mut scheduler, &mut taken);
}

/// The planned batch with what the drafting model guesses, where there is one: a token of each draft at a time.
pub(super) fn drafts(
    scheduler: &mut Scheduler,
    step: &mut impl Step,
    logits: &mut Vec<f32>,
    planned: Batch,
) -> Result<Batch> {
    let mut batch = planned;
    while let Some(asked) = scheduler.drafting() {
        logits.clear();
        step.draft(&asked, logits)?;
        scheduler.drafted(logits);
        batch = scheduler.batch();
    }
    Ok(batch)
}

/// Moves adapters in and out of the pool, and sends for others; `false` when one could not be moved and the batch failed.
fn arrange(scheduler: &mut Scheduler, step: &mut impl Step, errands: &Sender<Errand>) -> bool {
    let moves = scheduler.moves();
    // first: it lets go of what was read, too
    moves.evicted.into_iter().for_each(|adapter| step.evict(adapter));
    for adapter in scheduler.residency().fetches() {
        let _ = errands.send(Errand::Fetch(adapter));
    }
    let mut good = true;
    for (adapter, pages) in moves.installed {
        if let Err(error) = step.install(adapter, &pages) {
            step.evict(adapter);
            scheduler.lost(adapter, &error);
            good = false;
        }
    }
    for adapter in moves.forgotten {
        let _ = errands.send(Errand::Forget(adapter));
    }
    good
}

/// Requests that the scheduler was given and that wait.
struct Taken {
    waiting: usize,
    /// When one left last, or nobody waited.
    left: Instant,
}

/// Shows the scheduler's state to the other threads.
fn publish(shared: &Shared, scheduler: &mut Scheduler, taken: &mut Taken) {
    // `queued` counts what was handed over; what is no longer waiting leaves it.
    let left = taken.waiting.saturating_sub(scheduler.waiting());
    shared.queued.fetch_sub(left, Ordering::AcqRel);
    taken.waiting -= left;
    if left > 0 {
        let each = taken.left.elapsed().as_micros() as u64 / left as u64;
        let before = shared.turnover.load(Ordering::Relaxed);
        shared.turnover.store(if before == 0 { each } else { (3 * before + each) / 4 }, Ordering::Relaxed);
    }
    if left > 0 || taken.waiting == 0 {
        taken.left = Instant::now();
    }
    let metrics = &shared.metrics;
    metrics.waiting.set(scheduler.waiting() as u64);
    metrics.running.set(scheduler.running() as u64);
    metrics.blocks_used.set(scheduler.pool().used() as u64);
    metrics.blocks_parked.set(scheduler.pool().parked() as u64);
    let (adapters, pages) = scheduler.resident();
    metrics.adapters_resident.set(adapters as u64);
    metrics.adapters_bytes.set(pages as u64 * metrics.block_bytes.get());
    let begun = scheduler.begun();
    metrics.queued(scheduler.priorities(), begun);
    metrics.blocks_idle.set(scheduler.pool().idle() as u64);
    metrics.scheduled(scheduler.counters());
}

#[cfg(test)]
mod tests {
    use super::super::Sampling;
    use super::super::fake::{FakeShelf, FakeStep, Listener, VOCABULARY, embedding, request};
    use super::*;

    fn engine(waiting: usize, pause: u64) -> Engine {
        let limits = Limits {
            batch_tokens: 8,
            sequences: 2,
            waiting,
            block_tokens: 3,
            pages: 40,
            context_tokens: 60,
            draft_tokens: 0,
            draft_model: false,
            vocabulary: VOCABULARY,
            end_ids: vec![0],
        };
        let mut step = FakeStep::new(40, 3);
        step.pause = Duration::from_millis(pause);
        Engine::start(limits, step, FakeShelf).unwrap()
    }

    fn sampling(max_tokens: usize) -> Sampling {
        Sampling { seed: Some(1), max_tokens: Some(max_tokens), ignore_end: true, ..Sampling::default() }
    }

    fn until(mut condition: impl FnMut() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(10), "waited in vain");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn answers_come_and_the_thread_ends() {
        let engine = engine(10, 0);
        let listener = Listener::default();
        engine.submit(vec![request(&[1, 2], sampling(5), -1, &listener)]).unwrap();
        until(|| listener.ending().starts_with("length"));
        engine.stop();
        engine.stop();
        assert!(!engine.running());
        assert!(matches!(engine.submit(vec![request(&[1], sampling(5), -1, &listener)]), Err(Refused::Stopped)));
    }

    #[test]
    fn a_full_queue_refuses_and_an_urgent_request_passes() {
        let engine = engine(2, 5);
        let listeners: Vec<Listener> = (0..4).map(|_| Listener::default()).collect();
        for listener in &listeners[..2] {
            engine.submit(vec![request(&[1, 2], sampling(50), -1, listener)]).unwrap();
        }
        until(|| engine.metrics().running.get() == 2);
        for listener in &listeners[2..] {
            engine.submit(vec![request(&[1, 2], sampling(2), -1, listener)]).unwrap();
        }
        let refused = engine.submit(vec![request(&[1, 2], sampling(2), -1, &Listener::default())]);
        assert!(matches!(refused, Err(Refused::Full { waiting: 2, retry_after: 1 })), "{refused:?}");
        let urgent = Listener::default();
        engine.submit(vec![Request { urgent: true, ..request(&[1, 2], sampling(2), -1, &urgent) }]).unwrap();
        until(|| listeners.iter().chain([&urgent]).all(|listener| listener.ending().starts_with("length")));
        until(|| engine.metrics().blocks_used.get() == 0);
        engine.submit(vec![request(&[1, 2], sampling(2), -1, &Listener::default())]).unwrap();
        engine.stop();
    }

    #[test]
    fn more_of_who_was_let_in_is_not_refused() {
        let engine = engine(1, 5);
        let listeners: Vec<Listener> = (0..6).map(|_| Listener::default()).collect();
        for listener in &listeners[..2] {
            engine.submit(vec![request(&[1, 2], sampling(50), -1, listener)]).unwrap();
            until(|| engine.0.queued.load(Ordering::Relaxed) == 0);
        }
        engine.submit(vec![embedding(&[1, 2], -1, &listeners[2])]).unwrap();
        for listener in &listeners[3..5] {
            engine.submit_more(embedding(&[1, 2], -1, listener)).unwrap();
        }
        let refused = engine.submit(vec![embedding(&[1, 2], -1, &listeners[5])]);
        assert!(matches!(refused, Err(Refused::Full { waiting: 3, .. })), "{refused:?}");
        until(|| listeners[2..5].iter().all(|listener| listener.mean().len() == 2));
        until(|| engine.0.queued.load(Ordering::Relaxed) == 0 && engine.metrics().blocks_used.get() == 0);
        engine.stop();
    }

    #[test]
    fn stopping_fails_what_is_under_way() {
        let engine = engine(10, 5);
        let listener = Listener::default();
        engine.submit(vec![request(&[1, 2], sampling(50), 4, &listener)]).unwrap();
        until(|| engine.uses(4));
        engine.stop();
        assert_eq!(listener.ending(), "failed: the engine is shutting down");
    }
}
