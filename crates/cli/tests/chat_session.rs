//! What `cohort chat` makes of the lines it reads.

use cli::command::chat::{Line, Session};
use proto::v1::{ChatMessage, GenerateRequest, generate_request};

fn contents(request: &GenerateRequest) -> Vec<(&str, &str)> {
    match &request.prompt {
        Some(generate_request::Prompt::Chat(chat)) => {
            chat.messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect()
        }
        other => panic!("not a chat: {other:?}"),
    }
}

fn answer(content: &str, reasoning: &str) -> ChatMessage {
    ChatMessage {
        role: "assistant".to_owned(),
        content: content.to_owned(),
        reasoning: reasoning.to_owned(),
        ..ChatMessage::default()
    }
}

#[test]
fn a_conversation_carries_its_turns_until_it_is_reset() {
    let mut session = Session::default();
    assert_eq!(session.take(" Hi \n"), Ok(Line::Say("Hi".to_owned())));
    session.answered("Hi", answer("Hello!", "A greeting."));
    let request = session.request("m", "And now?");
    assert_eq!(contents(&request), [("user", "Hi"), ("assistant", "Hello!"), ("user", "And now?")]);
    assert_eq!(request.model, "m");
    assert!(request.response.unwrap().parse);
    assert!(matches!(session.take("/reset"), Ok(Line::Done(_))));
    assert_eq!(contents(&session.request("", "x")), [("user", "x")]);
}

#[test]
fn a_system_message_comes_first_and_starts_anew() {
    let mut session = Session::default();
    session.answered("Hi", answer("Hello!", ""));
    session.take("/system Be brief.").unwrap();
    assert_eq!(contents(&session.request("", "x")), [("system", "Be brief."), ("user", "x")]);
    session.take("/system").unwrap();
    assert_eq!(contents(&session.request("", "x")), [("user", "x")]);
}

#[test]
fn parameters_are_changed_all_at_once_or_not() {
    let mut session = Session::default();
    let Ok(Line::Done(told)) = session.take("/params temperature=0.5 max_tokens=7 reasoning=false") else {
        panic!("it was not taken");
    };
    assert!(told.contains("temperature=0.5") && told.contains("top_p=default"), "{told}");
    let request = session.request("", "x");
    assert_eq!(request.sampling.unwrap().temperature, Some(0.5));
    assert_eq!(request.stopping.unwrap().max_tokens, Some(7));
    let before = session.clone();
    for wrong in ["/params top_p=0.5 top_k=many", "/params colour=red", "/params top_k", "/nothing"] {
        assert!(session.take(wrong).is_err(), "{wrong}");
        assert_eq!(session, before, "{wrong}");
    }
    assert_eq!(session.take(""), Ok(Line::Empty));
    assert_eq!(session.take("/quit"), Ok(Line::Quit));
}
