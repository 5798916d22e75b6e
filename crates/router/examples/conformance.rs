//! Renders prompts and takes answers apart for a test in another language: JSON lines in, JSON lines out.
//!
//! `{"template": "…", "chat": {…}}` gives `{"rendered": "…"}`; the chat has the fields of `cohort.v1.ChatPrompt`.
//! `{"prompt": "…", "pieces": ["…"]}` gives what the pieces of an answer to that prompt amount to.
//!
//! Usage: conformance TOKENIZER_JSON

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::sync::Arc;

use proto::{Chat, v1};
use router::ModelFiles;
use router::text::{Citation, Cited, Markers, Parsed, Parser, Template, Tokenizer};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

type Error = Box<dyn std::error::Error>;

/// One line: what to render, or what to take apart.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Task {
    template: Option<String>,
    chat: Option<InChat>,
    prompt: Option<String>,
    pieces: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InChat {
    messages: Vec<InMessage>,
    reasoning: Option<bool>,
    #[serde(default)]
    tools: Vec<Box<RawValue>>,
    #[serde(default)]
    documents: Vec<Box<RawValue>>,
    #[serde(default)]
    template_arguments: BTreeMap<String, Value>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct InMessage {
    role: String,
    content: String,
    reasoning: String,
    tool_calls: Vec<InCall>,
    tool_call_id: String,
    results: Vec<Box<RawValue>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InCall {
    id: String,
    name: String,
    arguments: String,
}

fn main() -> Result<(), Error> {
    let path = std::env::args().nth(1).ok_or("usage: conformance TOKENIZER_JSON")?;
    let tokenizer = Tokenizer::from_bytes(&std::fs::read(path)?)?;
    let markers = Arc::new(Markers::of(&tokenizer)?);
    for line in io::stdin().lock().lines() {
        let line = line?;
        let answer = match serde_json::from_str(&line)? {
            Task { template: Some(template), chat: Some(chat), .. } => match render(template, chat) {
                Ok(rendered) => json!({ "rendered": rendered }),
                Err(error) => json!({ "error": error.to_string() }),
            },
            Task { prompt: Some(prompt), pieces: Some(pieces), .. } => {
                parse(&tokenizer, &markers, &prompt, &pieces)?
            }
            Task { .. } => return Err("a line has template and chat, or prompt and pieces".into()),
        };
        writeln!(io::stdout(), "{answer}")?;
    }
    Ok(())
}

fn render(template: String, chat: InChat) -> Result<String, Error> {
    let config = br#"{"bos_token": "<BOS_TOKEN>"}"#.to_vec();
    let files = ModelFiles {
        chat_template: Some(template),
        tokenizer_config_json: Some(config),
        ..ModelFiles::default()
    };
    let template = Template::load(&files)?.ok_or("there is no template")?;
    let raw = |list: Vec<Box<RawValue>>| list.iter().map(|raw| raw.get().to_owned()).collect();
    let message = |message: InMessage| v1::ChatMessage {
        role: message.role,
        content: message.content,
        reasoning: message.reasoning,
        tool_calls: message
            .tool_calls
            .into_iter()
            .map(|call| v1::ToolCall { id: call.id, name: call.name, arguments: call.arguments })
            .collect(),
        tool_call_id: message.tool_call_id,
        results: raw(message.results),
    };
    let wire = v1::ChatPrompt {
        messages: chat.messages.into_iter().map(message).collect(),
        reasoning: chat.reasoning,
        tools: raw(chat.tools),
        documents: raw(chat.documents),
        template_arguments: serde_json::to_string(&chat.template_arguments)?,
        ..v1::ChatPrompt::default()
    };
    let chat = Chat::try_from(wire)?;
    Ok(template.render_chat(&chat)?)
}

fn parse(
    tokenizer: &Tokenizer,
    markers: &Arc<Markers>,
    prompt: &str,
    pieces: &[String],
) -> Result<Value, Error> {
    let prompt = tokenizer.encode(prompt, false)?;
    let mut parser = Parser::new(Arc::clone(markers), &prompt, true).with_citations();
    let mut parsed = Parsed::default();
    for piece in pieces {
        parser.push(piece, &mut parsed);
    }
    parser.finish(&mut parsed);
    let mut calls: Vec<(String, String)> = Vec::new();
    for piece in parsed.calls {
        match (piece.name, calls.last_mut()) {
            (Some(name), _) => calls.push((name, piece.arguments)),
            (None, Some((_, arguments))) => arguments.push_str(&piece.arguments),
            (None, None) => return Err("arguments came before the name of a call".into()),
        }
    }
    let calls: Vec<Value> =
        calls.into_iter().map(|(name, args)| json!({ "name": name, "arguments": args })).collect();
    let citation = |cited: &Citation| {
        let sources: Vec<Value> =
            cited.sources.iter().map(|source| json!([source.call, source.results])).collect();
        json!({ "thinking": cited.part == Cited::Reasoning, "start": cited.start, "end": cited.end, "text": cited.text, "sources": sources })
    };
    let citations: Vec<Value> = parsed.citations.iter().map(citation).collect();
    Ok(json!({ "text": parsed.text, "reasoning": parsed.reasoning, "calls": calls, "citations": citations }))
}
