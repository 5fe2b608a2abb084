"""What models are built of: linear, attention, norm, embedding, loss, and the ragged batch they all take."""
