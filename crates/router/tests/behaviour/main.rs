//! The router from outside: a real one on loopback, with scripted leaders behind it. A file per behaviour.
#![allow(clippy::unwrap_used, reason = "helpers of tests, which clippy does not see as tests")]

mod support;

mod access;
mod acknowledged;
mod admission;
mod any_input;
mod bad_requests;
mod cancel;
mod cohere_chat;
mod deadline;
mod detokenization;
mod discovery;
mod group_lost;
mod health;
mod http_chat;
mod http_client;
mod http_completions;
mod http_errors;
mod http_patience;
mod http_probes;
mod http_tokens;
mod metrics;
mod named_groups;
mod no_tokenizer;
mod obedient;
mod other_group;
mod parsed_answers;
mod parsing;
mod picking;
mod reconfigured;
mod registration;
mod resuming;
mod sampling_fields;
mod several_answers;
mod shutdown;
mod startup;
mod stop_search;
mod stop_strings;
mod streaming;
mod structured;
mod templates;
mod tls;
mod tokenizing;
mod undecoded;
mod vllm_api;
