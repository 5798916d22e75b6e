//! `cohort chat` at a terminal, in front of a server whose answers are known.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use proto::v1::{Finish, FinishReason, GenerateRequest, GenerateResponse, generate_request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};

use support::server::Server;

/// Longest wait for the program to say something.
const PATIENCE: Duration = Duration::from_secs(30);
const DIM: &str = "\u{1b}[2m";
const RESET: &str = "\u{1b}[0m";

/// A terminal with `cohort chat` in it.
struct Terminal {
    ours: File,
    child: Child,
    /// What was shown and not looked at.
    shown: String,
}

impl Terminal {
    fn chatting_with(server: &Server, flags: &[&str]) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let theirs = ioctl_tiocgptpeer(&ours, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        let stdio = || Stdio::from(theirs.try_clone().unwrap());
        let child = Command::new(env!("CARGO_BIN_EXE_cohort"))
            .args(["chat", &format!("--server=http://{}", server.address)])
            .args(flags)
            .env_clear()
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        Self { ours: ours.into(), child, shown: String::new() }
    }

    /// Waits until `text` is shown; returns what came before it.
    fn until(&mut self, text: &str) -> String {
        let started = Instant::now();
        loop {
            if let Some(at) = self.shown.find(text) {
                let rest = self.shown.split_off(at + text.len());
                let mut before = std::mem::replace(&mut self.shown, rest);
                before.truncate(at);
                return before;
            }
            let left = PATIENCE.saturating_sub(started.elapsed());
            let timeout = Timespec { tv_sec: left.as_secs().try_into().unwrap(), tv_nsec: 0 };
            let ready = poll(&mut [PollFd::new(&self.ours, PollFlags::IN)], Some(&timeout)).unwrap();
            assert!(ready > 0, "{text:?} was not shown, but {:?}", self.shown);
            let mut bytes = [0; 4096];
            let count = self.ours.read(&mut bytes).unwrap();
            self.shown.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }

    fn prompt(&mut self) -> String {
        self.until(&format!(">{RESET} "))
    }

    /// Types a line; waits until the terminal has echoed it.
    fn say(&mut self, line: &str) {
        writeln!(self.ours, "{line}").unwrap();
        self.until(&format!("{line}\r\n"));
    }

    fn ctrl_c(&self) {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
    }

    fn end(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

fn finish() -> GenerateResponse {
    let finish = Finish { reason: FinishReason::Stop.into(), ..Finish::default() };
    GenerateResponse { finish: Some(finish), ..GenerateResponse::default() }
}

fn text(text: &str) -> GenerateResponse {
    GenerateResponse { text: text.to_owned(), ..GenerateResponse::default() }
}

fn reasoning(text: &str) -> GenerateResponse {
    GenerateResponse { reasoning: text.to_owned(), ..GenerateResponse::default() }
}

/// Who said what in a request.
fn turns(request: &GenerateRequest) -> Vec<(&str, &str)> {
    let Some(generate_request::Prompt::Chat(chat)) = &request.prompt else { panic!("no chat: {request:?}") };
    chat.messages.iter().map(|message| (message.role.as_str(), message.content.as_str())).collect()
}

#[test]
fn answers_are_shown_as_they_come_with_reasoning_dimmed() {
    let server = Server::start();
    let mut terminal = Terminal::chatting_with(&server, &[]);
    assert!(terminal.prompt().contains("/reset"), "the commands are told");
    terminal.say("How much is 2 + 2?");
    let answer = server.asked();
    answer.send(reasoning("Let me see. "));
    terminal.until(&format!("{DIM}Let me see. {RESET}"));
    answer.send(text("It is"));
    assert_eq!(terminal.until("It is"), "\r\n\r\n");
    answer.send(text(" 4."));
    terminal.until(" 4.");
    answer.send(finish());
    answer.end();
    terminal.prompt();
    terminal.say("And 3 + 3?");
    let answer = server.asked();
    let before = [("user", "How much is 2 + 2?"), ("assistant", "It is 4."), ("user", "And 3 + 3?")];
    assert_eq!(turns(answer.request()), before);
    answer.send(text("6"));
    answer.send(finish());
    answer.end();
    terminal.prompt();
    terminal.say("/quit");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn ctrl_c_ends_an_answer_and_not_the_program() {
    let server = Server::start();
    let mut terminal = Terminal::chatting_with(&server, &[]);
    terminal.prompt();
    terminal.ctrl_c();
    terminal.until("/quit or ctrl-D leaves");
    terminal.prompt();
    terminal.say("Tell me everything.");
    let answer = server.asked();
    answer.send(text("In the beginning"));
    terminal.until("In the beginning");
    terminal.ctrl_c();
    terminal.until("(ended)");
    answer.left();
    terminal.prompt();
    terminal.say("Shorter!");
    let answer = server.asked();
    let before = [("user", "Tell me everything."), ("assistant", "In the beginning"), ("user", "Shorter!")];
    assert_eq!(turns(answer.request()), before);
    answer.send(text("No."));
    answer.send(finish());
    answer.end();
    terminal.prompt();
    // Ctrl-D.
    terminal.ours.write_all(&[4]).unwrap();
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn commands_change_what_is_asked() {
    let server = Server::start();
    let mut terminal = Terminal::chatting_with(&server, &["--system=Be brief.", "--temperature=0.5"]);
    let ask = |line: &str, terminal: &mut Terminal| {
        terminal.say(line);
        let answer = server.asked();
        let request = answer.request().clone();
        answer.send(text("Yes."));
        answer.send(finish());
        answer.end();
        terminal.prompt();
        request
    };
    terminal.prompt();
    let first = ask("One?", &mut terminal);
    assert_eq!(turns(&first), [("system", "Be brief."), ("user", "One?")]);
    assert_eq!(first.sampling.as_ref().unwrap().temperature, Some(0.5));
    terminal.say("/reset");
    terminal.until("the conversation starts anew");
    terminal.prompt();
    assert_eq!(turns(&ask("Two?", &mut terminal)), [("system", "Be brief."), ("user", "Two?")]);
    terminal.say("/system Be long.");
    terminal.until("the conversation starts anew");
    terminal.prompt();
    terminal.say("/params temperature=0 top_p=0.9");
    terminal.until("temperature=0 top_k=default top_p=0.9");
    terminal.prompt();
    terminal.say("/params warmth=1");
    terminal.until("`warmth` is unknown");
    terminal.prompt();
    let last = ask("Three?", &mut terminal);
    assert_eq!(turns(&last), [("system", "Be long."), ("user", "Three?")]);
    let sampling = last.sampling.unwrap();
    assert_eq!((sampling.temperature, sampling.top_p), (Some(0.0), Some(0.9)));
    terminal.say("/nonsense");
    terminal.until("/nonsense is unknown");
    terminal.prompt();
    terminal.say("/quit");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
fn an_answer_that_fails_is_told_and_the_chat_goes_on() {
    let server = Server::start();
    let mut terminal = Terminal::chatting_with(&server, &[]);
    terminal.prompt();
    terminal.say("Fail!");
    let answer = server.asked();
    answer.send(text("I "));
    answer.fail("the group is lost");
    terminal.until("the group is lost");
    terminal.prompt();
    terminal.say("Again?");
    let answer = server.asked();
    assert_eq!(turns(answer.request()), [("user", "Again?")], "what failed is not a part of it");
    answer.send(text("Fine."));
    answer.send(finish());
    answer.end();
    terminal.prompt();
    terminal.say("/quit");
    assert_eq!(terminal.end().code(), Some(0));
}
