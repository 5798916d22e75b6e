//! Talking to a router.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use proto::v1::cohort_client::CohortClient;
use security::{Badge, ClientTls, Dialer, Identified};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;
use types::limits::MESSAGE_BYTES_MAX;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a server may take to tell that a deadline has passed.
const DEADLINE_SLACK: Duration = Duration::from_secs(1);
/// Where `cohort up` serves unless told otherwise.
pub(crate) const SERVER_DEFAULT: &str = "http://127.0.0.1:50051";

/// A client of the public API.
pub(crate) type Client = CohortClient<Identified>;
/// The variables that say who calls, and whom to believe. A key has no flag: a command line is for everybody to read.
const KEY_VARIABLE: &str = "COHORT_API_KEY";
const CA_VARIABLE: &str = "COHORT_CA_FILE";
const CERTIFICATE_VARIABLE: &str = "COHORT_CERTIFICATE_FILE";
const CERTIFICATE_KEY_VARIABLE: &str = "COHORT_CERTIFICATE_KEY_FILE";

/// Flags that say how an `https://` server is called. Without them the variables of the same purpose are looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "For https:// servers")]
pub struct TlsFlags {
    /// Authority that signed the server's certificate, PEM [default: $COHORT_CA_FILE]
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Certificate to show to a server that asks for one, PEM [default: $COHORT_CERTIFICATE_FILE]
    #[arg(long, value_name = "FILE", requires = "certificate_key")]
    pub certificate: Option<PathBuf>,
    /// The certificate's key, PEM [default: $COHORT_CERTIFICATE_KEY_FILE]
    #[arg(long, value_name = "FILE", requires = "certificate")]
    pub certificate_key: Option<PathBuf>,
}

impl TlsFlags {
    /// What makes connections to `server`, named by `flag`, for the protocols `alpn`.
    ///
    /// # Errors
    /// When no authority is named, or what is wrong with a file.
    pub(crate) fn dialer(
        &self,
        (flag, server): (&str, &str),
        alpn: &'static [&'static [u8]],
    ) -> anyhow::Result<Dialer> {
        self.dialer_if_told(alpn)?.with_context(|| {
            format!(
                "{flag} {server}: name the file of the authority to believe with --ca, or in {CA_VARIABLE}"
            )
        })
    }

    /// As [`TlsFlags::dialer`], but `None` when no authority is named.
    ///
    /// # Errors
    /// What is wrong with a file.
    pub(crate) fn dialer_if_told(&self, alpn: &'static [&'static [u8]]) -> anyhow::Result<Option<Dialer>> {
        let file =
            |of: &Option<PathBuf>, name| of.clone().or_else(|| std::env::var_os(name).map(PathBuf::from));
        let Some(ca) = file(&self.ca, CA_VARIABLE) else { return Ok(None) };
        let certificate = file(&self.certificate, CERTIFICATE_VARIABLE);
        let identity = certificate.zip(file(&self.certificate_key, CERTIFICATE_KEY_VARIABLE));
        Ok(Some(Dialer::new(&ClientTls { ca, identity }, alpn)?))
    }
}

/// The address under which a server bound to `bound` is reached from this machine.
pub(crate) fn reachable(bound: SocketAddr) -> SocketAddr {
    let ip = match bound.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, bound.port())
}

/// A channel to `server`, given as `http://host:port`, `https://host:port` or `host:port`.
pub(crate) async fn channel(server: &str) -> anyhow::Result<Channel> {
    channel_with(server, &TlsFlags::default()).await
}

/// As [`channel`], with a caller's flags.
pub(crate) async fn channel_with(server: &str, tls: &TlsFlags) -> anyhow::Result<Channel> {
    channel_of(("--server", server), tls).await
}

/// As [`channel_with`], for another flag than `--server`.
pub(crate) async fn channel_of((flag, server): (&str, &str), tls: &TlsFlags) -> anyhow::Result<Channel> {
    let address = if server.contains("://") { server.to_owned() } else { format!("http://{server}") };
    let endpoint = Endpoint::from_shared(address.clone())
        .map_err(|error| anyhow!("{flag} {server}: {error}; use an address such as {SERVER_DEFAULT}"))?;
    let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
    match endpoint.uri().scheme_str() {
        Some("https") => return Ok(tls.dialer((flag, server), &[b"h2"])?.channel(&endpoint)),
        Some("http") => {}
        _ => bail!("{flag} {server}: http:// and https:// are spoken"),
    }
    endpoint
        .connect()
        .await
        .with_context(|| format!("nothing answers at {address}; is a cluster up? (cohort up)"))
}

/// The key this user calls with, if there is one.
pub(crate) fn api_key() -> Option<String> {
    std::env::var(KEY_VARIABLE).ok().map(|key| key.trim().to_owned()).filter(|key| !key.is_empty())
}

/// A client on a channel, with this user's key and room for the largest message.
pub(crate) fn client(channel: Channel) -> Client {
    CohortClient::with_interceptor(channel, Badge::of_caller(api_key().as_deref()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// Returns once the router says it serves.
pub(crate) async fn wait_until_serving(channel: Channel) -> anyhow::Result<()> {
    let request = HealthCheckRequest { service: String::new() };
    let mut health = HealthClient::new(channel);
    let mut states = health.watch(request).await.map_err(|status| explain(&status))?.into_inner();
    while let Some(state) = states.message().await.map_err(|status| explain(&status))? {
        if state.status() == ServingStatus::Serving {
            return Ok(());
        }
    }
    bail!("the router stopped before it served")
}

/// A server keeps the deadline itself; this is for one that does not, and waits a little longer.
pub(crate) async fn within<F: Future>(
    deadline: Duration,
    call: F,
) -> Result<F::Output, tokio::time::error::Elapsed> {
    tokio::time::timeout(deadline.saturating_add(DEADLINE_SLACK), call).await
}

/// A status as a person reads it: the code, the message, and each refused field on its own line.
pub(crate) fn explain(status: &Status) -> anyhow::Error {
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
    // A server that repeats the violations in its message is not made to say them twice.
    let repeated = violations.first().is_some_and(|first| status.message().contains(&first.description));
    let message = if repeated { "fields of the request are wrong" } else { status.message() };
    let mut text = format!("{}: {message}", code_name(status.code()));
    for violation in violations {
        text.push_str(&format!("\n  {}: {}", violation.field, violation.description));
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        text.push_str(&format!("\n  retry after {} ms", delay.as_millis()));
    }
    anyhow!(text)
}

/// The code as gRPC's documents write it.
pub(crate) const fn code_name(code: tonic::Code) -> &'static str {
    use tonic::Code;
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
