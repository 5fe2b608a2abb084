"""One step over a ragged batch, and what generates text with it."""
