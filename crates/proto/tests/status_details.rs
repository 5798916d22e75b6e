//! Every failure has its code, its `ErrorInfo` and the details its code asks for, and can be read back.

use std::time::Duration;

use proto::{Failure, Phase, Violation};
use tonic::{Code, Status};
use tonic_types::StatusExt;

const WAIT: Duration = Duration::from_millis(250);

fn every_failure() -> Vec<(Failure, Code)> {
    let text = str::to_owned;
    vec![
        (Violation::new("sampling.top_p", "must be at most 1, not 2").into(), Code::InvalidArgument),
        (Failure::PromptTooLong { prompt_tokens: 900, context_tokens_max: 512 }, Code::OutOfRange),
        (Failure::UnknownModel { asked: text("a"), served: vec![text("b")] }, Code::NotFound),
        (Failure::NoTokenizer { needed_for: text("text") }, Code::FailedPrecondition),
        (Failure::NoChatTemplate { needed_for: text("chat") }, Code::FailedPrecondition),
        (Failure::Overloaded { what: text("requests"), max: 4, retry_after: WAIT }, Code::ResourceExhausted),
        (Failure::NotServing { phase: Phase::Loading, percent: 40, retry_after: WAIT }, Code::Unavailable),
        (Failure::Unavailable { why: text("nobody is there"), retry_after: WAIT }, Code::Unavailable),
        (Failure::DeadlineExceeded, Code::DeadlineExceeded),
        (Failure::Cancelled, Code::Cancelled),
        (Failure::GroupLost { group: text("g"), why: text("rank 1 left") }, Code::Aborted),
        (Failure::Internal { why: text("a bug") }, Code::Internal),
    ]
}

#[test]
fn every_failure_has_its_code_and_can_be_read_back() {
    for (failure, code) in every_failure() {
        let status = Status::from(failure.clone());
        assert_eq!(status.code(), code, "{failure}");
        assert_eq!(status.message(), failure.to_string());
        let details = status.get_error_details();
        let info = details.error_info().expect("every status has an ErrorInfo");
        assert_eq!((info.domain.as_str(), info.reason.as_str()), ("cohort", failure.reason()));
        assert_eq!(Failure::from_status(&status), Some(failure));
    }
}

#[test]
fn a_failure_worth_retrying_says_when() {
    for (failure, code) in every_failure() {
        let details = failure.to_status().get_error_details();
        let delay = details.retry_info().and_then(|retry| retry.retry_delay);
        let expected = matches!(code, Code::ResourceExhausted | Code::Unavailable).then_some(WAIT);
        assert_eq!(delay, expected, "{failure}");
    }
}

#[test]
fn every_refused_field_is_a_field_violation() {
    let wrong = vec![Violation::new("text", "is empty"), Violation::new("stopping.stop[2]", "is empty")];
    let status = Failure::Invalid(wrong).to_status();
    let details = status.get_error_details();
    let fields: Vec<&str> =
        details.bad_request().unwrap().field_violations.iter().map(|v| v.field.as_str()).collect();
    assert_eq!(fields, ["text", "stopping.stop[2]"]);
}

#[test]
fn a_status_of_somebody_else_is_not_ours() {
    assert_eq!(Failure::from_status(&Status::unavailable("connection refused")), None);
}

#[test]
fn a_long_status_fits_in_the_headers_of_a_client() {
    let wrong = (0..500).map(|i| Violation::new(format!("chat.messages[{i}].role"), "é".repeat(4000)));
    let status = Failure::Invalid(wrong.collect()).to_status();
    // The message is percent-encoded and the details are base64 in headers of at most 16 KiB together.
    let encoded = status.message().len() * 3 + status.details().len().div_ceil(3) * 4;
    assert!(encoded < 15 << 10, "{encoded} bytes");
    assert!(status.message().ends_with('…'));
}
