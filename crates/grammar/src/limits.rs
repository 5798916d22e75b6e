//! What bounds the work one request's form can cause. Grammars are compiled and followed with fuel, not with clocks:
//! the same request is refused, or not, on every machine.

/// Bytes of one schema, grammar, pattern or list of choices: published API schemas have less.
pub const FORM_BYTES_MAX: usize = 256 << 10;
/// Bytes of a composed grammar: one form and the schemas of all tools.
pub const GRAMMAR_BYTES_MAX: usize = 1 << 20;
/// Bytes of a Lark grammar or a regular expression: both are compiled to automata that can be far larger.
pub const PATTERN_BYTES_MAX: usize = 64 << 10;
/// Nesting of brackets in a Lark grammar, and of objects and lists in a schema: each level is a frame of the compiler's
/// stack.
pub const DEPTH_MAX: usize = 64;
/// Choices of one request: each is a branch of the grammar.
pub const CHOICES_MAX: usize = 4096;
/// Tools of which a call is required: each is a branch of the grammar.
pub const TOOLS_MAX: usize = 128;
/// Kinds of tags of one structural tag: each is a branch of the grammar.
pub const TAGS_MAX: usize = 128;
/// Characters between two parts of a JSON document: enough for a line break and deep indentation. A model that writes
/// blanks without end would otherwise never come to its end.
pub const BLANKS_MAX: usize = 40;

/// Fuel for building the automaton of a grammar's terminals; about 50,000 are used in a millisecond.
pub(crate) const COMPILE_FUEL: u64 = 1_000_000;
/// Fuel for one mask; about 14,000 are used in a millisecond.
pub(crate) const MASK_FUEL: u64 = 200_000;
/// States of the parser for one mask; about 20,000 are made in a millisecond.
pub(crate) const MASK_ITEMS_MAX: usize = 50_000;
/// States of the parser after one byte: what an ambiguous grammar can hold open.
pub(crate) const ROW_ITEMS_MAX: usize = 2_000;
/// States of the automaton a grammar may come to while it is followed; each takes 1 to 2 KB.
pub(crate) const LEXER_STATES_MAX: usize = 50_000;
/// Symbols of a grammar.
pub(crate) const GRAMMAR_SYMBOLS_MAX: usize = 500_000;
/// Stack of the thread that compiles: the compiler goes down one frame for each level of a grammar.
pub(crate) const STACK_BYTES: usize = 64 << 20;
/// Compilations that look for the part of a schema which is to blame.
pub(crate) const BLAME_STEPS_MAX: usize = 200;
