//! Drafts of the step that is planned: tokens that probably come next, looked up in what was said or by a smaller model.

use super::super::sequence::Sequence;
use super::{Batch, Scheduler};

/// Rows of a step up to which more rows cost little, since reading the weights takes most of the time.
const DRAFT_ROWS: usize = 16;

impl Scheduler {
    /// Adds drafts to sequences that generate, or asks for them, as long as the step stays small.
    pub(super) fn draft(&mut self, budget: usize) {
        let rows: usize = self.planned.iter().map(|planned| planned.1).sum();
        let mut room = budget.min(DRAFT_ROWS.saturating_sub(rows));
        for (index, count, wanted) in &mut self.planned {
            let sequence = &mut self.running[*index];
            if room > 0 && (*count, *wanted) == (1, 1) && sequence.left() == 1 && self.limits.draft_tokens > 0 {
                let most = room.min(self.limits.draft_tokens);
                if self.limits.draft_model {
                    sequence.ask(most, &mut self.pool);
                    room -= sequence.wishes();
                } else {
                    sequence.propose(most, &mut self.pool);
                    let more = sequence.draft.len();
                    (*count, *wanted, room) = (1 + more, 1 + more, room - more);
                }
            }
        }
    }

    /// What the drafting model is to compute next for the step that is planned: the last token of each sequence that
    /// wishes for a draft, or of its draft; none when all is drafted. Its pages have the same numbers as the model's.
    pub fn drafting(&self) -> Option<Batch> {
        let mut batch = Batch { cu_seqlens: vec![0], ..Batch::default() };
        let asking = || self.planned.iter().map(|planned| &self.running[planned.0]).filter(|one| one.wishes() > 0);
        let length = |sequence: &Sequence| sequence.tokens.len() + sequence.draft.len();
        batch.blocks = asking().map(|sequence| self.pool.pages_for(length(sequence))).max()?;
        for sequence in asking() {
            let last = sequence.draft.last().or_else(|| sequence.tokens.last())?;
            batch.rows.push(batch.tokens.len() as i32);
            batch.tokens.push(*last as i32);
            batch.positions.push(length(sequence) as i32 - 1);
            batch.cu_seqlens.push(batch.tokens.len() as i32);
            batch.adapter.push(-1);
            let pages = &sequence.table.pages()[..self.pool.pages_for(length(sequence))];
            let row = batch.block_table.len();
            batch.block_table.extend(pages.iter().map(|&page| page as i32));
            batch.block_table.resize(row + batch.blocks, 0);
        }
        Some(batch)
    }

    /// Takes the drafting model's logits: a row for each sequence that [`Scheduler::drafting`] named.
    pub fn drafted(&mut self, logits: &[f32]) {
        let mut rows = logits.chunks_exact(self.limits.vocabulary);
        for (index, count, wanted) in &mut self.planned {
            let sequence = &mut self.running[*index];
            if sequence.wishes() > 0 {
                let Some(row) = rows.next() else { return sequence.undraft() };
                sequence.guessed(row, &self.limits.end_ids);
                (*count, *wanted) = (1 + sequence.draft.len(), 1 + sequence.draft.len());
            }
        }
    }
}
