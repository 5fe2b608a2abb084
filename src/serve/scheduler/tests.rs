use proptest::prelude::*;

use super::super::Sampling;
use super::super::engine::drafts;
use super::super::fake::{FakeShelf, FakeStep, Listener, PAGED, VOCABULARY, embedding, request};
use super::super::prefix::root;
use super::super::step::{Shelf, Step};
use super::*;

fn limits(pages: usize, batch_tokens: usize, sequences: usize) -> Limits {
    Limits {
        batch_tokens,
        sequences,
        waiting: 100,
        block_tokens: 3,
        pages,
        context_tokens: 60,
        draft_tokens: 0,
        draft_model: false,
        vocabulary: VOCABULARY,
        end_ids: vec![0],
    }
}

fn sampling(seed: u64, max_tokens: usize) -> Sampling {
    Sampling { seed: Some(seed), max_tokens: Some(max_tokens), logprobs: Some(0), ..Sampling::default() }
}

/// The next batch; adapters are moved, and fetched at once.
fn plan(scheduler: &mut Scheduler, step: &mut FakeStep) -> Option<Batch> {
    let batch = scheduler.plan();
    move_adapters(scheduler, step);
    for adapter in scheduler.residency().fetches() {
        scheduler.fetched(adapter, FakeShelf.fetch(adapter));
    }
    batch
}

fn move_adapters(scheduler: &mut Scheduler, step: &mut FakeStep) {
    let moves = scheduler.moves();
    moves.evicted.into_iter().for_each(|adapter| step.evict(adapter));
    moves.installed.into_iter().for_each(|(adapter, pages)| step.install(adapter, &pages).unwrap());
}

/// Steps until nothing is left to do.
fn finish(scheduler: &mut Scheduler, step: &mut FakeStep) {
    let mut logits = Vec::new();
    while !scheduler.idle() {
        let Some(batch) = plan(scheduler, step) else { continue };
        let batch = drafts(scheduler, step, &mut logits, batch).unwrap();
        logits.clear();
        match step.run(&batch, &mut logits) {
            Ok(()) => scheduler.apply(&logits),
            Err(error) => scheduler.fail(&error),
        }
    }
}

fn alone(prompt: &[u32], sampling: &Sampling, adapter: i32) -> Listener {
    alone_with(0.0, prompt, sampling, adapter)
}

fn alone_with(habit: f32, prompt: &[u32], sampling: &Sampling, adapter: i32) -> Listener {
    let mut scheduler = Scheduler::new(limits(30, 64, 1));
    let listener = Listener::default();
    if adapter >= PAGED {
        scheduler.residency().know(adapter);
    }
    scheduler.add(request(prompt, sampling.clone(), adapter, &listener));
    finish(&mut scheduler, &mut FakeStep::with_habit(30, 3, habit));
    listener
}

/// What a prompt is embedded as in one step.
fn embedded(prompt: &[u32], adapter: i32) -> Vec<f32> {
    let mut scheduler = Scheduler::new(Limits { context_tokens: 300, ..limits(110, 300, 1) });
    let listener = Listener::default();
    scheduler.residency().know(PAGED);
    scheduler.add(embedding(prompt, adapter, &listener));
    finish(&mut scheduler, &mut FakeStep::new(110, 3));
    assert_eq!(scheduler.counters().prefilled_tokens, prompt.len() as u64);
    assert_eq!((scheduler.pool().used(), scheduler.pool().idle()), (0, 0), "it leaves nothing for others");
    listener.mean()
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
            ], 1usize..27, any::<u64>(), prop_oneof![-1i32..3, PAGED..PAGED + 5], 0usize..8), 1..12),
        pages in 26usize..40,
        batch_tokens in 4usize..40,
        sequences in 1usize..4,
        (draft_tokens, habit) in (0usize..6, prop::sample::select(vec![0.0f32, 3.0, 9.0])),
        draft_habit in prop::option::of(prop::sample::select(vec![0.0f32, 9.0])),
    ) {
        let draft_model = draft_habit.is_some();
        let mut scheduler =
            Scheduler::new(Limits { draft_tokens, draft_model, ..limits(pages, batch_tokens, sequences) });
        let mut step = FakeStep::with_habit(pages, 3, habit);
        step.draft = draft_habit.map(|habit| Box::new(FakeStep::with_habit(pages, 3, habit)));
        let mut logits = Vec::new();
        let mut listeners = Vec::new();
        (PAGED..PAGED + 5).for_each(|adapter| scheduler.residency().know(adapter));
        for (prompt, max_tokens, seed, adapter, steps) in &requests {
            let listener = Listener::default();
            scheduler.add(request(prompt, sampling(*seed, *max_tokens), *adapter, &listener));
            listeners.push(listener);
            for _ in 0..*steps {
                if let Some(batch) = plan(&mut scheduler, &mut step) {
                    let batch = drafts(&mut scheduler, &mut step, &mut logits, batch).unwrap();
                    prop_assert!(batch.tokens.len() <= batch_tokens && batch.sequences() <= sequences);
                    logits.clear();
                    step.run(&batch, &mut logits).unwrap();
                    scheduler.apply(&logits);
                }
            }
        }
        finish(&mut scheduler, &mut step);
        for ((prompt, max_tokens, seed, adapter, _), listener) in requests.iter().zip(&listeners) {
            let expected = alone_with(habit, prompt, &sampling(*seed, *max_tokens), *adapter);
            prop_assert_eq!(listener.tokens(), expected.tokens());
            prop_assert_eq!(listener.text(), expected.text());
            prop_assert_eq!(listener.ending(), expected.ending());
        }
        prop_assert!(scheduler.idle());
        prop_assert_eq!(scheduler.pool().used(), 0);
        prop_assert_eq!(scheduler.counters().finished, requests.len() as u64);
        // They said how long they may become: none was admitted that couldn't stay.
        prop_assert_eq!(scheduler.counters().preempted, 0);
    }

    /// A text's embedding is the same to the bit in one step and in chunks among answers, which stay what they are.
    #[test]
    fn a_text_is_embedded_in_chunks_as_at_once(
        texts in prop::collection::vec(
            (1usize..50, 1u32..VOCABULARY as u32, prop_oneof![-1i32..1, Just(PAGED)], 0usize..6), 1..6),
        pages in 40usize..70,
        batch_tokens in 4usize..20,
        sequences in 1usize..4,
    ) {
        let mut scheduler = Scheduler::new(limits(pages, batch_tokens, sequences));
        let mut step = FakeStep::new(pages, 3);
        scheduler.residency().know(PAGED);
        let mut listeners = Vec::new();
        for &(length, first, adapter, count) in &texts {
            // others have computed the same, for an answer
            let text: Vec<u32> = (0..length as u32).map(|at| 1 + (first + at) % 30).collect();
            let pair = [Listener::default(), Listener::default()];
            scheduler.add(request(&text, sampling(3, 8), adapter, &pair[0]));
            scheduler.add(embedding(&text, adapter, &pair[1]));
            listeners.push((text, pair));
            steps(&mut scheduler, &mut step, count);
        }
        finish(&mut scheduler, &mut step);
        for ((text, [answer, mean]), &(_, _, adapter, _)) in listeners.iter().zip(&texts) {
            prop_assert_eq!(mean.mean(), embedded(text, adapter));
            prop_assert_eq!(answer.tokens(), alone(text, &sampling(3, 8), adapter).tokens());
        }
        prop_assert_eq!((scheduler.pool().used(), scheduler.counters().failed), (0, 0));
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
fn answers_without_a_bound_may_outgrow_the_pool_and_go_on_later() {
    // Each is expected to need 44 pages, and comes to need 83 of the 100.
    let limits = Limits { context_tokens: 250, ..limits(100, 32, 4) };
    let mut scheduler = Scheduler::new(limits.clone());
    let open = Sampling { ignore_end: true, max_tokens: None, ..sampling(3, 1) };
    let listeners = [Listener::default(), Listener::default()];
    for listener in &listeners {
        scheduler.add(request(&[5, 6, 7], open.clone(), -1, listener));
    }
    let mut step = FakeStep::new(100, 3);
    finish(&mut scheduler, &mut step);
    let counters = scheduler.counters();
    assert!(counters.preempted > 0);
    let expected = Listener::default();
    let mut alone = Scheduler::new(limits);
    alone.add(request(&[5, 6, 7], open, -1, &expected));
    finish(&mut alone, &mut FakeStep::new(100, 3));
    assert_eq!(expected.tokens().len(), 247);
    assert!(listeners.iter().all(|listener| listener.tokens() == expected.tokens()));
}

#[test]
fn what_has_a_bound_waits_until_it_can_stay() {
    // Each needs 9 pages at its end: at the same time in 18, one a little later in 17.
    for (pages, together) in [(18, 2), (17, 1)] {
        let mut scheduler = Scheduler::new(limits(pages, 32, 4));
        let mut step = FakeStep::new(pages, 3);
        let long = Sampling { ignore_end: true, ..sampling(3, 25) };
        let listeners = [Listener::default(), Listener::default()];
        for (listener, first) in listeners.iter().zip([5, 6]) {
            scheduler.add(request(&[first, 6, 7], long.clone(), -1, listener));
        }
        steps(&mut scheduler, &mut step, 1);
        assert_eq!(scheduler.running(), together);
        let mut most = 0;
        while !scheduler.idle() {
            steps(&mut scheduler, &mut step, 1);
            most = most.max(scheduler.pool().used());
        }
        // The second begins as soon as the two peaks don't meet any more, and all that was counted on is used.
        assert_eq!((most, scheduler.counters().preempted), (pages, 0));
    }
}

#[test]
fn a_flood_of_one_client_does_not_stall_another_nor_an_adapter_another() {
    let mut scheduler = Scheduler::new(limits(40, 8, 2));
    let mut step = FakeStep::new(40, 3);
    let add = |scheduler: &mut Scheduler, client: u64, adapter: i32, number: u32| {
        let listener = Listener::default();
        let plain = request(&[1 + number % 30, 1 + number / 30 % 30, 5], sampling(1, 4), adapter, &listener);
        scheduler.add(Request { client, ..plain });
        listener
    };
    for number in 0..200 {
        add(&mut scheduler, 1, 0, number);
    }
    steps(&mut scheduler, &mut step, 20);
    let (client, adapter) = (add(&mut scheduler, 2, 0, 300), add(&mut scheduler, 1, 1, 301));
    // Two run at a time, of 4 steps each: both begin as soon as there is a place.
    steps(&mut scheduler, &mut step, 15);
    assert!(client.ending() != "not" && adapter.ending() != "not");
    assert!(scheduler.waiting() > 100);
    finish(&mut scheduler, &mut step);
}

#[test]
fn priorities_go_first_and_never_starve_others() {
    let mut scheduler = Scheduler::new(limits(40, 8, 1));
    let mut step = FakeStep::new(40, 3);
    let add = |scheduler: &mut Scheduler, priority: i8, number: u32| {
        let listener = Listener::default();
        scheduler.add(Request { priority, ..request(&[1 + number % 30, 5], sampling(1, 3), 0, &listener) });
        listener
    };
    let low = add(&mut scheduler, -2, 0);
    let mut high: Vec<Listener> = (1..4).map(|number| add(&mut scheduler, 2, number)).collect();
    while high.iter().any(|listener| listener.ending() == "not") {
        assert_eq!(low.ending(), "not");
        steps(&mut scheduler, &mut step, 1);
    }
    // However many come, it has its turn: 16 of theirs count as much as one of its own.
    let mut count = 0;
    while low.ending() == "not" {
        if scheduler.waiting() < 3 {
            high.push(add(&mut scheduler, 2, high.len() as u32));
        }
        steps(&mut scheduler, &mut step, 1);
        count += 1;
        assert!(count < 200);
    }
    finish(&mut scheduler, &mut step);
}

#[test]
fn who_cannot_be_in_time_fails_before_it_costs_anything() {
    let (mut scheduler, mut step) = (Scheduler::new(limits(40, 8, 1)), FakeStep::new(40, 3));
    let start = Instant::now();
    let at = |milliseconds: u64| start + Duration::from_millis(milliseconds);
    scheduler.took(10, Duration::from_millis(100)); // 10 ms a token
    let add = |scheduler: &mut Scheduler, due: Instant| {
        let listener = Listener::default();
        scheduler.add(Request { deadline: Some(due), ..request(&[6; 20], sampling(1, 3), 0, &listener) });
        listener
    };
    // 20 tokens need 200 ms.
    let (late, early) = (add(&mut scheduler, at(199)), add(&mut scheduler, at(201)));
    scheduler.drop_late(at(0));
    assert!(late.ending().starts_with("failed: the first token is due"), "{}", late.ending());
    steps(&mut scheduler, &mut step, 1);
    // 12 left: in time at 81 ms, and not at 82.
    scheduler.drop_late(at(81));
    assert_eq!(early.ending(), "not");
    let counters = scheduler.counters();
    assert_eq!((counters.late, counters.failed, scheduler.running()), (1, 1, 1));
    scheduler.drop_late(at(82));
    assert!(early.ending().starts_with("failed"));
    // Once the first token is there, nothing is due any more.
    let quick = add(&mut scheduler, at(1000));
    steps(&mut scheduler, &mut step, 3);
    scheduler.drop_late(at(5000));
    finish(&mut scheduler, &mut step);
    assert!(!quick.tokens().is_empty());
    assert_eq!(scheduler.pool().used(), 0);
}

#[test]
fn under_twice_the_load_that_it_bears_half_are_in_time() {
    // A request of 8 tokens comes every 40 ms, and a step of 8 takes 80; the first token is due after 400 ms.
    let in_time = |abort: bool| {
        let (mut scheduler, mut step) = (Scheduler::new(limits(40, 8, 4)), FakeStep::new(40, 3));
        let start = Instant::now();
        let (mut listeners, mut logits) = (Vec::new(), Vec::new());
        let mut good = 0;
        for round in 0..100u32 {
            for number in [2 * round, 2 * round + 1] {
                let (listener, came) = (Listener::default(), start + Duration::from_millis(40) * number);
                let due = came + Duration::from_millis(400);
                let prompt = [1 + number % 30, 1 + number / 30, 1, 1, 1, 1, 1, 1];
                let plain = request(&prompt, sampling(1, 1), 0, &listener);
                scheduler.add(Request { deadline: abort.then_some(due), ..plain });
                listeners.push((listener, due, false));
            }
            let now = start + Duration::from_millis(80) * (round + 1);
            scheduler.drop_late(now);
            let batch = scheduler.plan().unwrap();
            logits.clear();
            step.run(&batch, &mut logits).unwrap();
            scheduler.apply(&logits);
            scheduler.took(batch.tokens.len(), Duration::from_millis(80));
            let after = now + Duration::from_millis(80);
            for (listener, due, seen) in &mut listeners {
                if !*seen && !listener.tokens().is_empty() {
                    *seen = true;
                    good += usize::from(after <= *due);
                }
            }
        }
        good
    };
    let (with, without) = (in_time(true), in_time(false));
    assert!(with >= 95 && 5 * without < with, "{with} in time, and {without} without deadlines");
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
fn a_long_text_to_embed_does_not_stall_a_running_answer() {
    let (mut scheduler, mut step) = (Scheduler::new(limits(40, 6, 4)), FakeStep::new(40, 3));
    let (short, long) = (Listener::default(), Listener::default());
    scheduler.add(request(&[5], Sampling { ignore_end: true, ..sampling(3, 12) }, -1, &short));
    scheduler.add(embedding(&[6; 50], -1, &long));
    let mut logits = Vec::new();
    for number in 1..=17 {
        let batch = scheduler.plan().unwrap();
        assert!(batch.tokens.len() <= 6, "{} tokens", batch.tokens.len());
        assert_eq!(batch.embeds, number % 2 == 0, "they take turns");
        logits.clear();
        step.run(&batch, &mut logits).unwrap();
        scheduler.apply(&logits);
        assert_eq!(short.tokens().len(), (number as usize).div_ceil(2));
    }
    finish(&mut scheduler, &mut step);
    assert_eq!(long.mean(), embedded(&[6; 50], -1));
}

#[test]
fn a_text_to_embed_gives_its_pages_back_when_its_caller_leaves_or_a_chunk_fails() {
    for leaves in [true, false] {
        let (mut scheduler, mut step) = (Scheduler::new(limits(40, 6, 4)), FakeStep::new(40, 3));
        scheduler.residency().know(PAGED);
        let (answer, gone, other) = (Listener::default(), Listener::default(), Listener::default());
        scheduler.add(embedding(&[6; 50], PAGED, &gone));
        steps(&mut scheduler, &mut step, 3);
        assert_eq!(scheduler.pool().used(), 18, "those of the text, and the adapter's");
        scheduler.add(request(&[5], sampling(3, 12), -1, &answer));
        if leaves {
            gone.close();
            scheduler.drop_cancelled();
        } else {
            steps(&mut scheduler, &mut step, 1); // the answer's turn
            step.fail_next();
        }
        scheduler.add(embedding(&[6; 50], PAGED, &other));
        finish(&mut scheduler, &mut step);
        assert_eq!(answer.text(), alone(&[5], &sampling(3, 12), -1).text());
        assert_eq!((gone.mean(), other.mean()), (vec![], embedded(&[6; 50], PAGED)));
        assert_eq!(gone.ending(), if leaves { "not" } else { "failed: told to" });
        let counters = scheduler.counters();
        assert_eq!((counters.cancelled, counters.failed), (u64::from(leaves), u64::from(!leaves)));
        assert_eq!(scheduler.pool().used(), 0);
    }
}

#[test]
fn a_text_that_had_to_give_way_is_embedded_from_its_beginning() {
    // The text takes 140 turns and 94 pages. Of the answer 128 tokens are expected, which is why both begin; in as many
    // turns it needs more than the 44 pages that are left.
    let mut scheduler = Scheduler::new(Limits { context_tokens: 300, ..limits(138, 2, 2) });
    let mut step = FakeStep::new(138, 3);
    let open = Sampling { ignore_end: true, max_tokens: None, ..sampling(3, 1) };
    let (answer, text) = (Listener::default(), Listener::default());
    scheduler.add(request(&[5], open, -1, &answer));
    scheduler.add(embedding(&[6; 280], -1, &text));
    steps(&mut scheduler, &mut step, 100);
    assert_eq!(scheduler.running(), 2);
    finish(&mut scheduler, &mut step);
    assert!(scheduler.counters().preempted > 0);
    assert_eq!(text.mean(), embedded(&[6; 280], -1));
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
        let Some(batch) = plan(scheduler, step) else { continue };
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

fn paged(pages: usize, adapters: i32) -> (Scheduler, FakeStep) {
    let mut scheduler = Scheduler::new(limits(pages, 16, 4));
    (PAGED..PAGED + adapters).for_each(|adapter| scheduler.residency().know(adapter));
    (scheduler, FakeStep::new(pages, 3))
}

#[test]
fn a_cold_adapter_stalls_nobody_and_comes_when_it_is_there() {
    let (mut scheduler, mut step) = paged(40, 3);
    let hot = ask(&mut scheduler, &[5; 7], -1);
    let cold = ask(&mut scheduler, &[6; 7], PAGED + 2);
    let after = ask(&mut scheduler, &[7; 7], -1);
    let mut logits = Vec::new();
    let mut run = |scheduler: &mut Scheduler, step: &mut FakeStep| {
        let batch = scheduler.plan();
        move_adapters(scheduler, step);
        if let Some(batch) = batch {
            logits.clear();
            step.run(&batch, &mut logits).unwrap();
            scheduler.apply(&logits);
        }
    };
    // The disk takes its time.
    run(&mut scheduler, &mut step);
    assert_eq!(scheduler.residency().fetches(), [PAGED + 2]);
    (0..20).for_each(|_| run(&mut scheduler, &mut step));
    assert!(hot.ending() != "not" && after.ending() != "not" && cold.ending() == "not");
    assert!(scheduler.residency().fetches().is_empty(), "it is on its way");
    scheduler.fetched(PAGED + 2, FakeShelf.fetch(PAGED + 2));
    run(&mut scheduler, &mut step);
    // Its 3 pages, and 3 of keys and values.
    assert_eq!(scheduler.pool().used(), 6);
    finish(&mut scheduler, &mut step);
    assert_eq!(cold.text(), alone(&[6; 7], &sampling(1, 9), PAGED + 2).text());
    assert_eq!((scheduler.pool().used(), scheduler.pool().parked(), scheduler.resident().0), (0, 3, 1));
    // The next one finds it there, and what was computed under it.
    let again = ask(&mut scheduler, &[6; 7], PAGED + 2);
    steps(&mut scheduler, &mut step, 1);
    assert_eq!(scheduler.running(), 1);
    finish(&mut scheduler, &mut step);
    assert_eq!((again.text(), again.cached()), (cold.text(), 6));
}

#[test]
fn the_adapter_that_was_used_longest_ago_makes_way() {
    // Of 1, 2, 3 and 4 pages, in a pool for some of them and a request of 4 pages.
    let (mut scheduler, mut step) = (Scheduler::new(limits(13, 16, 1)), FakeStep::new(13, 3));
    (PAGED..PAGED + 4).for_each(|adapter| scheduler.residency().know(adapter));
    for (adapter, resident) in [(0, 1), (1, 2), (2, 3), (0, 3), (3, 3), (1, 3)] {
        let listener = ask(&mut scheduler, &[5; 3], PAGED + adapter);
        finish(&mut scheduler, &mut step);
        assert_eq!(listener.text(), alone(&[5; 3], &sampling(1, 9), PAGED + adapter).text());
        assert_eq!(scheduler.pool().used(), 0);
        assert!(scheduler.resident().0 <= resident);
    }
}

#[test]
fn an_adapter_that_cannot_be_read_fails_those_who_wait_for_it() {
    let (mut scheduler, mut step) = paged(40, 100);
    let listeners = [PAGED + 99, -1, PAGED + 99].map(|adapter| ask(&mut scheduler, &[5; 7], adapter));
    finish(&mut scheduler, &mut step);
    assert_eq!(listeners[0].ending(), "failed: adapter: expected one, got rubbish");
    assert_eq!(listeners[2].ending(), listeners[0].ending());
    assert_eq!(listeners[1].text(), alone(&[5; 7], &sampling(1, 9), -1).text());
    // One that leaves no room is refused without waiting for others to leave, and so is one that is gone.
    let busy = ask(&mut scheduler, &[4; 7], -1);
    let large = ask(&mut scheduler, &[5; 7], PAGED + 38);
    finish(&mut scheduler, &mut step);
    assert!(large.ending().starts_with("failed: adapter: expected one that leaves room"), "{}", large.ending());
    assert_eq!(busy.text(), alone(&[4; 7], &sampling(1, 9), -1).text());
    scheduler.residency().forget(PAGED);
    assert!(scheduler.plan().is_none());
    assert_eq!(scheduler.moves().forgotten, [PAGED]);
    assert!(ask(&mut scheduler, &[5; 7], PAGED).ending().starts_with("failed: model: expected one that is there"));
    assert_eq!(scheduler.pool().used(), 0);
}

#[test]
fn an_adapter_that_is_forgotten_stays_until_its_sequences_end() {
    let (mut scheduler, mut step) = paged(40, 3);
    let running = ask(&mut scheduler, &[5; 7], PAGED);
    steps(&mut scheduler, &mut step, 3);
    scheduler.residency().forget(PAGED);
    assert!(scheduler.plan().is_some() && scheduler.moves().forgotten.is_empty());
    // The batch above was not computed: it is planned again.
    finish(&mut scheduler, &mut step);
    assert_eq!(running.text(), alone(&[5; 7], &sampling(1, 9), PAGED).text());
    assert!(scheduler.plan().is_none());
    let moves = scheduler.moves();
    assert_eq!((moves.forgotten, moves.evicted), (vec![PAGED], vec![PAGED]));
    assert_eq!((scheduler.pool().used(), scheduler.pool().parked()), (0, 0));
}

#[test]
fn what_was_fetched_for_someone_who_left_does_not_block_the_way() {
    let (mut scheduler, mut step) = paged(40, 12);
    let gone: Vec<Listener> = (0..4).map(|adapter| ask(&mut scheduler, &[5; 7], PAGED + adapter)).collect();
    assert!(scheduler.plan().is_none());
    assert_eq!(scheduler.residency().fetches().len(), 4);
    gone.iter().for_each(Listener::close);
    scheduler.drop_cancelled();
    (0..4).for_each(|adapter| scheduler.fetched(PAGED + adapter, FakeShelf.fetch(PAGED + adapter)));
    let listener = ask(&mut scheduler, &[5; 7], PAGED + 5);
    finish(&mut scheduler, &mut step);
    assert_eq!(listener.text(), alone(&[5; 7], &sampling(1, 9), PAGED + 5).text());
}

#[test]
fn drafts_bring_several_tokens_a_step_and_change_none() {
    for temperature in [0.0, 1.0] {
        let how = Sampling { temperature, ignore_end: true, ..sampling(7, 50) };
        let mut counts = Vec::new();
        for draft_tokens in [0, 5] {
            let mut scheduler = Scheduler::new(Limits { draft_tokens, ..limits(40, 16, 2) });
            let mut step = FakeStep::with_habit(40, 3, 9.0);
            let listeners = [Listener::default(), Listener::default()];
            for (listener, adapter) in listeners.iter().zip([-1, 2]) {
                scheduler.add(request(&[3, 1, 4, 1, 5], how.clone(), adapter, listener));
            }
            let mut rounds = 0;
            while !scheduler.idle() {
                steps(&mut scheduler, &mut step, 1);
                rounds += 1;
            }
            for (listener, adapter) in listeners.iter().zip([-1, 2]) {
                let expected = alone_with(9.0, &[3, 1, 4, 1, 5], &how, adapter);
                assert_eq!((listener.tokens(), listener.ending()), (expected.tokens(), expected.ending()));
                assert_eq!(listener.tokens().len(), 50);
            }
            let counters = scheduler.counters();
            counts.push(rounds);
            assert_eq!((counters.generated_tokens, counters.started), (100, 2));
            assert!(counters.accepted_tokens <= counters.drafted_tokens);
            assert_eq!(scheduler.pool().used(), 0);
        }
        assert_eq!(counts[0], 50);
        assert!(counts[1] < 25, "{counts:?} at temperature {temperature}");
    }
}

#[test]
fn a_drafting_model_that_is_the_model_is_always_right() {
    for temperature in [0.0, 1.0] {
        let how = Sampling { temperature, ignore_end: true, ..sampling(7, 50) };
        let limits = Limits { draft_tokens: 4, draft_model: true, ..limits(60, 16, 2) };
        let mut scheduler = Scheduler::new(limits);
        let mut step = FakeStep::new(60, 3);
        step.draft = Some(Box::new(FakeStep::new(60, 3)));
        // the second finds the first one's pages, and what was drafted must be found in them, too
        for prompt in [&[3; 8][..], &[3; 8]] {
            let listener = Listener::default();
            scheduler.add(request(prompt, how.clone(), -1, &listener));
            let before = scheduler.counters();
            finish(&mut scheduler, &mut step);
            let after = scheduler.counters();
            assert_eq!(listener.tokens(), alone(prompt, &how, -1).tokens());
            let drafted = after.drafted_tokens - before.drafted_tokens;
            assert_eq!(after.accepted_tokens - before.accepted_tokens, drafted);
            assert!(drafted >= 36, "{drafted} of 50");
        }
        // another model's drafts are wrong for an adapter, and change nothing
        let listener = Listener::default();
        scheduler.add(request(&[3; 8], how.clone(), 2, &listener));
        finish(&mut scheduler, &mut step);
        assert_eq!(listener.tokens(), alone(&[3; 8], &how, 2).tokens());
        assert_eq!(scheduler.pool().used(), 0);
    }
}
