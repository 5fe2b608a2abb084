use proptest::prelude::*;

use super::super::Sampling;
use super::super::fake::{FakeStep, Listener, VOCABULARY, request};
use super::super::prefix::root;
use super::super::step::Step;
use super::*;

fn limits(pages: usize, batch_tokens: usize, sequences: usize) -> Limits {
    Limits {
        batch_tokens,
        sequences,
        waiting: 100,
        block_tokens: 3,
        pages,
        context_tokens: 60,
        vocabulary: VOCABULARY,
        end_ids: vec![0],
    }
}

fn sampling(seed: u64, max_tokens: usize) -> Sampling {
    Sampling { seed: Some(seed), max_tokens: Some(max_tokens), logprobs: Some(0), ..Sampling::default() }
}

/// Steps until nothing is left to do.
fn finish(scheduler: &mut Scheduler, step: &mut FakeStep) {
    let mut logits = Vec::new();
    while let Some(batch) = scheduler.plan() {
        logits.clear();
        match step.run(&batch, &mut logits) {
            Ok(()) => scheduler.apply(&logits),
            Err(error) => scheduler.fail(&error),
        }
    }
}

fn alone(prompt: &[u32], sampling: &Sampling, adapter: i32) -> Listener {
    let mut scheduler = Scheduler::new(limits(20, 64, 1));
    let listener = Listener::default();
    scheduler.add(request(prompt, sampling.clone(), adapter, &listener));
    finish(&mut scheduler, &mut FakeStep::new(20, 3));
    listener
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The same request gives the same tokens, alone or in a crowd, whatever the budget, the pool and the arrivals;
    /// and afterwards every page is free.
    #[test]
    fn a_crowd_changes_no_answer(
        requests in prop::collection::vec(
            (prop_oneof![
                prop::collection::vec(1u32..VOCABULARY as u32, 1..30),
                // Many begin the same.
                (1usize..30, prop::collection::vec(1u32..3, 0..4)).prop_map(|(same, more)| [vec![7; same], more].concat()),
            ], 1usize..27, any::<u64>(), -1i32..3, 0usize..8), 1..12),
        pages in 22usize..40,
        batch_tokens in 4usize..40,
        sequences in 1usize..4,
    ) {
        let mut scheduler = Scheduler::new(limits(pages, batch_tokens, sequences));
        let mut step = FakeStep::new(pages, 3);
        let mut logits = Vec::new();
        let mut listeners = Vec::new();
        for (prompt, max_tokens, seed, adapter, steps) in &requests {
            let listener = Listener::default();
            scheduler.add(request(prompt, sampling(*seed, *max_tokens), *adapter, &listener));
            listeners.push(listener);
            for _ in 0..*steps {
                if let Some(batch) = scheduler.plan() {
                    prop_assert!(batch.tokens.len() <= batch_tokens && batch.sequences() <= sequences);
                    logits.clear();
                    step.run(&batch, &mut logits).unwrap();
                    scheduler.apply(&logits);
                }
            }
        }
        finish(&mut scheduler, &mut step);
        for ((prompt, max_tokens, seed, adapter, _), listener) in requests.iter().zip(&listeners) {
            let expected = alone(prompt, &sampling(*seed, *max_tokens), *adapter);
            prop_assert_eq!(listener.tokens(), expected.tokens());
            prop_assert_eq!(listener.text(), expected.text());
            prop_assert_eq!(listener.ending(), expected.ending());
        }
        prop_assert!(scheduler.idle());
        prop_assert_eq!(scheduler.pool().used(), 0);
        prop_assert_eq!(scheduler.counters().finished, requests.len() as u64);
    }

    #[test]
    fn who_leaves_frees_his_pages_and_disturbs_nobody(leaving in 0usize..5, after in 0usize..12) {
        let mut scheduler = Scheduler::new(limits(24, 8, 4));
        let mut step = FakeStep::new(24, 3);
        let listeners: Vec<Listener> = (0..5).map(|_| Listener::default()).collect();
        for (index, listener) in listeners.iter().enumerate() {
            scheduler.add(request(&[1 + index as u32; 7], sampling(index as u64, 20), -1, listener));
        }
        let mut logits = Vec::new();
        for _ in 0..after {
            if let Some(batch) = scheduler.plan() {
                logits.clear();
                step.run(&batch, &mut logits).unwrap();
                scheduler.apply(&logits);
            }
        }
        listeners[leaving].close();
        scheduler.drop_cancelled();
        finish(&mut scheduler, &mut step);
        for (index, listener) in listeners.iter().enumerate().filter(|(index, _)| *index != leaving) {
            prop_assert_eq!(listener.text(), alone(&[1 + index as u32; 7], &sampling(index as u64, 20), -1).text());
        }
        prop_assert_eq!(scheduler.pool().used(), 0);
    }
}

#[test]
fn too_few_pages_preempt_the_youngest_and_its_answer_goes_on() {
    // Each needs up to 10 pages of the 12; both fit at the beginning.
    let mut scheduler = Scheduler::new(limits(12, 32, 4));
    let long = Sampling { ignore_end: true, ..sampling(3, 25) };
    let listeners = [Listener::default(), Listener::default()];
    for listener in &listeners {
        scheduler.add(request(&[5, 6, 7], long.clone(), -1, listener));
    }
    finish(&mut scheduler, &mut FakeStep::new(12, 3));
    assert!(scheduler.counters().preempted > 0);
    let expected = alone(&[5, 6, 7], &long, -1);
    assert_eq!(expected.tokens().len(), 25);
    assert!(listeners.iter().all(|listener| listener.tokens() == expected.tokens()));
}

#[test]
fn a_step_that_fails_takes_its_batch_and_nobody_else() {
    let mut scheduler = Scheduler::new(limits(20, 8, 1));
    let mut step = FakeStep::new(20, 3);
    let listeners = [Listener::default(), Listener::default()];
    for listener in &listeners {
        scheduler.add(request(&[5, 6, 7], sampling(3, 5), -1, listener));
    }
    step.fail_next();
    finish(&mut scheduler, &mut step);
    assert_eq!(listeners[0].ending(), "failed: told to");
    assert_eq!(listeners[1].text(), alone(&[5, 6, 7], &sampling(3, 5), -1).text());
    assert_eq!((scheduler.pool().used(), scheduler.counters().failed, scheduler.counters().finished), (0, 1, 1));
}

#[test]
fn a_long_prompt_does_not_stall_a_running_answer() {
    let mut scheduler = Scheduler::new(limits(40, 6, 4));
    let mut step = FakeStep::new(40, 3);
    let (short, long) = (Listener::default(), Listener::default());
    scheduler.add(request(&[5], Sampling { ignore_end: true, ..sampling(3, 8) }, -1, &short));
    scheduler.add(request(&[6; 50], sampling(3, 2), -1, &long));
    let mut logits = Vec::new();
    for expected in 1..=8 {
        let batch = scheduler.plan().unwrap();
        assert_eq!(batch.tokens.len(), 6, "the budget is used up");
        logits.clear();
        step.run(&batch, &mut logits).unwrap();
        scheduler.apply(&logits);
        assert_eq!(short.tokens().len(), expected, "every step brings a token");
    }
}

#[test]
fn impossible_requests_are_refused_with_both_values() {
    let mut scheduler = Scheduler::new(limits(10, 8, 1));
    for (prompt, sampling, expected) in [
        (vec![], sampling(1, 1), "prompt: expected at least one token, got none"),
        (vec![1; 30], sampling(1, 1), "prompt: expected fewer than 30 tokens, got 30"),
        (vec![VOCABULARY as u32], sampling(1, 1), "prompt: expected token ids below 31, got 31"),
        (
            vec![1],
            Sampling { temperature: f32::NAN, ..sampling(1, 1) },
            "temperature: expected a number from 0 to 100, got NaN",
        ),
    ] {
        let listener = Listener::default();
        scheduler.add(request(&prompt, sampling, -1, &listener));
        assert_eq!(listener.ending().lines().next(), Some(format!("failed: {expected}").as_str()));
    }
    assert!(scheduler.idle());
}

fn steps(scheduler: &mut Scheduler, step: &mut FakeStep, count: usize) {
    let mut logits = Vec::new();
    for _ in 0..count {
        let Some(batch) = scheduler.plan() else { return };
        logits.clear();
        step.run(&batch, &mut logits).unwrap();
        scheduler.apply(&logits);
    }
}

fn ask(scheduler: &mut Scheduler, prompt: &[u32], adapter: i32) -> Listener {
    let listener = Listener::default();
    scheduler.add(request(prompt, sampling(1, 9), adapter, &listener));
    listener
}

#[test]
fn a_prompt_starts_after_what_is_there_already() {
    let (mut scheduler, mut step) = (Scheduler::new(limits(40, 64, 4)), FakeStep::new(40, 3));
    let first = ask(&mut scheduler, &[5; 20], -1);
    finish(&mut scheduler, &mut step);
    assert_eq!((first.cached(), scheduler.counters().prefilled_tokens), (0, 20));
    // The same again: all full pages but the last token, which is computed for its logits.
    let again = ask(&mut scheduler, &[5; 20], -1);
    finish(&mut scheduler, &mut step);
    assert_eq!((again.cached(), scheduler.counters().prefilled_tokens), (18, 22));
    assert_eq!(again.text(), first.text());
    // A prompt whose last page is full has that one computed again.
    let full = ask(&mut scheduler, &[5; 18], -1);
    finish(&mut scheduler, &mut step);
    assert_eq!((full.cached(), full.text()), (15, alone(&[5; 18], &sampling(1, 9), -1).text()));
    // The next turn of the conversation: the answer is there as well, but its last token was never computed.
    let turn: Vec<u32> = [&[5; 20][..], &first.tokens(), &[9, 9]].concat();
    let next = ask(&mut scheduler, &turn, -1);
    finish(&mut scheduler, &mut step);
    assert_eq!(next.cached(), (20 + first.tokens().len() - 1) / 3 * 3);
    assert_eq!(next.text(), alone(&turn, &sampling(1, 9), -1).text());
    // Another adapter's pages are its own.
    let other = ask(&mut scheduler, &[5; 20], 2);
    finish(&mut scheduler, &mut step);
    assert_eq!((other.cached(), other.text()), (0, alone(&[5; 20], &sampling(1, 9), 2).text()));
    assert_eq!(scheduler.pool().used(), 0);
}

#[test]
fn an_adapter_loaded_anew_never_sees_the_old_ones_pages() {
    let (mut scheduler, mut step) = (Scheduler::new(limits(40, 64, 4)), FakeStep::new(40, 3));
    let mut ask = |weights: u64, content: &str| {
        step.weights.insert(3, weights);
        let listener = Listener::default();
        let plain = request(&[5; 20], sampling(1, 9), 3, &listener);
        scheduler.add(Request { root: Some(root("fake", content)), ..plain });
        finish(&mut scheduler, &mut step);
        (listener.cached(), listener.text())
    };
    let (old, new) = (ask(100, "old"), ask(200, "new"));
    assert_eq!((old.0, new.0), (0, 0));
    assert_ne!(old.1, new.1);
    // And the old one, back again, finds what was its own.
    assert_eq!(ask(100, "old"), (18, old.1));
    assert_eq!(ask(200, "new"), (18, new.1));
}

#[test]
fn an_adapter_that_may_change_keeps_nothing() {
    let (mut scheduler, mut step) = (Scheduler::new(limits(40, 64, 4)), FakeStep::new(40, 3));
    for _ in 0..2 {
        let listener = Listener::default();
        scheduler.add(Request { root: None, ..request(&[5; 20], sampling(1, 9), 3, &listener) });
        finish(&mut scheduler, &mut step);
        assert_eq!((listener.cached(), scheduler.pool().idle()), (0, 0));
    }
}

#[test]
fn who_asks_the_same_at_the_same_time_waits_for_the_first() {
    let (mut scheduler, mut step) = (Scheduler::new(limits(40, 8, 4)), FakeStep::new(40, 3));
    let listeners: Vec<Listener> = (0..4).map(|_| ask(&mut scheduler, &[5; 20], -1)).collect();
    steps(&mut scheduler, &mut step, 1);
    assert_eq!(scheduler.running(), 1);
    finish(&mut scheduler, &mut step);
    assert_eq!(scheduler.counters().prefilled_tokens, 20 + 3 * 2);
    assert_eq!(listeners.iter().map(Listener::cached).collect::<Vec<_>>(), [0, 18, 18, 18]);
    assert!(listeners.iter().all(|listener| listener.text() == alone(&[5; 20], &sampling(1, 9), -1).text()));
}
