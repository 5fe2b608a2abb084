//! A few threads that work on one thing after another without going to sleep between.
//!
//! A model's step is some hundred short parallel loops with a little serial work between them; waking a thread for each
//! would take longer than the loops. So the helpers are woken once a step, and wait for the next loop with their eyes
//! open. They yield the processor when the wait gets long, and leave when the step ends: an idle engine takes none.
//!
//! Loops are cut into tasks. Each thread has a range of them of its own, so that threads that keep pace share no line of
//! the cache but to begin and to end; a thread that is done takes what is left of the others' ranges, so one that is
//! held up, or comes late, holds up no more than its task.

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
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

/// Tasks a thread, where there is work for more: enough to even out threads of unequal speed.
const TASKS_A_THREAD: usize = 4;

/// The threads of one piece of work. The one that made it gives out loops, the others help.
pub struct Team {
    seats: Vec<Seat>,
    /// The current loop; only whoever took a task of it looks at it.
    job: AtomicPtr<Job<'static>>,
    over: AtomicBool,
    /// What a task of the current loop panicked with; it goes on in `each`, when nobody looks at the job any more.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

struct Job<'a>(&'a (dyn Fn(usize) + Sync));

/// What belongs to one thread, on lines of the cache that the others seldom touch.
#[derive(Default)]
struct Seat {
    open: Apart<AtomicU64>,
    /// Tasks that this thread has done since the team was made; nobody else writes it.
    done: Apart<AtomicUsize>,
}

/// On lines of the cache of its own; processors fetch them in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Apart<T>(T);

/// The tasks of a thread's range that nobody has taken, and the number of their loop, in one word.
#[derive(Clone, Copy)]
struct Open(u64);

impl Open {
    const BITS: u32 = 20;
    /// Tasks that a loop may have.
    const MOST: usize = (1 << Self::BITS) - 1;

    fn new(number: u64, tasks: Range<usize>) -> Self {
        Self(number << (2 * Self::BITS) | (tasks.start as u64) << Self::BITS | tasks.end as u64)
    }

    fn number(self) -> u64 {
        self.0 >> (2 * Self::BITS)
    }

    fn tasks(self) -> Range<usize> {
        let part = |word: u64| (word & Self::MOST as u64) as usize;
        part(self.0 >> Self::BITS)..part(self.0)
    }
}

impl Team {
    /// Runs `work` with helpers from the pool of threads.
    pub fn run<R>(work: impl FnOnce(&Self) -> R) -> R {
        let most = MOST.load(Ordering::Relaxed);
        let threads = rayon::current_num_threads().min(if most == 0 { usize::MAX } else { most });
        let team = Self {
            seats: (0..threads).map(|_| Seat::default()).collect(),
            job: AtomicPtr::new(std::ptr::null_mut()),
            over: AtomicBool::new(false),
            panic: Mutex::new(None),
        };
        rayon::in_place_scope(|scope| {
            let team = &team;
            for helper in 1..threads {
                scope.spawn(move |_| team.help(helper));
            }
            // also when `work` panics: the scope waits for the helpers
            let _end = End(team);
            work(team)
        })
    }

    /// A team of the calling thread, for what is a task of another team's.
    pub fn alone() -> Self {
        Self {
            seats: vec![Seat::default()],
            job: AtomicPtr::new(std::ptr::null_mut()),
            over: AtomicBool::new(true),
            panic: Mutex::new(None),
        }
    }

    /// Threads that may be at work.
    pub fn threads(&self) -> usize {
        self.seats.len()
    }

    /// How many tasks to cut `work` into, of which `least` is worth waking up for: one, or as many for each thread.
    pub fn tasks(&self, work: usize, least: usize) -> usize {
        let threads = self.threads();
        if work < least { 1 } else { threads * (work / (least * threads)).clamp(1, TASKS_A_THREAD) }
    }

    /// Calls `task` with 0 to `count` − 1, each once, in any order, on any of the threads; returns when all are done.
    pub fn each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        let threads = self.threads();
        if threads == 1 || !(2..=Open::MOST).contains(&count) {
            return (0..count).for_each(task);
        }
        let job = Job(task);
        let before = self.done();
        self.job.store(std::ptr::from_ref(&job).cast_mut().cast(), Ordering::Relaxed);
        let number = Open(self.seats[0].open.0.load(Ordering::Relaxed)).number() + 1;
        for (index, seat) in self.seats.iter().enumerate().rev() {
            let tasks = count * index / threads..count * (index + 1) / threads;
            seat.open.0.store(Open::new(number, tasks).0, Ordering::Release);
        }
        self.work(0);
        let mut spins = 0;
        while self.done() - before < count {
            wait(&mut spins);
        }
        if let Some(panic) = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    /// Tasks that all threads have done.
    fn done(&self) -> usize {
        self.seats.iter().map(|seat| seat.done.0.load(Ordering::Acquire)).sum()
    }

    /// Does the tasks of a thread's own range from the front, then those that are left of the others' from the back.
    fn work(&self, thread: usize) {
        let threads = self.threads();
        let mut count = 0;
        for other in (thread..threads).chain(0..thread) {
            while let Some(task) = self.take(other, other == thread) {
                count += 1;
                // SAFETY: the task is ours, so `each` doesn't return, and its job doesn't go, before it is counted as
                // done. The pointer was stored before the range.
                let job = unsafe { &*self.job.load(Ordering::Relaxed) };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.0)(task))) {
                    *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                }
            }
        }
        let done = &self.seats[thread].done.0;
        done.store(done.load(Ordering::Relaxed) + count, Ordering::Release);
    }

    /// A task of a range that nobody has taken.
    fn take(&self, seat: usize, front: bool) -> Option<usize> {
        let open = &self.seats[seat].open.0;
        let mut found = Open(open.load(Ordering::Acquire));
        loop {
            let Range { start, end } = found.tasks();
            if start >= end {
                return None;
            }
            let (task, rest) = if front { (start, start + 1..end) } else { (end - 1, start..end - 1) };
            let rest = Open::new(found.number(), rest);
            match open.compare_exchange(found.0, rest.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(task),
                Err(other) => found = Open(other),
            }
        }
    }

    fn help(&self, thread: usize) {
        let (mut seen, mut spins) = (0, 0);
        while !self.over.load(Ordering::Acquire) {
            // ranges only shrink, so after one round nothing is left of a loop
            let number = Open(self.seats[thread].open.0.load(Ordering::Acquire)).number();
            if number == seen {
                wait(&mut spins);
            } else {
                (seen, spins) = (number, 0);
                self.work(thread);
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
    #[inline]
    pub unsafe fn write(&self, at: usize, values: &[T]) {
        assert!(at.checked_add(values.len()).is_some_and(|end| end <= self.len));
        // SAFETY: there is room, and by the caller's promise nobody else's.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(at), values.len()) };
    }

    /// The place `at`, or the one behind the last; panics where there is none.
    pub fn at(&self, at: usize) -> *mut T {
        assert!(at <= self.len);
        self.start.wrapping_add(at)
    }

    /// The places from `range.start` to `range.end`, to be written; panics where there are no such.
    ///
    /// # Safety
    /// No other task has these places while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: they are inside, and by the caller's promise nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
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
