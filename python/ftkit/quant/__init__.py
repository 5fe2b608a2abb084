"""Weight schemes: one file a way to hold a linear layer's weight."""
