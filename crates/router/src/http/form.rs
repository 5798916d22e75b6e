//! The fields that say what an answer must look like: `response_format` as OpenAI has it, `structured_outputs` as vLLM
//! has it.

use proto::v1;
use proto::v1::constraint::Form;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::fields::Fields;

const STRUCTURED: &str = "structured_outputs";
const RESPONSE: &str = "response_format";

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum ResponseFormat {
    Text {},
    JsonObject {},
    JsonSchema { json_schema: JsonSchema },
    StructuralTag { structures: Box<RawValue>, triggers: Box<RawValue> },
}

/// The schema is enforced to the letter, whether it asks for that or not.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonSchema {
    #[serde(rename = "name")]
    _name: String,
    #[serde(rename = "description")]
    _description: Option<String>,
    #[serde(rename = "strict")]
    _strict: Option<bool>,
    schema: Box<RawValue>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StructuredOutputs {
    json: Option<Box<RawValue>>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    json_object: Option<bool>,
    structural_tag: Option<String>,
}

/// Where a caller asked for a form, so that a refusal names what was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum AskedBy {
    /// `structured_outputs`, or nothing.
    #[default]
    StructuredOutputs,
    /// `response_format`.
    ResponseFormat,
}

impl AskedBy {
    /// The name in this API of a `field` that the pipeline refused.
    pub(super) fn rename(self, field: &str) -> Option<String> {
        let rest = field.strip_prefix("constraint.")?;
        Some(match self {
            Self::StructuredOutputs => format!("{STRUCTURED}.{rest}"),
            Self::ResponseFormat => match rest.strip_prefix("json").filter(|rest| !rest.starts_with('_')) {
                Some(path) => format!("{RESPONSE}.json_schema.schema{path}"),
                None => RESPONSE.to_owned(),
            },
        })
    }
}

/// Takes the form of an answer's text.
pub(super) fn take(fields: &mut Fields) -> (Option<v1::Constraint>, AskedBy) {
    let response = fields.take(RESPONSE).and_then(response_form);
    let structured = fields.take(STRUCTURED).and_then(|outputs| structured_form(fields, outputs));
    if response.is_some() && structured.is_some() {
        fields.refuse(STRUCTURED, format!("asks for one form and {RESPONSE} for another; set one of them"));
    }
    let asked_by = if response.is_some() { AskedBy::ResponseFormat } else { AskedBy::StructuredOutputs };
    let form = response.or(structured);
    (form.map(|form| v1::Constraint { form: Some(form) }), asked_by)
}

fn response_form(format: ResponseFormat) -> Option<Form> {
    match format {
        ResponseFormat::Text {} => None,
        ResponseFormat::JsonObject {} => Some(Form::JsonObject(true)),
        ResponseFormat::JsonSchema { json_schema } => Some(Form::Json(json_schema.schema.get().to_owned())),
        ResponseFormat::StructuralTag { structures, triggers } => Some(Form::StructuralTag(format!(
            "{{\"structures\":{},\"triggers\":{}}}",
            structures.get(),
            triggers.get()
        ))),
    }
}

fn structured_form(fields: &mut Fields, outputs: StructuredOutputs) -> Option<Form> {
    let StructuredOutputs { json, regex, choice, grammar, json_object, structural_tag } = outputs;
    let forms = [
        json.map(|json| Form::Json(schema_text(&json))),
        regex.map(Form::Regex),
        choice.map(|choices| Form::Choice(v1::Choices { choices })),
        grammar.map(Form::Grammar),
        json_object.filter(|wanted| *wanted).map(Form::JsonObject),
        structural_tag.map(Form::StructuralTag),
    ];
    let mut forms = forms.into_iter().flatten();
    let first = forms.next();
    if first.is_none() || forms.next().is_some() {
        let reason = "must have one of json, regex, choice, grammar, json_object and structural_tag";
        fields.refuse(STRUCTURED, reason);
    }
    first
}

/// A schema may be sent as an object or as a text of one.
fn schema_text(json: &RawValue) -> String {
    serde_json::from_str::<String>(json.get()).unwrap_or_else(|_| json.get().to_owned())
}
