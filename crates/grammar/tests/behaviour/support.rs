//! The demo's vocabulary, and answers drawn at random from a grammar.

use std::path::Path;
use std::sync::OnceLock;

use grammar::{Begin, Calls, Compiler, Form, Marks, Matcher, TokenTable};
use types::{Constraint, TokenId};

pub(crate) const EOS: [TokenId; 2] = [TokenId(9), TokenId(6)];
pub(crate) const VOCAB: u32 = 4096;

pub(crate) fn table() -> &'static TokenTable {
    static TABLE: OnceLock<TokenTable> = OnceLock::new();
    TABLE.get_or_init(|| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/assets/demo/tokenizer.json");
        TokenTable::read(&std::fs::read(path).unwrap()).unwrap()
    })
}

pub(crate) fn compiler() -> &'static Compiler {
    static COMPILER: OnceLock<Compiler> = OnceLock::new();
    COMPILER.get_or_init(|| Compiler::new(table(), &EOS, VOCAB).unwrap())
}

/// The demo's markers.
pub(crate) fn marks() -> Marks {
    let pair = |start, end| [TokenId(start), TokenId(end)];
    Marks { thinking: pair(13, 14), text: vec![pair(15, 16), pair(21, 22)], action: pair(17, 18) }
}

/// The grammar of an answer that is nothing but this.
pub(crate) fn plain(content: &Constraint) -> String {
    Form { begin: Begin::Plain, marks: None, content: Some(content), calls: None }.compose().unwrap()
}

/// The grammar of an answer of the demo's chat format.
pub(crate) fn chat(begin: Begin, content: Option<&Constraint>, calls: Option<&Calls>) -> String {
    Form { begin, marks: Some(&marks()), content, calls }.compose().unwrap()
}

pub(crate) fn matcher(grammar: &str) -> Matcher {
    compiler().compile(grammar).unwrap_or_else(|error| panic!("{error}: {grammar}"))
}

/// A small generator (SplitMix64); its seed is printed by whoever makes one.
pub(crate) struct Random(u64);

impl Random {
    #[allow(clippy::print_stdout, reason = "a failing test must say what it drew from")]
    pub(crate) fn seeded(seed: u64) -> Self {
        println!("seed {seed}");
        Self(seed)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((x ^ (x >> 31)) % bound as u64).unwrap()
    }
}

/// The tokens a mask allows.
pub(crate) fn allowed(matcher: &mut Matcher) -> Vec<TokenId> {
    let mask = matcher.mask().unwrap();
    (0..VOCAB).map(TokenId).filter(|&id| mask.allows(id)).collect()
}

/// The bytes of a token, markers included.
pub(crate) fn bytes(tokens: &[TokenId]) -> Vec<u8> {
    tokens.iter().flat_map(|&id| table().bytes(id)).copied().collect()
}

/// Follows random tokens until the end; `None` when that did not come within `most` tokens. The end is taken at the
/// first chance in one of three draws.
pub(crate) fn walk(matcher: &mut Matcher, random: &mut Random, most: usize) -> Option<String> {
    let mut tokens = Vec::new();
    while tokens.len() < most {
        let choices = allowed(matcher);
        assert!(!choices.is_empty(), "nothing may follow {:?}", String::from_utf8_lossy(&bytes(&tokens)));
        if choices.contains(&EOS[0]) && (choices.len() <= EOS.len() || random.below(3) == 0) {
            return Some(String::from_utf8(bytes(&tokens)).expect("answers are UTF-8"));
        }
        let choices: Vec<TokenId> = choices.into_iter().filter(|id| !EOS.contains(id)).collect();
        let token = choices[random.below(choices.len())];
        matcher.follow(token).unwrap();
        tokens.push(token);
    }
    None
}

/// Follows a text token by token, each the longest that fits; `false` when the grammar does not allow it.
pub(crate) fn follows(matcher: &mut Matcher, text: &str) -> bool {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let fits = allowed(matcher).into_iter().filter(|&id| {
            let bytes = table().bytes(id);
            !bytes.is_empty() && rest.starts_with(bytes)
        });
        let Some(token) = fits.max_by_key(|&id| table().bytes(id).len()) else { return false };
        matcher.follow(token).unwrap();
        rest = &rest[table().bytes(token).len()..];
    }
    allowed(matcher).contains(&EOS[0])
}
