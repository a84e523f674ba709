//! Session tokens: made here, recognized here, kept nowhere.
//!
//! ```text
//!   expires (8 bytes)   serial (8)   HMAC-SHA256 of both, first 16 bytes      in hexadecimal
//! ```
//!
//! The key is random and lives as long as the service, so a token means nothing to another
//! machine, nor to this one restored elsewhere. Because nothing is stored, a guest that asks
//! for a token with every request costs no memory, and none of its older tokens is forgotten
//! before its time.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Shortest and longest life of a token, in seconds.
pub(super) const TTL: std::ops::RangeInclusive<u32> = 1..=21_600;

const CLAIM: usize = 16;
const TAG: usize = 16;
/// Characters of a token.
const LENGTH: usize = 2 * (CLAIM + TAG);

/// Makes and checks tokens.
pub(super) struct Mint {
    keyed: Hmac<Sha256>,
    serial: AtomicU64,
}

impl Mint {
    /// A mint with a new random key.
    pub(super) fn new() -> io::Result<Mint> {
        let mut key = [0u8; 32];
        random(&mut key)?;
        let keyed = Hmac::new_from_slice(&key).map_err(io::Error::other)?;
        Ok(Mint { keyed, serial: AtomicU64::new(0) })
    }

    /// A token that is good for `ttl` seconds from `now`, which counts from any fixed moment.
    pub(super) fn issue(&self, ttl: u32, now: Duration) -> String {
        let expires = now.saturating_add(Duration::from_secs(ttl.into()));
        let expires = u64::try_from(expires.as_millis()).unwrap_or(u64::MAX);
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let mut token = [0u8; CLAIM + TAG];
        let (claim, tag) = token.split_at_mut(CLAIM);
        claim[..8].copy_from_slice(&expires.to_be_bytes());
        claim[8..].copy_from_slice(&serial.to_be_bytes());
        tag.copy_from_slice(&self.keyed.clone().chain_update(&*claim).finalize().into_bytes()[..TAG]);
        token.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
    }

    /// Whether `token` was made here and has not expired at `now`.
    pub(super) fn is_valid(&self, token: &str, now: Duration) -> bool {
        let Some(bytes) = decode(token.as_bytes()) else { return false };
        let (claim, tag) = bytes.split_at(CLAIM);
        if self.keyed.clone().chain_update(claim).verify_truncated_left(tag).is_err() {
            return false;
        }
        let expires = claim.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        u128::from(expires) > now.as_millis()
    }
}

/// Fills `bytes` from the host's generator.
pub(super) fn random(bytes: &mut [u8]) -> io::Result<()> {
    // SAFETY: the pointer and length are those of a live slice.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(got) == Ok(bytes.len()) { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn digit(value: u8) -> char {
    char::from_digit(u32::from(value), 16).unwrap_or('0')
}

fn decode(text: &[u8]) -> Option<[u8; CLAIM + TAG]> {
    if text.len() != LENGTH {
        return None;
    }
    let value = |character: u8| match character {
        b'0'..=b'9' => Some(character - b'0'),
        // One spelling only: what is not written like this was not made here.
        b'a'..=b'f' => Some(character - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; CLAIM + TAG];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = value(*pair.first()?)? << 4 | value(*pair.get(1)?)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_millis(123_456);

    #[test]
    fn a_token_is_good_until_it_expires() {
        let mint = Mint::new().unwrap();
        let token = mint.issue(10, NOW);
        assert_eq!(token.len(), LENGTH);
        assert!(mint.is_valid(&token, NOW));
        assert!(mint.is_valid(&token, NOW + Duration::from_millis(9_999)));
        assert!(!mint.is_valid(&token, NOW + Duration::from_secs(10)));
        assert!(mint.is_valid(&mint.issue(*TTL.end(), NOW), NOW + Duration::from_secs(21_599)));
    }

    #[test]
    fn two_tokens_of_one_moment_differ() {
        let mint = Mint::new().unwrap();
        assert_ne!(mint.issue(10, NOW), mint.issue(10, NOW));
    }

    #[test]
    fn a_token_of_another_service_is_worth_nothing() {
        let (mine, other) = (Mint::new().unwrap(), Mint::new().unwrap());
        assert!(!mine.is_valid(&other.issue(100, NOW), NOW));
    }

    #[test]
    fn a_token_with_any_character_changed_is_refused() {
        let mint = Mint::new().unwrap();
        let token = mint.issue(100, NOW);
        for at in 0..token.len() {
            let mut forged = token.clone().into_bytes();
            forged[at] = if forged[at] == b'7' { b'8' } else { b'7' };
            assert!(!mint.is_valid(std::str::from_utf8(&forged).unwrap(), NOW), "character {at}");
        }
        for wrong in ["", "x", &token[1..], &format!("{token}0"), &token.to_uppercase(), &"é".repeat(32)] {
            assert!(!mint.is_valid(wrong, NOW) || wrong == token, "{wrong:?}");
        }
    }
}
