//! From the tree to what each component is started with.

use std::net::SocketAddr;

use security::{ClientTls, ServerTls};
use types::{TpRank, TpSize};

use crate::telemetry::Telemetry;
use crate::tree::{ClusterTls, RouterJwt, Settings, Tls};
use crate::weights;

fn server_tls(tls: &Tls) -> Option<ServerTls> {
    let (certificate, key) = tls.certificate.clone().zip(tls.key.clone())?;
    Some(ServerTls { certificate, key, client_ca: tls.client_ca.clone() })
}

/// What the tree does not hold because it differs from rank to rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankPlace {
    /// Who this is.
    pub rank: TpRank,
    /// Where rank 0 listens for the others, and where they find it.
    pub rendezvous: SocketAddr,
    /// Where they find it instead, as `host:port`.
    pub leader: Option<String>,
    /// Where the leader serves routers; read on rank 0 only.
    pub listen: SocketAddr,
}

impl Settings {
    /// What a router is started with, but for the cluster's secret.
    #[must_use]
    pub fn router(&self) -> router::Config {
        let router = &self.router;
        router::Config {
            grpc_listen: router.grpc_listen,
            http_listen: router.http_listen.address(),
            workers: router.workers.clone(),
            weights: weights::by_address(router),
            names: router::discovery::Names {
                interval: router.dns.interval_s,
                hold: router.dns.hold_s,
                ..router::discovery::Names::default()
            },
            model_name: self.model.name.clone(),
            limits: router::Limits {
                requests_max: router.limits.requests_max,
                prompt_bytes_max: router.limits.prompt_bytes_max,
                queue: router::QueueLimits {
                    requests_max: router.queue.requests_max,
                    tokens_max: router.queue.tokens_max,
                    bytes_max: router.queue.bytes_max,
                    key_requests_max: router.queue.key_requests_max,
                    wait_max: router.queue.wait_max_s,
                },
            },
            registration_hold: router.registration.then_some(router.registration_hold_s),
            connection_age_max: router.connection_age_max_s,
            resume_grace: router.resume_grace_s,
            http_patience: router::HttpPatience {
                head: router.http.head_timeout_s,
                body: router.http.body_timeout_s,
                write: router.http.write_timeout_s,
                quiet: router.http.keep_alive_s,
            },
            withdraw_grace: router.withdraw_grace_s,
            drain_grace: router.drain_grace_s,
            access: router::Access {
                tls: server_tls(&router.tls),
                keys: router.keys_file.clone(),
                jwt: jwt_rules(&router.jwt),
                group_tls: self.client_tls(),
                secret: None,
            },
            tracing: self.tracing(),
        }
    }

    /// Which requests are traced: none where nothing is exported.
    fn tracing(&self) -> router::Tracing {
        let Telemetry { otlp_endpoint, sample_ratio, follow_callers, record_content, .. } = &self.telemetry;
        if otlp_endpoint.is_none() {
            return router::Tracing::default();
        }
        let sampling = trace::Sampling { ratio: *sample_ratio, follow_callers: *follow_callers };
        router::Tracing { sampling, record_content: *record_content }
    }

    /// Ranks of each group, in all its sub-groups.
    #[must_use]
    pub fn ranks(&self) -> TpSize {
        let (tensor, data) = (self.group.tensor_parallel, self.group.data_parallel);
        match TpSize::new(tensor.get().saturating_mul(data)) {
            Ok(ranks) => ranks,
            Err(error) => unreachable!("checked settings have a group of a valid size: {error}"),
        }
    }

    /// Bounds of each group's engine.
    #[must_use]
    pub const fn limits(&self) -> worker::Limits {
        let group = &self.group;
        worker::Limits {
            block_size: group.block_size,
            kv_tokens: group.kv_tokens,
            step_tokens_max: group.step_tokens_max,
            running_max: group.running_max,
            waiting_requests_max: group.waiting_requests_max,
            waiting_tokens_max: group.waiting_tokens_max,
        }
    }

    /// How a router knows its groups, and what it shows them.
    #[must_use]
    pub fn client_tls(&self) -> Option<ClientTls> {
        let ClusterTls { ca, certificate, key } = &self.cluster.tls;
        let identity = certificate.clone().zip(key.clone());
        ca.clone().map(|ca| ClientTls { ca, identity })
    }

    /// What one rank is started with, but for the cluster's secret, serving `files` under `name`.
    #[must_use]
    pub fn worker(&self, place: RankPlace, files: model::Files, name: String) -> worker::Config {
        let group = &self.group;
        worker::Config {
            model: files,
            load_format: self.model.load_format,
            layers: self.model.layers,
            check_numerics: self.model.check_numerics,
            model_name: name,
            dtype: self.model.dtype,
            device: self.model.device,
            threads: group.threads,
            rank: place.rank,
            experts: group.experts,
            tensor: group.tensor_parallel,
            dispatch: group.dispatch.resolve(group.data_parallel),
            expert_placement: group.expert_placement.clone(),
            rendezvous: place.rendezvous,
            leader: place.leader,
            listen: place.listen,
            metrics_listen: match place.rank.index().checked_sub(1) {
                None => group.metrics_listen.address(),
                Some(follower) => group.rank_metrics_listen.nth(follower).address(),
            },
            limits: self.limits(),
            window_keys: self.model.window_keys,
            boot_timeout: group.boot_timeout_s,
            step_timeout: group.step_timeout_s,
            drain_grace: group.drain_grace_s,
            access: worker::Access { tls: server_tls(&group.tls), secret: None },
            routers: worker::Routers {
                addresses: group.routers.clone(),
                advertise: group.advertise.clone(),
                tls: group.routers_ca.clone().map(|ca| ClientTls {
                    ca,
                    identity: group.tls.certificate.clone().zip(group.tls.key.clone()),
                }),
            },
            fault_dir: group.fault_dir.clone(),
        }
    }
}

/// Which tokens a router takes, if any.
fn jwt_rules(jwt: &RouterJwt) -> Option<security::JwtRules> {
    Some(security::JwtRules {
        jwks: jwt.jwks_file.clone()?,
        issuers: jwt.issuers.clone(),
        audiences: jwt.audiences.clone(),
        leeway: jwt.leeway_s,
        limits_claim: jwt.limits_claim.clone(),
        limits: security::Limits {
            requests_per_minute: jwt.requests_per_minute,
            tokens_per_minute: jwt.tokens_per_minute,
            concurrency: jwt.concurrency,
            priority_min: jwt.priority_min,
        },
    })
}
