//! Whose turn it is: virtual token counters.
//!
//! Every client, and every flow of it (an adapter at a priority), has a counter of what it was served: a token of a prompt
//! counts 1, a generated token 2; for a flow, this is divided by 2^priority. The client with the smallest counter is next, and of its flows
//! the one with the smallest. Who comes back after a pause starts at the smallest counter of those who are there, so that
//! nobody saves up. So a client that asks for much cannot hold up one that asks for little, an adapter cannot hold up
//! another, and a low priority makes one wait, but never forever. Priorities are among a client's own requests.
//!
//! Source: Sheng et al., Fairness in Serving Large Language Models, 2024, arXiv 2401.00588.

use std::collections::HashMap;
use std::hash::Hash;

/// Highest priority, and the lowest with a minus.
pub const MAX_PRIORITY: i8 = 8;

/// Who is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Who asks.
    pub client: u64,
    /// The adapter's id.
    pub adapter: i32,
    /// −8 to 8; each step doubles the share.
    pub priority: i8,
}

#[derive(Clone, Copy, Debug, Default)]
struct Served {
    tokens: u64,
    /// Requests that wait or run.
    active: usize,
}

/// What everybody was served.
#[derive(Debug, Default)]
pub struct Fairness {
    clients: HashMap<u64, Served>,
    flows: HashMap<Flow, Served>,
}

impl Fairness {
    /// A request of the flow has come.
    pub fn enter(&mut self, flow: Flow) {
        enter(&mut self.clients, flow.client, |_| true);
        enter(&mut self.flows, flow, |other| other.client == flow.client);
    }

    /// A request of the flow has ended.
    pub fn leave(&mut self, flow: Flow) {
        leave(&mut self.clients, flow.client, |_| true);
        leave(&mut self.flows, flow, |other| other.client == flow.client);
    }

    /// The flow was served tokens of prompts and generated ones.
    pub fn charge(&mut self, flow: Flow, prompt: usize, generated: usize) {
        let cost = prompt as u64 + 2 * generated as u64;
        if let Some(served) = self.clients.get_mut(&flow.client) {
            served.tokens += cost;
        }
        if let Some(served) = self.flows.get_mut(&flow) {
            served.tokens += weighted(flow, cost);
        }
    }

    /// Smaller is earlier. Of a client's flows, that which would have the smallest counter after a request with so many
    /// tokens of a prompt: so the first request of a low priority is not served like one of a high.
    pub fn order(&self, flow: Flow, prompt: usize) -> (u64, u64, i8) {
        let client = self.clients.get(&flow.client).map_or(0, |served| served.tokens);
        let served = self.flows.get(&flow).map_or(0, |served| served.tokens);
        (client, served + weighted(flow, prompt as u64 + 2), -flow.priority)
    }
}

/// What tokens count in a flow: more, the lower its priority.
fn weighted(flow: Flow, tokens: u64) -> u64 {
    tokens << (MAX_PRIORITY - flow.priority.clamp(-MAX_PRIORITY, MAX_PRIORITY)).unsigned_abs()
}

fn least<K: Copy + Eq + Hash>(all: &HashMap<K, Served>, among: impl Fn(&K) -> bool) -> Option<u64> {
    all.iter().filter(|(key, served)| served.active > 0 && among(key)).map(|(_, served)| served.tokens).min()
}

fn enter<K: Copy + Eq + Hash>(all: &mut HashMap<K, Served>, key: K, among: impl Fn(&K) -> bool) {
    if all.get(&key).is_none_or(|served| served.active == 0) {
        let least = least(all, among).unwrap_or(0);
        let served = all.entry(key).or_default();
        served.tokens = served.tokens.max(least);
    }
    all.entry(key).or_default().active += 1;
}

/// A counter is kept while it says more than that of a newcomer.
fn leave<K: Copy + Eq + Hash>(all: &mut HashMap<K, Served>, key: K, among: impl Fn(&K) -> bool) {
    let Some(served) = all.get_mut(&key) else { return };
    served.active = served.active.saturating_sub(1);
    if served.active > 0 {
        return;
    }
    match least(all, &among) {
        None => all.retain(|key, _| !among(key)),
        Some(least) => all.retain(|key, served| served.active > 0 || !among(key) || served.tokens > least),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(client: u64, adapter: i32, priority: i8) -> Flow {
        Flow { client, adapter, priority }
    }

    /// Serves `rounds` requests of 10 tokens each to flows that always have one more; how many each got.
    fn serve(fairness: &mut Fairness, flows: &[Flow], rounds: usize) -> Vec<usize> {
        let mut served = vec![0; flows.len()];
        for _ in 0..rounds {
            let next = (0..flows.len()).min_by_key(|&index| fairness.order(flows[index], 6)).unwrap();
            fairness.charge(flows[next], 6, 2);
            served[next] += 1;
        }
        served
    }

    #[test]
    fn clients_share_alike_and_so_do_their_adapters() {
        let mut fairness = Fairness::default();
        let flows = [flow(1, 0, 0), flow(1, 1, 0), flow(1, 2, 0), flow(2, 0, 0)];
        flows.iter().for_each(|&flow| fairness.enter(flow));
        assert_eq!(serve(&mut fairness, &flows, 60), [10, 10, 10, 30]);
    }

    #[test]
    fn a_priority_doubles_the_share_and_starves_nobody() {
        let mut fairness = Fairness::default();
        let flows = [flow(1, 0, 0), flow(1, 0, 1), flow(1, 0, -2)];
        flows.iter().for_each(|&flow| fairness.enter(flow));
        assert_eq!(serve(&mut fairness, &flows, 130), [40, 80, 10]);
    }

    #[test]
    fn who_was_away_saves_nothing_and_forgets_no_debt() {
        let mut fairness = Fairness::default();
        let (busy, new) = (flow(1, 0, 0), flow(2, 0, 0));
        fairness.enter(busy);
        serve(&mut fairness, &[busy], 1000);
        fairness.enter(new);
        assert_eq!(serve(&mut fairness, &[busy, new], 20), [10, 10]);
        // The new one runs ahead, leaves and comes back: it waits until the other has caught up.
        fairness.charge(new, 50, 0); // 5 requests' worth
        fairness.leave(new);
        fairness.enter(new);
        assert_eq!(serve(&mut fairness, &[busy, new], 5), [5, 0]);
        fairness.leave(new);
        fairness.leave(busy);
        assert!(fairness.clients.is_empty() && fairness.flows.is_empty());
    }
}
