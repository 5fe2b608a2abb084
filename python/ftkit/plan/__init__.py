"""What a run will need, before a byte is loaded."""
