//! How much a template or a tokenizer file from a stranger may ask for.

/// The longest template text, in bytes; the longest in the wild has about 20 KiB.
pub(super) const TEMPLATE_BYTES: usize = 256 << 10;
/// The most names and operators in one tag; the most in the wild are about 100.
pub(super) const TAG_TOKENS: usize = 1_000;
/// The most `elif` tags; the most in the wild are about 30.
pub(super) const BRANCHES: usize = 500;
/// minijinja's fuel for one rendering: about one an instruction and one for 64 bytes of data. Ends an endless loop in
/// well under a second, and is enough for a conversation of some MiB.
pub(super) const TEMPLATE_FUEL: u64 = 2_000_000;
/// The longest text that a template may write, in bytes.
pub(super) const OUTPUT_BYTES: usize = 64 << 20;
/// How deep a template's statements, macros and calls may nest; minijinja's own default is made for bigger stacks than
/// those of a server's threads.
pub(super) const TEMPLATE_DEPTH: usize = 200;

/// The stack for compiling and rendering, in bytes; only what is touched takes memory. A template can nest its own text
/// or a value as deep as its length or its fuel allow, and some of what walks them (their destructors too) recurses.
pub(super) const STACK_BYTES: usize = 1 << 30;
/// What a stack may have lost of it to those who called, and still be the one.
const CALLERS_BYTES: usize = 16 << 20;

/// Does `work` with a stack of [`STACK_BYTES`], a new one unless it's there: making one for a few conversations at a time
/// is much less work than for each rendering.
pub fn on_deep_stack<T>(work: impl FnOnce() -> T) -> T {
    stacker::maybe_grow(STACK_BYTES - CALLERS_BYTES, STACK_BYTES, work)
}
