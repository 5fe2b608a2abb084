//! The memory planner: replay of recorded allocations.
