//! A request's way into the router: a place at once, or when it is its turn.

use std::sync::Arc;

use proto::{Failure, Prompt, Violation};
use types::limits::MAX_TOKENS_DEFAULT;

use crate::call::Call;
use crate::fair::Waiter;
use crate::metrics::Counted;
use crate::pipeline::{Checked, Permit, Shared};
use crate::room::Turned;

/// Bytes of text that make about one token, to guess what a prompt costs before it is tokenized.
const BYTES_A_TOKEN: usize = 4;

impl Shared {
    /// A permit to work on one request of little cost, which does not wait for it.
    ///
    /// # Errors
    /// [`Failure::Overloaded`] when all are taken.
    pub(crate) fn permit(&self) -> Result<Permit, Failure> {
        self.tuning.room().try_enter(1).map(Arc::new).ok_or_else(|| self.turn_away(Turned::NoRoom))
    }

    /// A place for each answer that the requests of one call ask for: at once, or when it is their turn.
    ///
    /// # Errors
    /// [`Failure::Overloaded`] when too many wait already, or it has waited too long; what ends a call.
    pub(crate) async fn enter(
        &self,
        call: &Call,
        requests: &[Checked],
        counted: &mut Counted,
    ) -> Result<Permit, Failure> {
        let places = requests.iter().map(|request| request.spec.n.unwrap_or(1));
        let places = places.fold(0, u32::saturating_add);
        let max = self.tuning.get().limits.requests_max;
        if places > max {
            let (field, asked) = match requests {
                [_] => ("sampling.n", places.to_string()),
                several => ("prompt", format!("{} with {places} answers", several.len())),
            };
            let reason = format!("is {asked}, and this router takes at most {max} requests at once");
            return Err(Violation::new(field, reason).into());
        }
        if let Some(permit) = self.tuning.room().try_enter(places) {
            counted.passed("admit");
            return Ok(Arc::new(permit));
        }
        counted.waits();
        let waiter = Waiter {
            key: call.key(),
            priority: requests.first().map(|request| request.options.priority).unwrap_or_default(),
            places,
            tokens: requests.iter().map(Checked::tokens_max).sum(),
            bytes: requests.iter().map(|request| request.prompt.bytes()).sum(),
        };
        let waited = call.within(async { Ok(self.tuning.room().enter(waiter).await) }).await;
        counted.passed("wait");
        waited?.map(Arc::new).map_err(|turned| self.turn_away(turned))
    }

    fn turn_away(&self, turned: Turned) -> Failure {
        self.metrics.turned_away(turned);
        turned.refusal(&self.tuning.get().limits, self.tuning.room().retry_after())
    }
}

impl Checked {
    /// Tokens it may cost: its prompt, guessed where it is text, and all that may be generated.
    fn tokens_max(&self) -> u64 {
        let prompt = match &self.prompt {
            Prompt::TokenIds(ids) => ids.len(),
            Prompt::Text(_) | Prompt::Chat(_) => self.prompt.bytes() / BYTES_A_TOKEN,
        };
        let context = u64::from(self.facts.context_tokens_max);
        let answer = self.spec.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT);
        let answers = u64::from(self.spec.n.unwrap_or(1)) * u64::from(answer).min(context);
        (prompt as u64).min(context).saturating_add(answers)
    }
}
