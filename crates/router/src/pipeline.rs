//! A request's way down, top to bottom: wire → [`Checked`] → [`Admitted`] → [`Tokenized`] → [`Placed`] → [`Answer`].

use std::sync::Arc;

use proto::{Failure, GenerationFields, Prompt, Role, Violation, bad_words, stop_strings, v1, worker};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use types::limits::{CACHE_SALT_BYTES_MAX, MESSAGE_BYTES_MAX, SESSION_ID_BYTES_MAX};
use types::{Generation, GenerationSpec, Priority, TokenId};

use crate::answer::{Answer, Assembler, Reading};
use crate::call::{Call, random_u64};
use crate::forward::Placed;
use crate::gate::Gate;
use crate::metrics::{Counted, Metrics};
use crate::resume::Replay;
use crate::room::Places;
use crate::running::Running;
use crate::text::{Begun, Text, Vocabulary, Wanted};
use crate::trail::{Traced, Tracing};
use crate::tuned::Tuning;
use crate::workers::{Facts, Groups};

/// Places among the admitted requests, one for each answer, given back when the last holder is done: the answers, or
/// work for them on another thread, which goes on for a while after a caller has left.
pub(crate) type Permit = Arc<Places>;

/// What all requests share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) groups: Arc<Groups>,
    /// `None` for a checkpoint without tokenizer.
    pub(crate) text: Option<Text>,
    pub(crate) model_name: Option<String>,
    pub(crate) tuning: Arc<Tuning>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) running: Arc<Running>,
    /// The order to stop has come: health says so, requests are still taken for a while.
    pub(crate) withdrawn: CancellationToken,
    /// Ends what is still open when the drain grace is over.
    pub(crate) closing: CancellationToken,
    /// Which requests are traced.
    pub(crate) tracing: Tracing,
}

/// A request whose every field is right, but for the prompt's tokens.
pub(crate) struct Checked {
    pub(crate) facts: Arc<Facts>,
    pub(crate) prompt: Prompt,
    pub(crate) spec: GenerationSpec,
    /// Not in `spec` yet: they are text.
    bad_words: Vec<String>,
    pub(crate) options: Options,
    form: Form,
    wanted: Wanted,
}

/// A request that holds its permit.
struct Admitted {
    permit: Permit,
    checked: Checked,
}

/// A request whose prompt fits the model.
struct Tokenized {
    permit: Permit,
    /// What a leader is told of the answer's form.
    guide: Option<worker::Guide>,
    prompt: Vec<TokenId>,
    generation: Generation,
    eos_token_ids: Vec<u32>,
    options: Options,
    form: Form,
}

/// What a leader is told beside the prompt and how to go on from it.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) priority: Priority,
    /// Hashed to 16 bytes; empty for none.
    cache_salt: Vec<u8>,
    bypass_prefix_cache: bool,
}

/// The form answers are given in.
#[derive(Clone)]
struct Form {
    stop: Vec<String>,
    keep_special: bool,
    parse: Parse,
    /// Whether the conversation has something to cite.
    cites: bool,
}

/// Whether an answer is taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parse {
    No,
    /// What is written as a tool call is text: none were offered.
    WithoutTools,
    WithTools,
}

impl Shared {
    /// The whole way down.
    ///
    /// # Errors
    /// What the stages refuse; failures of a group come out of the [`Answer`].
    pub(crate) async fn generate(
        self: &Arc<Self>,
        call: Call,
        request: v1::GenerateRequest,
    ) -> Result<Answer, Failure> {
        let mut call = call.listed(&self.running);
        let mut counted = self.counted(&mut call, &request);
        let prepared = async {
            let checked = self.check(&call, request)?;
            let permit = self.enter(&call, std::slice::from_ref(&checked), &mut counted).await?;
            self.place_tokenized(&call, Admitted { permit, checked }, &mut counted).await
        };
        match prepared.await {
            Ok((tokenized, way)) => Ok(self.answer((call, counted), tokenized, way)),
            Err(failure) => {
                counted.ended(Some(&failure));
                Err(failure)
            }
        }
    }

    /// The whole way down for the prompts of one call, whose ids are the call's with a number. They enter together: one
    /// that waited while others of the same call hold places might wait for itself.
    ///
    /// # Errors
    /// As of [`Shared::generate`], for any of them.
    pub(crate) async fn generate_all(
        self: &Arc<Self>,
        call: &Call,
        mut requests: Vec<v1::GenerateRequest>,
    ) -> Result<Vec<Answer>, Failure> {
        if requests.len() <= 1 {
            let Some(request) = requests.pop() else { return Ok(Vec::new()) };
            return Ok(vec![self.generate(call.clone(), request).await?]);
        }
        let call = call.clone().listed(&self.running);
        let numbered = |(index, request): (usize, &v1::GenerateRequest)| {
            let mut call = call.clone();
            call.request_id = format!("{}-{index}", call.request_id);
            let counted = self.counted(&mut call, request);
            (call, counted)
        };
        let (calls, mut counted): (Vec<Call>, Vec<Counted>) =
            requests.iter().enumerate().map(numbered).unzip();
        let prepared = async {
            let checked = requests.into_iter().map(|request| self.check(&call, request));
            let checked = checked.collect::<Result<Vec<Checked>, Failure>>()?;
            let permit = self.enter(&call, &checked, &mut counted[0]).await?;
            let mut ready = Vec::with_capacity(checked.len());
            for ((call, checked), counted) in calls.into_iter().zip(checked).zip(&mut counted) {
                let admitted = Admitted { permit: Arc::clone(&permit), checked };
                let (tokenized, way) = self.place_tokenized(&call, admitted, counted).await?;
                ready.push((call, tokenized, way));
            }
            Ok(ready)
        };
        match prepared.await {
            Ok(ready) => {
                let answers = ready.into_iter().zip(counted);
                let answer = |((call, tokenized, way), counted)| self.answer((call, counted), tokenized, way);
                Ok(answers.map(answer).collect())
            }
            Err(failure) => {
                counted.iter_mut().for_each(|counted| counted.ended(Some(&failure)));
                Err(failure)
            }
        }
    }

    /// A request that is counted from now on, and traced if it is one of those that are.
    fn counted(&self, call: &mut Call, request: &v1::GenerateRequest) -> Counted {
        let served = || self.served().ok().map(|(name, _)| name);
        let traced = Traced::begin(call, request, self.tracing, served);
        Counted::new(Arc::clone(&self.metrics), traced)
    }

    async fn place_tokenized(
        self: &Arc<Self>,
        call: &Call,
        admitted: Admitted,
        counted: &mut Counted,
    ) -> Result<(Tokenized, (Placed, Replay)), Failure> {
        let tokenized = call.within(self.tokenize_admitted(admitted)).await?;
        counted.passed("tokenize");
        let way = self.place(call, &tokenized)?;
        counted.placed(way.0.address(), tokenized.prompt.len());
        call.spend_tokens(tokenized.prompt.len());
        counted.passed("place");
        Ok((tokenized, way))
    }

    /// The tokenizer and template.
    ///
    /// # Errors
    /// [`Failure::NoTokenizer`] naming what needed them.
    pub(crate) fn text(&self, needed_for: &str) -> Result<&Text, Failure> {
        self.text.as_ref().ok_or_else(|| Failure::NoTokenizer { needed_for: needed_for.to_owned() })
    }

    /// The name the model is served under and its facts.
    ///
    /// # Errors
    /// What [`crate::workers::Progress::refusal`] says while no group has reported them.
    pub(crate) fn served(&self) -> Result<(String, Arc<Facts>), Failure> {
        let facts = self.groups.served().ok_or_else(|| self.groups.progress().refusal())?;
        let name = self.model_name.clone().unwrap_or_else(|| facts.name.clone());
        Ok((name, facts))
    }

    /// Renders and tokenizes: what is long on a thread that may block, of which `permit` bounds how many do so at once.
    ///
    /// # Errors
    /// [`Failure::NoTokenizer`] and what [`Text::tokenize`] refuses.
    pub(crate) async fn tokenize(
        &self,
        prompt: Prompt,
        permit: &Permit,
    ) -> Result<(String, Vec<TokenId>), Failure> {
        let needed_for = match prompt {
            Prompt::TokenIds(ids) => return Ok((String::new(), ids)),
            Prompt::Text(_) => "text",
            Prompt::Chat(_) => "chat",
        };
        self.check_length(&prompt)?;
        let text = self.text(needed_for)?;
        let rest = match text.begin(prompt)? {
            Begun::Whole(whole) => return Ok(whole),
            Begun::Part(rest) => rest,
        };
        let (text, permit) = (text.clone(), Arc::clone(permit));
        let work = tokio::task::spawn_blocking(move || {
            let result = text.finish(rest);
            drop(permit);
            result
        });
        work.await.unwrap_or_else(|error| {
            Err(Failure::Internal { why: format!("tokenizing the prompt failed: {error}") })
        })
    }

    fn check_length(&self, prompt: &Prompt) -> Result<(), Failure> {
        let (field, bytes) = match prompt {
            Prompt::TokenIds(_) => return Ok(()),
            Prompt::Text(text) => ("text", text.len()),
            Prompt::Chat(chat) => ("chat.messages", chat.bytes()),
        };
        let max = self.tuning.get().limits.prompt_bytes_max;
        match bytes > max {
            true => Err(Violation::new(field, format!("has {bytes} bytes; at most {max}")).into()),
            false => Ok(()),
        }
    }

    fn check(&self, call: &Call, mut request: v1::GenerateRequest) -> Result<Checked, Failure> {
        call.check_priority(request.priority)?;
        let (name, facts) = self.served()?;
        if !request.model.is_empty() && request.model != name {
            return Err(Failure::UnknownModel { asked: request.model, served: vec![name] });
        }
        let mut spec = GenerationSpec::from(&request);
        // The same draw wherever the request goes.
        let seed = *spec.seed.get_or_insert_with(random_u64);
        let response = request.response.unwrap_or_default();
        let v1::Stopping { stop, thinking_tokens_max, .. } = request.stopping.take().unwrap_or_default();
        let mut wrong = Vec::new();
        let prompt = Prompt::try_from(request.prompt.take()).and_then(|prompt| {
            if let Prompt::TokenIds(ids) = &prompt {
                facts.check_ids("token_ids.ids", ids)?;
            }
            Ok(prompt)
        });
        let prompt = unless_invalid(prompt, &mut wrong)?;
        let wanted = wanted(&request, thinking_tokens_max, prompt.as_ref());
        let wanted = unless_invalid(wanted, &mut wrong)?.unwrap_or_default();
        spec.guided = wanted.constraint.is_some() || wanted.calls.is_some();
        let checked = spec.clone().validate(seed, facts.vocab_size);
        unless_invalid(checked.map_err(|error| GenerationFields::Public.refuse(error)), &mut wrong)?;
        let words = request.sampling.take().unwrap_or_default().bad_words;
        if request.session_id.len() > SESSION_ID_BYTES_MAX {
            let reason = format!("has {} bytes; at most {SESSION_ID_BYTES_MAX}", request.session_id.len());
            wrong.push(Violation::new("session_id", reason));
        }
        wrong.extend(bad_words(&words));
        wrong.extend(stop_strings(&stop));
        let options = unless_invalid(Options::new(&request), &mut wrong)?;
        let (Some(prompt), Some(options), true) = (prompt, options, wrong.is_empty()) else {
            return Err(Failure::Invalid(wrong));
        };
        if !words.is_empty() {
            self.text("sampling.bad_words")?;
        }
        if !stop.is_empty() {
            self.text("stopping.stop")?;
        }
        let parse = match (&prompt, response.parse) {
            (_, false) => Parse::No,
            (Prompt::Chat(chat), true) if chat.tools.is_empty() => Parse::WithoutTools,
            (Prompt::Chat(_) | Prompt::Text(_) | Prompt::TokenIds(_), true) => Parse::WithTools,
        };
        if parse != Parse::No {
            self.text("response.parse")?;
        }
        if !wanted.is_nothing() {
            self.text("a form of the answer")?;
        }
        let cites = match &prompt {
            Prompt::Chat(chat) => {
                !chat.documents.is_empty() || chat.messages.iter().any(|message| message.role == Role::Tool)
            }
            Prompt::Text(_) | Prompt::TokenIds(_) => false,
        };
        let form = Form { stop, keep_special: response.keep_special_tokens, parse, cites };
        self.check_length(&prompt)?;
        Ok(Checked { facts, prompt, spec, bad_words: words, options, form, wanted })
    }

    async fn tokenize_admitted(&self, admitted: Admitted) -> Result<Tokenized, Failure> {
        let Admitted { permit, checked } = admitted;
        let Checked { facts, prompt, mut spec, bad_words, options, form, wanted } = checked;
        // Held by the tokenizing thread too, should the caller leave meanwhile.
        let (_, prompt) = self.tokenize(prompt, &permit).await?;
        spec.bad_words.extend(self.tokenize_bad_words(bad_words, &permit).await?);
        let too_long = || Failure::PromptTooLong {
            prompt_tokens: prompt.len() as u64,
            context_tokens_max: facts.context_tokens_max,
        };
        let tokens = u32::try_from(prompt.len()).map_err(|_| too_long())?;
        let room =
            facts.context_tokens_max.checked_sub(tokens).filter(|&room| room > 0).ok_or_else(too_long)?;
        if let Some(id) = prompt.iter().find(|id| id.0 >= facts.vocab_size) {
            let why = format!(
                "the tokenizer made token id {id}, and the model's vocabulary has {}: they do not belong together",
                facts.vocab_size
            );
            return Err(Failure::Internal { why });
        }
        if prompt.is_empty() {
            return Err(Violation::new("prompt", "has no tokens").into());
        }
        let seed = spec.seed.unwrap_or_default();
        let generation = spec.validate(seed, facts.vocab_size);
        let generation = generation.map_err(|error| GenerationFields::Public.refuse(error))?;
        check_prompt_logprobs(&generation, tokens)?;
        let (guide, prompt) = self.guide(wanted, prompt, &facts, &permit).await?;
        let (generation, eos_token_ids) = (generation.limited_to(room), facts.eos_token_ids.clone());
        Ok(Tokenized { permit, guide, prompt, generation, eos_token_ids, options, form })
    }

    /// What a leader must be told of the answer's form, compiled on a thread that may block.
    async fn guide(
        &self,
        wanted: Wanted,
        prompt: Vec<TokenId>,
        facts: &Facts,
        permit: &Permit,
    ) -> Result<(Option<worker::Guide>, Vec<TokenId>), Failure> {
        if wanted.is_nothing() {
            return Ok((None, prompt));
        }
        let (text, permit) = (self.text("a form of the answer")?.clone(), Arc::clone(permit));
        let eos = facts.eos_token_ids.iter().copied().map(TokenId).collect();
        let vocabulary = Vocabulary { eos, size: facts.vocab_size };
        let work = tokio::task::spawn_blocking(move || {
            let guide = text.guide(&wanted, &prompt, &vocabulary);
            drop(permit);
            guide.map(|guide| (Some(guide), prompt))
        });
        work.await.unwrap_or_else(|error| {
            Err(Failure::Internal { why: format!("compiling the form of the answer failed: {error}") })
        })
    }

    async fn tokenize_bad_words(
        &self,
        words: Vec<String>,
        permit: &Permit,
    ) -> Result<Vec<Vec<u32>>, Failure> {
        if words.is_empty() {
            return Ok(Vec::new());
        }
        let (text, permit) = (self.text("sampling.bad_words")?.clone(), Arc::clone(permit));
        let work = tokio::task::spawn_blocking(move || {
            let runs = text.bad_words(&words);
            drop(permit);
            runs
        });
        work.await.unwrap_or_else(|error| {
            Err(Failure::Internal { why: format!("tokenizing the bad words failed: {error}") })
        })
    }

    fn place(&self, call: &Call, tokenized: &Tokenized) -> Result<(Placed, Replay), Failure> {
        let Options { priority, cache_salt, bypass_prefix_cache } = tokenized.options.clone();
        let request = worker::GenerateRequest {
            request_id: call.request_id.clone(),
            prompt: tokenized.prompt.iter().map(|id| id.0).collect(),
            generation: Some(worker::Generation::from(&tokenized.generation)),
            priority: priority.level(),
            cache_salt,
            bypass_prefix_cache,
            // Never 0, which names nothing.
            key: random_u64() | 1,
            guide: tokenized.guide.clone(),
            ..worker::GenerateRequest::default()
        };
        let request = Arc::new(request);
        let placed = Placed::new(&self.groups, &request, Vec::new(), &call.trail)?;
        let (eos, grace) = (tokenized.eos_token_ids.clone(), self.tuning.get().resume_grace);
        Ok((placed, Replay::new(&self.groups, &request, eos, (call.deadline, grace), &call.trail)))
    }

    fn answer(
        &self,
        (call, counted): (Call, Counted),
        tokenized: Tokenized,
        way: (Placed, Replay),
    ) -> Answer {
        let Tokenized { permit, prompt, generation, form, .. } = tokenized;
        let Form { stop, keep_special, parse, cites } = form;
        let reading = || {
            let text = self.text.as_ref()?;
            let parser = match parse {
                Parse::No => None,
                Parse::WithoutTools => Some(text.parser(&prompt, false)),
                Parse::WithTools => Some(text.parser(&prompt, true)),
            };
            let parser = parser.map(|parser| if cites { parser.with_citations() } else { parser });
            let tokenizer = Arc::clone(text.tokenizer());
            Some(Reading { tokenizer, keep_special, parser, stop: stop.clone() })
        };
        let request_id = call.request_id.clone();
        let assemblers = (0..generation.sequences())
            .map(|index| Assembler::new(request_id.clone(), index, &prompt, reading()));
        Answer::new((call, counted), way, assemblers, permit)
    }
}

/// What a request asks of its answer's form.
fn wanted(
    request: &v1::GenerateRequest,
    thinking_tokens_max: Option<u32>,
    prompt: Option<&Prompt>,
) -> Result<Wanted, Failure> {
    let constraint = request.constraint.clone().and_then(proto::constraint);
    let calls = match prompt {
        Some(Prompt::Chat(chat)) => Wanted::calls(chat, constraint.is_some())?,
        Some(Prompt::Text(_) | Prompt::TokenIds(_)) | None => None,
    };
    let allowed = request.sampling.as_ref().is_some_and(|sampling| !sampling.allowed_token_ids.is_empty());
    if thinking_tokens_max.is_some() && allowed {
        let reason =
            "cannot be combined with sampling.allowed_token_ids, which may not allow the end of reasoning";
        return Err(Violation::new("stopping.thinking_tokens_max", reason).into());
    }
    Ok(Wanted { constraint, calls, thinking_tokens_max })
}

impl Options {
    fn new(request: &v1::GenerateRequest) -> Result<Self, Failure> {
        let (salt, bypass_prefix_cache) = (request.cache_salt.as_bytes(), request.bypass_prefix_cache);
        let mut wrong = Vec::new();
        let priority = unless_invalid(proto::priority(request.priority), &mut wrong)?;
        let mut refuse = |reason| wrong.push(Violation::new("cache_salt", reason));
        if salt.len() > CACHE_SALT_BYTES_MAX {
            refuse(format!("has {} bytes; at most {CACHE_SALT_BYTES_MAX}", salt.len()));
        }
        if bypass_prefix_cache && !salt.is_empty() {
            refuse("is set, and so is bypass_prefix_cache; set one of them".to_owned());
        }
        // A hash that nobody can aim at: a salt keeps one tenant's prompts from being probed by another.
        let cache_salt = match salt {
            [] => Vec::new(),
            salt => Sha256::digest(salt)[..16].to_vec(),
        };
        match (priority, wrong.is_empty()) {
            (Some(priority), true) => Ok(Self { priority, cache_salt, bypass_prefix_cache }),
            _ => Err(Failure::Invalid(wrong)),
        }
    }
}

impl Facts {
    /// Names every token id of `field` that the model does not have.
    ///
    /// # Errors
    /// [`Failure::Invalid`] with the first of them.
    pub(crate) fn check_ids(&self, field: &str, ids: &[TokenId]) -> Result<(), Failure> {
        let bad = ids.iter().enumerate().filter(|(_, id)| id.0 >= self.vocab_size);
        let name = |(index, id): (usize, &TokenId)| {
            let reason = format!("token id {id} is not below the vocabulary size {}", self.vocab_size);
            Violation::new(format!("{field}[{index}]"), reason)
        };
        // A prompt of nothing but bad ids would otherwise make a list as long as itself.
        let wrong: Vec<Violation> = bad.map(name).take(VIOLATIONS_MAX).collect();
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(Failure::Invalid(wrong)),
        }
    }
}

const VIOLATIONS_MAX: usize = 16;
/// Most bytes a log-probability entry or alternative takes in a message.
const LOGPROB_BYTES_MAX: usize = 20;

/// A prompt's log-probabilities come in one message; those that would not fit are refused before the prompt is
/// computed.
fn check_prompt_logprobs(generation: &Generation, prompt_tokens: u32) -> Result<(), Failure> {
    let Some(asked) = generation.prompt_logprobs() else { return Ok(()) };
    let bytes = prompt_tokens as usize * (1 + asked.top() as usize) * LOGPROB_BYTES_MAX;
    // The rest of the message is the prompt's ids and one step's tokens.
    if bytes <= MESSAGE_BYTES_MAX / 2 {
        return Ok(());
    }
    let most = (MESSAGE_BYTES_MAX / 2 / LOGPROB_BYTES_MAX / prompt_tokens as usize).saturating_sub(1);
    let reason = format!(
        "{} alternatives at {prompt_tokens} positions do not fit in a message; at most {most} do",
        asked.top()
    );
    Err(Violation::new("response.prompt_logprobs", reason).into())
}

/// Sets violations aside, so that all fields are looked at before the request is refused.
fn unless_invalid<T>(result: Result<T, Failure>, wrong: &mut Vec<Violation>) -> Result<Option<T>, Failure> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Failure::Invalid(violations)) => {
            wrong.extend(violations);
            Ok(None)
        }
        Err(other) => Err(other),
    }
}
