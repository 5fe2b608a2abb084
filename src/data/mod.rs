//! From files of rows to packed, memory-mapped training batches.
