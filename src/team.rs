//! A few threads that work on one thing after another without going to sleep between.
//!
//! A model's step is some hundred short parallel loops with a little serial work between them; waking a thread for each
//! would take longer than the loops. So the helpers are woken once a step, and wait for the next loop with their eyes
//! open. They yield the processor when the wait gets long, and leave when the step ends: an idle engine takes none.
//!
//! Loops are cut into tasks that are handed out one by one, so a thread that is held up, or comes late, holds up no
//! more than its task.

use std::any::Any;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Most threads that work together; 0: all of the pool's.
static MOST: AtomicUsize = AtomicUsize::new(0);

/// Bounds the threads of all teams to come.
pub fn set_threads(count: usize) {
    MOST.store(count, Ordering::Relaxed);
}

/// Rounds of waiting before the processor is offered to others: some tens of microseconds.
const SPINS: u32 = 4096;

/// The threads of one piece of work. The one that made it gives out loops, the others help.
pub struct Team {
    threads: usize,
    /// The number of the current loop, and in the low half how many of its tasks nobody has taken.
    ticket: AtomicU64,
    /// Tasks of the current loop that are done.
    done: AtomicUsize,
    /// The current loop; only whoever took a task of it looks at it.
    job: AtomicPtr<Job<'static>>,
    over: AtomicBool,
    /// What a task of the current loop panicked with; it goes on in `each`, when nobody looks at the job any more.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

struct Job<'a>(&'a (dyn Fn(usize) + Sync));

impl Team {
    /// Runs `work` with helpers from the pool of threads.
    pub fn run<R>(work: impl FnOnce(&Self) -> R) -> R {
        let most = MOST.load(Ordering::Relaxed);
        let threads = rayon::current_num_threads().min(if most == 0 { usize::MAX } else { most });
        let team = Self {
            threads,
            ticket: AtomicU64::new(0),
            done: AtomicUsize::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            over: AtomicBool::new(false),
            panic: Mutex::new(None),
        };
        rayon::in_place_scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|_| team.help());
            }
            // also when `work` panics: the scope waits for the helpers
            let _end = End(&team);
            work(&team)
        })
    }

    /// Threads that may be at work.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `task` with 0 to `count` − 1, each once, in any order, on any of the threads; returns when all are done.
    pub fn each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        if self.threads == 1 || count < 2 {
            return (0..count).for_each(task);
        }
        let Ok(open) = u32::try_from(count) else { return (0..count).for_each(task) };
        let job = Job(task);
        self.done.store(0, Ordering::Relaxed);
        self.job.store(std::ptr::from_ref(&job).cast_mut().cast(), Ordering::Relaxed);
        let number = (self.ticket.load(Ordering::Relaxed) >> 32) + 1;
        self.ticket.store(number << 32 | u64::from(open), Ordering::Release);
        while self.take() {}
        let mut spins = 0;
        while self.done.load(Ordering::Acquire) < count {
            wait(&mut spins);
        }
        if let Some(panic) = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    /// Does one task that is open; `false` when there is none.
    fn take(&self) -> bool {
        let ticket = self.ticket.load(Ordering::Acquire);
        let open = ticket & u64::from(u32::MAX);
        if open == 0 {
            return false;
        }
        if self.ticket.compare_exchange(ticket, ticket - 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return true; // somebody was faster; there may be more
        }
        // SAFETY: the exchange succeeded, so a task of the current loop is ours, and `each` doesn't return, and its job
        // doesn't go, before that task is counted as done. The pointer was stored before the ticket.
        let job = unsafe { &*self.job.load(Ordering::Relaxed) };
        let outcome = catch_unwind(AssertUnwindSafe(|| (job.0)((open - 1) as usize)));
        if let Err(panic) = outcome {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        self.done.fetch_add(1, Ordering::Release);
        true
    }

    fn help(&self) {
        let mut spins = 0;
        while !self.over.load(Ordering::Acquire) {
            if self.take() {
                spins = 0;
            } else {
                wait(&mut spins);
            }
        }
    }
}

/// A slice that tasks write to at places of their own.
pub struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: `write` promises that no two tasks write to one place, and nobody reads.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T: Copy> Shared<'a, T> {
    /// Borrows the slice for as long as tasks write.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// Writes values from `at` on; panics where they have no room.
    ///
    /// # Safety
    /// No other task writes to these places.
    pub unsafe fn write(&self, at: usize, values: &[T]) {
        assert!(at.checked_add(values.len()).is_some_and(|end| end <= self.len));
        // SAFETY: there is room, and by the caller's promise nobody else's.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(at), values.len()) };
    }
}

struct End<'a>(&'a Team);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Release);
    }
}

fn wait(spins: &mut u32) {
    *spins += 1;
    if *spins < SPINS {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_of_every_loop_is_done_once() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        pool.install(|| {
            Team::run(|team| {
                for round in 0..3000usize {
                    let count = round % 7;
                    let times: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                    team.each(count, &|task| {
                        times[task].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(times.iter().all(|times| times.load(Ordering::Relaxed) == 1));
                }
            });
        });
    }

    #[test]
    fn a_panic_comes_out_and_nobody_hangs() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.install(|| Team::run(|team| team.each(50, &|task| assert!(task != 7, "told to"))));
        }));
        assert!(outcome.is_err());
    }
}
