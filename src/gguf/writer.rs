//! Writing a file, tensor by tensor, so that it is there whole or not at all.
/// Placeholder of the next commit.
#[derive(Debug)]
pub struct Writer;
