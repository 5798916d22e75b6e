//! `/tokenize` and `/detokenize`, in vLLM's form.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use proto::{Failure, Prompt, v1};
use serde_json::{Value, json};
use types::TokenId;

use super::error::ApiError;
use super::fields::Fields;
use super::{Context, call, chat, read};
use crate::text::Text;
use crate::workers::Facts;

/// Token ids of a text, or of a conversation as the chat template renders it.
pub(super) async fn tokenize(
    State(context): State<Context>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let shared = &context.shared;
    let of_served = context.clone();
    let take = move |mut fields: Fields, text: Option<&Text>| {
        let facts = served(&of_served, &mut fields)?;
        let prompt = match fields.take("prompt") {
            Some(text) => {
                fields.without_effect(&[("add_special_tokens", "true")]);
                v1::tokenize_request::Prompt::Text(text)
            }
            None => {
                // The template writes the special tokens itself.
                fields.without_effect(&[("add_special_tokens", "false")]);
                v1::tokenize_request::Prompt::Chat(chat::take_prompt(&mut fields, text))
            }
        };
        let wants_texts = fields.take("return_token_strs").unwrap_or(false);
        fields.finish()?;
        Ok((facts, prompt, wants_texts))
    };
    let (parts, (facts, prompt, wants_texts)) = read(shared, request, take).await?;
    let permit = shared.permit()?;
    let tokenizer = shared.text("/tokenize")?.tokenizer();
    let work = shared.tokenize(Prompt::try_from(Some(prompt))?, &permit);
    let (_, ids) = call(&parts, "")?.within(work).await?;
    let token = |id: &TokenId| String::from_utf8_lossy(tokenizer.token_bytes(*id)).into_owned();
    let texts = wants_texts.then(|| ids.iter().map(token).collect::<Vec<String>>());
    let tokens: Vec<u32> = ids.iter().map(|id| id.0).collect();
    Ok(Json(json!({
        "count": tokens.len(), "max_model_len": facts.context_tokens_max, "tokens": tokens, "token_strs": texts,
    })))
}

/// The text of token ids, markers included.
pub(super) async fn detokenize(
    State(context): State<Context>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let of_served = context.clone();
    let take = move |mut fields: Fields, _: Option<&Text>| {
        let facts = served(&of_served, &mut fields)?;
        let tokens: Vec<u32> = fields.take("tokens").unwrap_or_default();
        for (index, id) in tokens.iter().enumerate().filter(|(_, id)| **id >= facts.vocab_size).take(1) {
            let reason = format!("token id {id} is not below the vocabulary size {}", facts.vocab_size);
            fields.refuse(format!("tokens[{index}]"), reason);
        }
        fields.finish()?;
        Ok(tokens)
    };
    let (_parts, tokens) = read(&context.shared, request, take).await?;
    let permit = context.shared.permit()?;
    let text = context.shared.text("/detokenize")?;
    let ids: Vec<TokenId> = tokens.into_iter().map(TokenId).collect();
    Ok(Json(json!({ "prompt": text.detokenize(ids, true, permit).await? })))
}

/// What is served, if it is what the request asks for.
fn served(context: &Context, fields: &mut Fields) -> Result<Arc<Facts>, Failure> {
    let (name, facts) = context.shared.served()?;
    match fields.take::<String>("model").filter(|asked| !asked.is_empty() && *asked != name) {
        Some(asked) => Err(Failure::UnknownModel { asked, served: vec![name] }),
        None => Ok(facts),
    }
}
