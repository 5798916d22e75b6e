//! Signatures, checked by the library that TLS uses too.

use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error, ErrorKind};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, EncodingKey};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
};
use signature::Verifier;

/// Of a point of P-256 as it is: a byte that says so, and both coordinates.
const P256_POINT_BYTES: usize = 65;
const ED25519_POINT_BYTES: usize = 32;
/// What the RSA algorithm takes, in bits of the modulus.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

static RING: CryptoProvider =
    CryptoProvider { signer_factory, verifier_factory, key_utils: KeyUtils::new_unimplemented() };

/// Makes `jsonwebtoken` check signatures with ring.
pub(super) fn install() {
    // Once a process; whoever comes later finds it there.
    let _ = RING.install_default();
}

/// Whether a key is one that the algorithm can be used with.
///
/// # Errors
/// Why not.
pub(super) fn check(algorithm: Algorithm, key: &DecodingKey) -> Result<(), &'static str> {
    match (algorithm, key.kind()) {
        (Algorithm::RS256, DecodingKeyKind::RsaModulusExponent { n, .. }) => {
            let zeros = n.iter().take_while(|&&byte| byte == 0).count();
            match RSA_BITS.contains(&((n.len() - zeros) * 8)) {
                true => Ok(()),
                false => Err("is an RSA key that does not have 2048 to 8192 bits"),
            }
        }
        (Algorithm::ES256, DecodingKeyKind::SecretOrDer(point)) if point.len() == P256_POINT_BYTES => Ok(()),
        (Algorithm::EdDSA, DecodingKeyKind::SecretOrDer(point)) if point.len() == ED25519_POINT_BYTES => {
            Ok(())
        }
        _ => Err("does not have the length of such a key"),
    }
}

/// Nothing is signed here.
fn signer_factory(_: &Algorithm, _: &EncodingKey) -> Result<Box<dyn JwtSigner>, Error> {
    Err(ErrorKind::UnsupportedAlgorithm.into())
}

fn verifier_factory(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>, Error> {
    match check(*algorithm, key) {
        Ok(()) => Ok(Box::new(Ring { algorithm: *algorithm, key: key.clone() })),
        Err(_) => Err(ErrorKind::InvalidAlgorithm.into()),
    }
}

struct Ring {
    algorithm: Algorithm,
    key: DecodingKey,
}

impl Verifier<Vec<u8>> for Ring {
    fn verify(&self, message: &[u8], signed: &Vec<u8>) -> Result<(), signature::Error> {
        let right = match (self.algorithm, self.key.kind()) {
            (Algorithm::RS256, DecodingKeyKind::RsaModulusExponent { n, e }) => {
                let (n, e) = (unpadded(n), unpadded(e));
                RsaPublicKeyComponents { n, e }.verify(&RSA_PKCS1_2048_8192_SHA256, message, signed)
            }
            (Algorithm::ES256, DecodingKeyKind::SecretOrDer(point)) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signed)
            }
            (Algorithm::EdDSA, DecodingKeyKind::SecretOrDer(point)) => {
                UnparsedPublicKey::new(&ED25519, point).verify(message, signed)
            }
            _ => return Err(signature::Error::new()),
        };
        right.map_err(|_| signature::Error::new())
    }
}

/// A number without the zeros that some writers put before it.
fn unpadded(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|&&byte| byte == 0).count();
    &number[zeros..]
}

impl JwtVerifier for Ring {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}
