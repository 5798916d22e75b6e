//! A leader that answers with random tokens of the grammar it is given, as a model would that knows nothing.

use std::sync::OnceLock;

use grammar::Compiler;
use proto::worker;
use types::TokenId;

use crate::support::{EOS, Leader, Random, VOCAB, chunk, demo_tokenizer, last};

const END_THINKING: TokenId = TokenId(14);
/// Answers longer than this are cut.
const TOKENS_MAX: usize = 1500;

pub(crate) fn compiler() -> &'static Compiler {
    static COMPILER: OnceLock<Compiler> = OnceLock::new();
    COMPILER.get_or_init(|| Compiler::new(demo_tokenizer().table(), &[TokenId(EOS)], VOCAB).unwrap())
}

/// Answers every request so, from now on.
pub(crate) async fn obedient(seed: u64) -> String {
    let mut leader = Leader::serving().await;
    let address = leader.address.clone();
    let mut random = Random::seeded(seed);
    tokio::spawn(async move {
        while let Some(open) = leader.opened.recv().await {
            let guide = open.request.guide.clone().unwrap_or_default();
            let script = answer(&guide, &mut random);
            open.play(script).await;
        }
    });
    address
}

/// A random answer of the guide's grammar that thinks no more than it must.
pub(crate) fn answer(guide: &worker::Guide, random: &mut Random) -> Vec<worker::GenerateChunk> {
    let mut matcher = compiler().compile(&guide.grammar).unwrap();
    let mut script = Vec::new();
    while script.len() < TOKENS_MAX {
        let mask = matcher.mask().unwrap();
        let allowed: Vec<TokenId> = (0..VOCAB).map(TokenId).filter(|&id| mask.allows(id)).collect();
        let ends = mask.allows(TokenId(EOS));
        if ends && (allowed.len() == 1 || random.below(3) == 0) {
            script.push(last(&[EOS], worker::FinishReason::Eos, Some(EOS)));
            return script;
        }
        let token = match mask.allows(END_THINKING) {
            true => END_THINKING,
            false => allowed[random.below(allowed.len())],
        };
        if token.0 != EOS {
            matcher.follow(token).unwrap();
            script.push(chunk(&[token.0]));
        }
    }
    script.push(last(&[], worker::FinishReason::Length, None));
    script
}
