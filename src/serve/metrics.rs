//! What the server counts, in Prometheus' text format.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::fairness::MAX_PRIORITY;
use super::scheduler::Counters;

/// A number that other threads may read at any time.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

impl Number {
    /// Adds to it.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Replaces it.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Reads it.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the histogram's buckets, in microseconds: 1 ms to 10 s.
const BOUNDS: [u64; 13] = [
    1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000,
];

/// Durations, counted by size.
#[derive(Debug, Default)]
pub struct Durations {
    buckets: [Number; BOUNDS.len()],
    count: Number,
    microseconds: Number,
}

impl Durations {
    /// Counts one.
    pub fn record(&self, duration: Duration) {
        let microseconds = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        if let Some(index) = BOUNDS.iter().position(|&bound| microseconds <= bound) {
            self.buckets[index].add(1);
        }
        self.count.add(1);
        self.microseconds.add(microseconds);
    }

    /// How many there were.
    pub(super) fn count(&self) -> u64 {
        self.count.get()
    }

    /// Prometheus' text format.
    pub(super) fn write(&self, text: &mut String, name: &str, help: &str) {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
        self.write_labelled(text, name, "");
    }

    /// The same without its head, of one of several with a label `name="value"`.
    fn write_labelled(&self, text: &mut String, name: &str, label: &str) {
        let comma = if label.is_empty() { "" } else { "," };
        let braces = if label.is_empty() { String::new() } else { format!("{{{label}}}") };
        let mut sum = 0;
        for (bucket, &bound) in self.buckets.iter().zip(&BOUNDS) {
            sum += bucket.get();
            let _ = writeln!(text, "{name}_bucket{{{label}{comma}le=\"{}\"}} {sum}", bound as f64 / 1e6);
        }
        let count = self.count.get();
        let _ = writeln!(text, "{name}_bucket{{{label}{comma}le=\"+Inf\"}} {count}");
        let seconds = self.microseconds.get() as f64 / 1e6;
        let _ = writeln!(text, "{name}_sum{braces} {seconds}\n{name}_count{braces} {count}");
    }
}

/// Number of priorities.
const PRIORITIES: usize = 2 * MAX_PRIORITY as usize + 1;

fn place(priority: i8) -> usize {
    (i16::from(priority.clamp(-MAX_PRIORITY, MAX_PRIORITY)) + i16::from(MAX_PRIORITY)) as usize
}

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests in the queue.
    pub waiting: Number,
    /// Sequences that run.
    pub running: Number,
    /// Pages in use.
    pub blocks_used: Number,
    /// Pages that nobody uses and that hold what may be asked for again.
    pub blocks_idle: Number,
    /// Pages of adapters that nobody uses.
    pub blocks_parked: Number,
    /// Adapters whose weights are in the pool.
    pub adapters_resident: Number,
    /// Bytes of their pages.
    pub adapters_bytes: Number,
    /// Requests in the queue and what they waited, by priority.
    queue: [(Number, Durations); PRIORITIES],
    /// Pages there are.
    pub blocks_total: Number,
    /// Bytes of a page.
    pub block_bytes: Number,
    /// Requests refused because the queue was full.
    pub refused: Number,
    /// Tokens that steps computed.
    pub batch_tokens: Number,
    /// Time of the steps.
    pub step_seconds: Durations,
    /// Time from a request to its first token.
    pub first_token_seconds: Durations,
    /// HTTP answers by class of status: 2xx, 4xx, 5xx.
    pub http: [Number; 3],
    started: Number,
    finished: Number,
    failed: Number,
    late: Number,
    cancelled: Number,
    preempted: Number,
    prefilled_tokens: Number,
    cached_tokens: Number,
    cache_hits: Number,
    adapter_hits: Number,
    adapter_misses: Number,
    adapter_evictions: Number,
    generated_tokens: Number,
    drafted_tokens: Number,
    accepted_tokens: Number,
}

impl Metrics {
    /// Takes over what the scheduler counted.
    pub(super) fn scheduled(&self, counters: Counters) {
        self.started.set(counters.started);
        self.finished.set(counters.finished);
        self.failed.set(counters.failed);
        self.late.set(counters.late);
        self.cancelled.set(counters.cancelled);
        self.preempted.set(counters.preempted);
        self.prefilled_tokens.set(counters.prefilled_tokens);
        self.cached_tokens.set(counters.cached_tokens);
        self.cache_hits.set(counters.cache_hits);
        self.adapter_hits.set(counters.adapter_hits);
        self.adapter_misses.set(counters.adapter_misses);
        self.adapter_evictions.set(counters.adapter_evictions);
        self.generated_tokens.set(counters.generated_tokens);
        self.drafted_tokens.set(counters.drafted_tokens);
        self.accepted_tokens.set(counters.accepted_tokens);
    }

    /// The priorities of the requests that wait, and requests that began: their priority, and when they came.
    pub(super) fn queued(&self, waiting: impl Iterator<Item = i8>, begun: Vec<(i8, Instant)>) {
        let mut counts = [0; PRIORITIES];
        waiting.for_each(|priority| counts[place(priority)] += 1);
        self.queue.iter().zip(counts).for_each(|((number, _), count)| number.set(count));
        begun.into_iter().for_each(|(priority, came)| self.queue[place(priority)].1.record(came.elapsed()));
    }

    /// Counts an HTTP answer.
    pub(super) fn answered(&self, status: u16) {
        let class = if status >= 500 { 2 } else { usize::from(status >= 400) };
        self.http[class].add(1);
    }

    /// Everything as (name, kind, help, value), for people and programs.
    fn numbers(&self) -> Vec<(&'static str, &'static str, &'static str, u64)> {
        vec![
            ("ftkit_requests_waiting", "gauge", "requests in the queue", self.waiting.get()),
            ("ftkit_requests_running", "gauge", "sequences that run", self.running.get()),
            (
                "ftkit_requests_refused_total",
                "counter",
                "requests refused because the queue was full",
                self.refused.get(),
            ),
            ("ftkit_requests_started_total", "counter", "answers whose first token was generated", self.started.get()),
            ("ftkit_requests_finished_total", "counter", "answers that came to their end", self.finished.get()),
            ("ftkit_requests_failed_total", "counter", "answers that failed", self.failed.get()),
            (
                "ftkit_requests_late_total",
                "counter",
                "of the failed: first token not possible in time",
                self.late.get(),
            ),
            ("ftkit_requests_cancelled_total", "counter", "answers whose caller left", self.cancelled.get()),
            ("ftkit_preemptions_total", "counter", "sequences that gave their pages up", self.preempted.get()),
            ("ftkit_prompt_tokens_total", "counter", "prompt tokens computed", self.prefilled_tokens.get()),
            (
                "ftkit_cached_tokens_total",
                "counter",
                "prompt tokens that were in the pool already",
                self.cached_tokens.get(),
            ),
            (
                "ftkit_prompt_cache_hits_total",
                "counter",
                "requests whose prompt began with tokens in the pool",
                self.cache_hits.get(),
            ),
            ("ftkit_generated_tokens_total", "counter", "tokens generated", self.generated_tokens.get()),
            ("ftkit_drafted_tokens_total", "counter", "tokens drafted", self.drafted_tokens.get()),
            ("ftkit_accepted_tokens_total", "counter", "tokens drafted that were right", self.accepted_tokens.get()),
            ("ftkit_batch_tokens_total", "counter", "tokens that steps computed", self.batch_tokens.get()),
            ("ftkit_blocks_used", "gauge", "pages of the pool in use", self.blocks_used.get()),
            (
                "ftkit_blocks_idle",
                "gauge",
                "pages that nobody uses, kept for prompts that begin the same",
                self.blocks_idle.get(),
            ),
            ("ftkit_blocks_parked", "gauge", "pages of adapters that nobody uses for now", self.blocks_parked.get()),
            (
                "ftkit_adapters_resident",
                "gauge",
                "adapters whose weights are in the pool",
                self.adapters_resident.get(),
            ),
            ("ftkit_adapters_bytes", "gauge", "bytes of their pages", self.adapters_bytes.get()),
            (
                "ftkit_adapter_hits_total",
                "counter",
                "requests whose adapter was in the pool when they came to it",
                self.adapter_hits.get(),
            ),
            (
                "ftkit_adapter_misses_total",
                "counter",
                "requests that waited for their adapter to be read",
                self.adapter_misses.get(),
            ),
            (
                "ftkit_adapter_evictions_total",
                "counter",
                "adapters that had to make room for something else",
                self.adapter_evictions.get(),
            ),
            ("ftkit_blocks_total", "gauge", "pages of the pool", self.blocks_total.get()),
            ("ftkit_block_bytes", "gauge", "bytes of a page", self.block_bytes.get()),
        ]
    }

    /// The single numbers by name, without the prefix.
    pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
        self.numbers().into_iter().map(|(name, _, _, value)| (name.trim_start_matches("ftkit_"), value)).collect()
    }

    /// Prometheus' text format, version 0.0.4.
    pub fn prometheus(&self) -> String {
        let mut text = String::new();
        for (name, kind, help, value) in self.numbers() {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        }
        let _ =
            writeln!(text, "# HELP ftkit_http_responses_total HTTP answers\n# TYPE ftkit_http_responses_total counter");
        for (class, number) in ["2xx", "4xx", "5xx"].iter().zip(&self.http) {
            let _ = writeln!(text, "ftkit_http_responses_total{{class=\"{class}\"}} {}", number.get());
        }
        let name = "ftkit_queue_waiting";
        let _ = writeln!(text, "# HELP {name} requests in the queue, by priority\n# TYPE {name} gauge");
        // a priority that nobody used yet is not told
        let used = || {
            let all = (-MAX_PRIORITY..=MAX_PRIORITY).zip(&self.queue);
            all.filter(|(_, (waiting, wait))| waiting.get() + wait.count() > 0)
        };
        for (priority, (waiting, _)) in used() {
            let _ = writeln!(text, "{name}{{priority=\"{priority}\"}} {}", waiting.get());
        }
        let name = "ftkit_queue_seconds";
        let _ = writeln!(text, "# HELP {name} time in the queue, by priority\n# TYPE {name} histogram");
        for (priority, (_, wait)) in used() {
            wait.write_labelled(&mut text, name, &format!("priority=\"{priority}\""));
        }
        self.step_seconds.write(&mut text, "ftkit_step_seconds", "time of a step");
        self.first_token_seconds.write(
            &mut text,
            "ftkit_first_token_seconds",
            "time from a request to its first token",
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_complete() {
        let durations = Durations::default();
        for milliseconds in [1, 3, 700, 100_000] {
            durations.record(Duration::from_millis(milliseconds));
        }
        let mut text = String::new();
        durations.write(&mut text, "t", "time");
        assert!(text.contains("t_bucket{le=\"0.001\"} 1\n") && text.contains("t_bucket{le=\"0.005\"} 2\n"));
        assert!(text.contains("t_bucket{le=\"10\"} 3\n") && text.contains("t_bucket{le=\"+Inf\"} 4\n"));
        assert!(text.contains("t_sum 100.704\nt_count 4\n"), "{text}");
    }
}
