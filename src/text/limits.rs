//! How much a template or a tokenizer file from a stranger may ask for.

/// The longest template text, in bytes; the longest in the wild has about 20 KiB.
pub(super) const TEMPLATE_BYTES: usize = 1 << 20;
/// minijinja's fuel for one rendering: about one an instruction and one for 64 bytes of data. Ends an endless loop in
/// about a second, and is enough for a conversation of some MiB.
pub(super) const TEMPLATE_FUEL: u64 = 10_000_000;
/// The longest text that a template may write, in bytes.
pub(super) const OUTPUT_BYTES: usize = 64 << 20;
/// How deep a template's statements, macros and calls may nest; minijinja's own default is made for bigger stacks than
/// those of a server's threads.
pub(super) const TEMPLATE_DEPTH: usize = 200;
