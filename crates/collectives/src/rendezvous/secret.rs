//! What keeps those out of a group who reach its ports and do not know its secret.

use std::fmt;

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::wire::Token;

/// A secret all ranks of a group share. Rank 0's token is a challenge then: connections of the mesh must answer it with
/// what only who knows the secret can make of it. Shown by no formatter.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GroupSecret([u8; 32]);

impl fmt::Debug for GroupSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupSecret(…)")
    }
}

impl GroupSecret {
    /// The secret of a text of any length.
    #[must_use]
    pub fn new(text: &[u8]) -> Self {
        Self(Sha256::digest(text).into())
    }

    fn sign(self, purpose: &[u8], bytes: &[u8]) -> [u8; 32] {
        let Ok(mac) = Hmac::<Sha256>::new_from_slice(&self.0) else {
            unreachable!("HMAC takes keys of any length");
        };
        mac.chain_update(purpose).chain_update(bytes).finalize().into_bytes().into()
    }
}

/// The hash that ranks compare: with other secrets it differs, and tells nothing of them.
pub(super) fn bound_hash(secret: Option<GroupSecret>, config_hash: [u8; 32]) -> [u8; 32] {
    secret.map_or(config_hash, |secret| secret.sign(b"config", &config_hash))
}

/// What opens a connection of the mesh, from rank 0's token.
pub(super) fn answer_to(secret: Option<GroupSecret>, token: Token) -> Token {
    let Some(secret) = secret else { return token };
    let mut answer = Token::default();
    let length = answer.len();
    answer.copy_from_slice(&secret.sign(b"mesh", &token)[..length]);
    answer
}

/// Whether two tokens are one, in the same time wherever they differ.
pub(super) fn same(ours: &Token, theirs: &Token) -> bool {
    ours.ct_eq(theirs).into()
}
