//! Who gets through a TLS listener, and with what files it starts.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use security::{Acceptor, ClientTls, Clients, Dialer, Error, ServerTls, incoming};
use support::{Authority, replace};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_stream::StreamExt;

/// Longer than anything here takes; reached only when something hangs.
const PATIENCE: Duration = Duration::from_secs(20);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("this should not take so long")
}

/// A listener that greets everybody it lets in: `1` who has a certificate, `0` who has none.
async fn greeter(tls: &ServerTls, clients: Clients) -> SocketAddr {
    let acceptor = Acceptor::new(Some(tls), clients, &[]).unwrap();
    acceptor.watch();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut connections = Box::pin(incoming(listener, acceptor));
    tokio::spawn(async move {
        while let Some(Ok(mut stream)) = connections.next().await {
            let greeting = u8::from(stream.is_certified()) + b'0';
            let _ = stream.write_all(&[greeting]).await;
            let _ = stream.shutdown().await;
        }
    });
    address
}

/// The greeting a caller gets, and the certificate it saw.
async fn greeted(tls: &ClientTls, address: SocketAddr) -> io::Result<(u8, Vec<u8>)> {
    let dialer = Dialer::new(tls, &[]).unwrap();
    let uri = format!("https://{address}").parse().unwrap();
    let mut stream = soon(dialer.connect(&uri)).await?;
    let certificate = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
    let greeting = soon(stream.read_u8()).await?;
    Ok((greeting, certificate))
}

fn refusal(result: Result<Acceptor, Error>) -> String {
    result.map(|_| ()).unwrap_err().to_string()
}

#[tokio::test]
async fn a_caller_that_trusts_the_authority_gets_through() {
    let authority = Authority::new();
    let address = greeter(&authority.server("server", false), Clients::Required).await;
    assert_eq!(greeted(&authority.client(None), address).await.unwrap().0, b'0');
}

#[tokio::test]
async fn a_caller_with_another_authority_is_told_which_peer_it_did_not_believe() {
    let (authority, other) = (Authority::new(), Authority::new());
    let address = greeter(&authority.server("server", false), Clients::Required).await;
    let error = greeted(&other.client(None), address).await.unwrap_err().to_string();
    assert!(error.contains(&address.to_string()) && error.contains("invalid peer certificate"), "{error}");
}

#[tokio::test]
async fn where_certificates_are_required_only_those_of_the_authority_get_through() {
    let (authority, other) = (Authority::new(), Authority::new());
    let address = greeter(&authority.server("server", true), Clients::Required).await;
    assert_eq!(greeted(&authority.client(Some("caller")), address).await.unwrap().0, b'1');
    assert!(greeted(&authority.client(None), address).await.is_err());
    let stranger = ClientTls { identity: Some(other.sign("stranger")), ..authority.client(None) };
    assert!(greeted(&stranger, address).await.is_err());
}

#[tokio::test]
async fn where_they_are_asked_for_it_is_known_who_has_one() {
    let (authority, other) = (Authority::new(), Authority::new());
    let address = greeter(&authority.server("server", true), Clients::Asked).await;
    assert_eq!(greeted(&authority.client(Some("caller")), address).await.unwrap().0, b'1');
    assert_eq!(greeted(&authority.client(None), address).await.unwrap().0, b'0');
    let stranger = ClientTls { identity: Some(other.sign("stranger")), ..authority.client(None) };
    assert!(greeted(&stranger, address).await.is_err());
}

#[tokio::test]
async fn a_caller_that_says_nothing_keeps_nobody_waiting() {
    let authority = Authority::new();
    let address = greeter(&authority.server("server", false), Clients::Required).await;
    let silent = soon(tokio::net::TcpStream::connect(address)).await.unwrap();
    assert_eq!(greeted(&authority.client(None), address).await.unwrap().0, b'0');
    drop(silent);
}

#[tokio::test]
async fn a_new_certificate_is_shown_to_new_connections_and_a_bad_one_is_not() {
    let authority = Authority::new();
    let tls = authority.server("server", false);
    let client = authority.client(None);
    let address = greeter(&tls, Clients::Required).await;
    let (_, first) = greeted(&client, address).await.unwrap();
    replace(&tls.certificate, "nonsense");
    // Its key fits no more until the new one is there too; meanwhile the first is shown.
    assert_eq!(greeted(&client, address).await.unwrap().1, first);
    authority.sign("server");
    let renewed = async {
        while greeted(&client, address).await.unwrap().1 == first {
            tokio::task::yield_now().await;
        }
    };
    soon(renewed).await;
}

#[test]
fn files_that_cannot_be_called_with_are_refused_by_name() {
    let authority = Authority::new();
    let good = authority.client(Some("caller"));
    let (expired, expired_key) = authority.sign_until("expired", 2001);
    let (certificate, _) = authority.sign("one");
    let (_, other_key) = authority.sign("other");
    let (empty, missing) = (authority.path("empty"), authority.path("missing"));
    fs::write(&empty, "").unwrap();
    let table = [
        (ClientTls { ca: missing.clone(), ..good.clone() }, "missing", "No such file"),
        (ClientTls { ca: empty, ..good.clone() }, "empty", "has no certificate"),
        (ClientTls { ca: expired.clone(), ..good.clone() }, "expired.crt", "valid from"),
        (
            ClientTls { identity: Some((certificate.clone(), missing)), ..good.clone() },
            "missing",
            "No such file",
        ),
        (
            ClientTls { identity: Some((expired, expired_key)), ..good.clone() },
            "expired.crt",
            "until 2001-01-01T00:00:00Z",
        ),
        (
            ClientTls { identity: Some((certificate, other_key)), ..good },
            "other.key",
            "is not the key of the certificate in",
        ),
    ];
    for (tls, file, why) in table {
        let error = Dialer::new(&tls, &[]).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains(why), "{tls:?}: {error}");
    }
}

#[test]
fn files_that_cannot_be_served_with_are_refused_by_name() {
    let authority = Authority::new();
    let good = authority.server("server", true);
    let (expired, _) = authority.sign_until("expired", 2001);
    let (_, other_key) = authority.sign("other");
    let empty = authority.path("empty");
    fs::write(&empty, "").unwrap();
    let missing = authority.path("missing");
    let server = |certificate: &std::path::Path, key: &std::path::Path| ServerTls {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        client_ca: None,
    };
    let table = [
        (server(&missing, &good.key), "missing", "No such file"),
        (server(&good.certificate, &missing), "missing", "No such file"),
        (server(&empty, &good.key), "empty", "has no certificate"),
        (server(&good.certificate, &empty), "empty", "has no private key"),
        (server(&expired, &authority.path("expired.key")), "expired.crt", "until 2001-01-01T00:00:00Z"),
        (server(&good.certificate, &other_key), "other.key", "is not the key of the certificate in"),
        (ServerTls { client_ca: Some(missing.clone()), ..good.clone() }, "missing", "No such file"),
        (ServerTls { client_ca: Some(expired.clone()), ..good.clone() }, "expired.crt", "valid from"),
    ];
    for (tls, file, why) in table {
        let error = refusal(Acceptor::new(Some(&tls), Clients::Required, &[]));
        assert!(error.contains(file) && error.contains(why), "{tls:?}: {error}");
    }
}
