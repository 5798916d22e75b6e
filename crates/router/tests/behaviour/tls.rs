//! TLS on the listeners and to the groups.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use proto::v1::cohort_client::CohortClient;
use proto::worker::worker_server::WorkerServer;
use proto::{Phase, v1};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use router::discovery::{Names, Resolve};
use router::{Access, Config};
use security::{Acceptor, ClientTls, Clients, Dialer, SECRET_HEADER, Secret, ServerTls, incoming};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint, Server};

use crate::support::{
    Leader, PATIENCE, TestRouter, any_port, config, demo_files, facts, from_ids, soon, state,
};

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

    fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.crt")
    }

    fn sign(&self, name: &str) -> (PathBuf, PathBuf) {
        self.sign_for(name, "127.0.0.1")
    }

    /// A certificate for this host.
    fn sign_for(&self, name: &str, host: &str) -> (PathBuf, PathBuf) {
        let params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = |end: &str| self.dir.path().join(format!("{name}.{end}"));
        fs::write(path("crt"), certificate.pem()).unwrap();
        fs::write(path("key"), key.serialize_pem()).unwrap();
        (path("crt"), path("key"))
    }

    fn server(&self, name: &str) -> ServerTls {
        self.server_for(name, "127.0.0.1")
    }

    fn server_for(&self, name: &str, host: &str) -> ServerTls {
        let (certificate, key) = self.sign_for(name, host);
        ServerTls { certificate, key, client_ca: Some(self.ca()) }
    }

    fn dialer(&self, name: Option<&str>, alpn: &'static [&'static [u8]]) -> Dialer {
        Dialer::new(&ClientTls { ca: self.ca(), identity: name.map(|name| self.sign(name)) }, alpn).unwrap()
    }
}

fn channel(dialer: &Dialer, router: &TestRouter) -> Channel {
    dialer.channel(&Endpoint::from_shared(format!("https://{}", router.bound.grpc)).unwrap())
}

/// The status of `GET path`.
async fn get(dialer: &Dialer, router: &TestRouter, path: &str) -> String {
    let uri: Uri = format!("https://{}", router.bound.http.unwrap()).parse().unwrap();
    let mut stream = soon(dialer.connect(&uri)).await.unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // Not every peer says goodbye before it closes.
    let _ = soon(stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).split(' ').nth(1).unwrap_or_default().to_owned()
}

#[tokio::test]
async fn callers_with_a_certificate_are_served_and_others_only_probe() {
    let authority = Authority::new();
    let leader = Leader::serving().await;
    let access = Access { tls: Some(authority.server("router")), ..Access::default() };
    let router = TestRouter::start(Config { access, ..config(&[&leader.address]) }, demo_files()).await;
    let served = async {
        let channel = channel(&authority.dialer(Some("caller"), &[b"h2"]), &router);
        while CohortClient::new(channel.clone()).get_model_info(v1::GetModelInfoRequest {}).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    soon(served).await;
    let stranger = channel(&authority.dialer(None, &[b"h2"]), &router);
    assert!(soon(CohortClient::new(stranger).get_model_info(v1::GetModelInfoRequest {})).await.is_err());

    let (caller, probe) = (authority.dialer(Some("caller"), &[]), authority.dialer(None, &[]));
    assert_eq!(get(&caller, &router, "/v1/models").await, "200");
    assert_eq!(get(&probe, &router, "/v1/models").await, "401");
    assert_eq!(get(&probe, &router, "/livez").await, "200");
    assert_eq!(get(&probe, &router, "/metrics").await, "200");
    assert!(soon(router_speaks_plain(&router)).await.is_err(), "nothing is served without TLS");
}

async fn router_speaks_plain(router: &TestRouter) -> Result<(), tonic::Status> {
    let channel = Endpoint::from_shared(format!("http://{}", router.bound.grpc)).unwrap().connect_lazy();
    CohortClient::new(channel).get_model_info(v1::GetModelInfoRequest {}).await.map(drop)
}

/// A leader behind TLS that wants a certificate; it shows what it is shown.
async fn tls_leader(authority: &Authority) -> (String, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let (address, seen) = tls_leader_of(&authority.server("group")).await;
    (format!("https://{address}"), seen)
}

async fn tls_leader_of(tls: &ServerTls) -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let acceptor = Acceptor::new(Some(tls), Clients::Required, &[b"h2"]).unwrap();
    let listener = TcpListener::bind(any_port()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (shown, seen) = tokio::sync::mpsc::unbounded_channel();
    let inner = crate::support::still_leader(state(Phase::Serving, 100, Some(facts("demo"))));
    let service = WorkerServer::with_interceptor(inner, move |request: tonic::Request<()>| {
        let secret = request.metadata().get(SECRET_HEADER).map(|value| value.to_str().unwrap().to_owned());
        let _ = shown.send(secret.unwrap_or_default());
        Ok(request)
    });
    let server = Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(incoming(listener, acceptor)));
    (address, seen)
}

#[tokio::test]
async fn a_router_shows_its_groups_its_certificate_and_the_cluster_s_secret() {
    let authority = Authority::new();
    let (address, mut seen) = tls_leader(&authority).await;
    let secret = Secret::random().unwrap();
    let tls = ClientTls { ca: authority.ca(), identity: Some(authority.sign("router")) };
    let access = Access { group_tls: Some(tls), secret: Some(secret.clone().into()), ..Access::default() };
    let router = TestRouter::start(Config { access, ..config(&[&address]) }, demo_files()).await;
    router.wait_for_groups(1).await;
    assert!(secret.is(soon(seen.recv()).await.unwrap().as_bytes()));
}

#[tokio::test]
async fn a_group_whose_certificate_is_not_believed_is_named_with_the_reason() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (address, _seen) = tls_leader(&authority).await;
    let tls = ClientTls { ca: other.ca(), identity: None };
    let access = Access { group_tls: Some(tls), ..Access::default() };
    let router = TestRouter::start(Config { access, ..config(&[&address]) }, demo_files()).await;
    let status = refused_certificate(&router).await;
    assert!(status.message().contains(&address), "{status}");
}

/// What a caller is told once the router has seen a certificate that it does not believe.
async fn refused_certificate(router: &TestRouter) -> tonic::Status {
    let refused = async {
        loop {
            let status = router.client().await.generate(from_ids(&[1])).await.unwrap_err();
            if status.message().contains("invalid peer certificate") {
                return status;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.unwrap()
}

/// A name that has one address.
#[derive(Debug)]
struct OneAddress(SocketAddr);

impl Resolve for OneAddress {
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, std::io::Result<Vec<SocketAddr>>> {
        assert_eq!((host, port), ("groups.example", 7000));
        Box::pin(async { Ok(vec![self.0]) })
    }
}

#[tokio::test]
async fn the_groups_of_an_encrypted_name_are_believed_for_that_name_and_not_for_their_addresses() {
    let authority = Authority::new();
    let (address, _seen) = tls_leader_of(&authority.server_for("group", "groups.example")).await;
    let tls = ClientTls { ca: authority.ca(), identity: Some(authority.sign("router")) };
    let access = Access { group_tls: Some(tls), ..Access::default() };
    let names = Names { resolver: Arc::new(OneAddress(address)), ..Names::default() };
    let named = Config { access: access.clone(), names, ..config(&["dns+https://groups.example:7000"]) };
    let router = TestRouter::start(named, demo_files()).await;
    // Until the first answer there is nothing to be served.
    soon(async {
        while router.client().await.get_model_info(v1::GetModelInfoRequest {}).await.is_err() {
            tokio::task::yield_now().await;
        }
        router.wait_for_groups(1).await;
    })
    .await;
    let by_address = Config { access, ..config(&[&format!("https://{address}")]) };
    let router = TestRouter::start(by_address, demo_files()).await;
    let refused = refused_certificate(&router).await;
    assert!(refused.message().contains(&address.to_string()), "{refused}");
}
