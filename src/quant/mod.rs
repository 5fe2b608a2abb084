//! Block formats of quantized weights: one file a format.
