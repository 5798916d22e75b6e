//! A leader's metrics and probes behind TLS.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proto::worker::WatchRequest;
use proto::worker::worker_client::WorkerClient;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use security::{ClientTls, Dialer, ServerTls};
use support::{Rank, config};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::Endpoint;
use worker::{Access, Config};

/// Longer than anything here takes; reached only when something hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// An authority and what it has signed.
struct Authority {
    dir: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ca.crt"), issuer.pem()).unwrap();
        Self { dir, issuer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes `NAME.crt` and `NAME.key`, for 127.0.0.1, each in one move.
    fn sign(&self, name: &str) -> (PathBuf, PathBuf) {
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let write = |end: &str, text: String| {
            let (path, next) = (self.path(&format!("{name}.{end}")), self.path("next"));
            fs::write(&next, text).unwrap();
            fs::rename(next, &path).unwrap();
            path
        };
        (write("crt", certificate.pem()), write("key", key.serialize_pem()))
    }

    fn dialer(&self, name: Option<&str>, alpn: &'static [&'static [u8]]) -> Dialer {
        let identity = name.map(|name| self.sign(name));
        Dialer::new(&ClientTls { ca: self.path("ca.crt"), identity }, alpn).unwrap()
    }
}

/// The answer to `GET path`, and the certificate that was shown.
async fn get(dialer: &Dialer, address: SocketAddr, path: &str) -> io::Result<(String, Vec<u8>)> {
    let uri = format!("https://{address}").parse().unwrap();
    let mut stream = tokio::time::timeout(PATIENCE, dialer.connect(&uri)).await.unwrap()?;
    let certificate = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
    let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    // Not every peer says goodbye before it closes.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
    Ok((String::from_utf8_lossy(&answer).into_owned(), certificate))
}

#[test]
fn metrics_and_probes_are_encrypted_and_need_no_certificate_while_the_port_for_routers_does() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (certificate, key) = authority.sign("group");
    let client_ca = Some(authority.path("ca.crt"));
    let access = Access { tls: Some(ServerTls { certificate, key, client_ca }), ..Access::default() };
    let metrics = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let rank = Rank::start(Config { access, metrics_listen: Some(metrics), ..config(0, 1) });
    let address = rank.listening();
    rank.ready();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let nobody = authority.dialer(None, &[]);
        let (page, _) = get(&nobody, metrics, "/metrics").await.unwrap();
        assert!(page.starts_with("HTTP/1.1 200") && page.contains("vllm:num_requests_running"), "{page}");
        let (live, first) = get(&nobody, metrics, "/livez").await.unwrap();
        assert!(live.starts_with("HTTP/1.1 200"), "{live}");
        let error = get(&other.dialer(None, &[]), metrics, "/livez").await.unwrap_err().to_string();
        assert!(error.contains("invalid peer certificate"), "{error}");

        let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap();
        let watch = async |dialer: Dialer| {
            let mut client = WorkerClient::new(dialer.channel(&endpoint));
            client.watch(WatchRequest::default()).await?.into_inner().message().await
        };
        assert!(watch(authority.dialer(Some("router"), &[b"h2"])).await.unwrap().is_some());
        assert!(watch(authority.dialer(None, &[b"h2"])).await.is_err());

        // A new certificate is shown without a restart.
        authority.sign("group");
        let until = Instant::now() + PATIENCE;
        while get(&nobody, metrics, "/livez").await.unwrap().1 == first {
            assert!(Instant::now() < until, "the new certificate is never shown");
            tokio::task::yield_now().await;
        }
    });
    // Without TLS nothing is said.
    let mut plain = TcpStream::connect(metrics).unwrap();
    io::Write::write_all(&mut plain, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut said = Vec::new();
    let _ = io::Read::read_to_end(&mut plain, &mut said);
    assert!(!String::from_utf8_lossy(&said).contains("HTTP/1.1 200"));
    rank.shutdown.cancel();
    rank.end().unwrap();
}
