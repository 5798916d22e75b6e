//! A cluster file is edited while the cluster serves.

use std::path::PathBuf;

use futures::future::join_all;
use proto::v1::{GenerateRequest, GetModelInfoRequest, generate_request};
use rustix::process::Signal;
use tonic::Code;

use crate::support::{Cluster, tokens};

/// A cluster with a file that can be written anew.
struct Edited {
    cluster: Cluster,
    directory: tempfile::TempDir,
}

impl Edited {
    fn up(text: &str, flags: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cluster.toml");
        std::fs::write(&path, text).unwrap();
        let config = format!("--config={}", path.display());
        let cluster = Cluster::up(&[flags, &[config.as_str()]].concat());
        Self { cluster, directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("cluster.toml")
    }

    /// Writes the file and waits for a line about it.
    fn edit(&mut self, text: &str, told: &str) -> String {
        std::fs::write(self.path(), text).unwrap();
        self.cluster.wait_for_line(told);
        self.cluster.said()
    }

    fn groups_ready(&mut self, groups: u32) {
        let mut client = self.cluster.client();
        self.cluster.wait("so many groups", |cluster| {
            let info = cluster.block_on(client.get_model_info(GetModelInfoRequest {})).unwrap().into_inner();
            ((info.groups, info.groups_ready) == (groups, groups)).then_some(())
        });
    }
}

fn text(bytes: usize) -> GenerateRequest {
    let prompt = generate_request::Prompt::Text("a ".repeat(bytes / 2));
    GenerateRequest { prompt: Some(prompt), ..tokens(&[], 2) }
}

#[test]
fn groups_join_and_leave_while_requests_run_and_none_of_them_fails() {
    let mut edited = Edited::up("[cluster]\ngroups = 1\n", &["--drain-grace=60", "--resume-grace=60"]);
    let server = edited.cluster.server();
    let load = |streams: u32| {
        let server = server.clone();
        async move {
            let each = (0..streams).map(|index| {
                let server = server.clone();
                async move {
                    let mut client = proto::v1::cohort_client::CohortClient::connect(server).await.unwrap();
                    let mut stream =
                        client.generate(tokens(&[5, 600 + index], 150)).await.unwrap().into_inner();
                    let mut received = 0;
                    while let Some(message) = stream.message().await? {
                        received += message.token_ids.len();
                    }
                    Ok::<_, tonic::Status>(received)
                }
            });
            join_all(each).await
        }
    };
    let all_whole = |ended: Vec<Result<usize, tonic::Status>>| {
        assert!(ended.iter().all(|end| matches!(end, Ok(150))), "{ended:?}");
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let running = runtime.spawn(load(30));
    let said = edited.edit("[cluster]\ngroups = 3\n", "cluster.groups 1 → 3");
    assert!(!said.contains("ends"), "{said}");
    edited.groups_ready(3);
    all_whole(edited.cluster.block_on(running).unwrap());
    let running = runtime.spawn(load(30));
    edited.edit("[cluster]\ngroups = 1\n", "cluster.groups 3 → 1");
    edited.cluster.wait_for_line("group 2 has left");
    edited.cluster.wait_for_line("group 1 has left");
    edited.groups_ready(1);
    all_whole(edited.cluster.block_on(running).unwrap());
    let groups = edited.cluster.processes().into_iter().filter(|(_, line)| line.contains(" group ")).count();
    assert_eq!(groups, 1);
}

#[test]
fn a_group_of_weight_0_gets_nothing_new_until_its_weight_changes_again() {
    let file = |weights: &str| format!("[cluster]\ngroups = 2\nweights = {weights}\n");
    let mut edited = Edited::up(&file("[1, 1]"), &["--http-listen=127.0.0.1:0"]);
    edited.groups_ready(2);
    edited.edit(&file("[0, 1]"), "cluster.weights [1,1] → [0,1]");
    let ready = |edited: &mut Edited, ready: u32| {
        let mut client = edited.cluster.client();
        edited.cluster.wait("so many that take requests", |cluster| {
            let info = cluster.block_on(client.get_model_info(GetModelInfoRequest {})).unwrap().into_inner();
            ((info.groups, info.groups_ready) == (2, ready)).then_some(())
        });
    };
    ready(&mut edited, 1);
    edited.cluster.generate(tokens(&[5, 600], 3)).unwrap();
    edited.edit(&file("[0, 0]"), "cluster.weights [0,1] → [0,0]");
    ready(&mut edited, 0);
    let refused = edited.cluster.generate(tokens(&[5, 600], 3)).unwrap_err();
    assert!(refused.message().contains("every group that serves has weight 0"), "{refused:?}");
    edited.edit(&file("[1, 2]"), "cluster.weights [0,0] → [1,2]");
    ready(&mut edited, 2);
    edited.cluster.generate(tokens(&[5, 600], 3)).unwrap();
}

#[test]
fn a_limit_changes_while_the_cluster_serves_also_for_a_router_that_is_started_again() {
    let mut edited = Edited::up("", &[]);
    edited.cluster.generate(text(100)).unwrap();
    edited.edit("[router.limits]\nprompt_bytes_max = 50\n", "router.limits.prompt_bytes_max 4194304 → 50");
    let refused = |edited: &mut Edited| {
        edited.cluster.wait("a refusal", |cluster| cluster.generate(text(100)).err()).message().to_owned()
    };
    assert!(refused(&mut edited).contains("at most 50"));
    let router =
        edited.cluster.processes().into_iter().find(|(_, line)| line.contains(" router ")).unwrap().0;
    crate::support::signal(router, Signal::KILL);
    edited.cluster.wait_for_line("router (pid");
    let again = edited.cluster.wait("an answer of the new router", |cluster| {
        let server = cluster.server();
        cluster.block_on(async {
            let mut client = proto::v1::cohort_client::CohortClient::connect(server).await.ok()?;
            client
                .generate_once(text(100))
                .await
                .err()
                .filter(|status| status.code() == Code::InvalidArgument)
        })
    });
    assert!(again.message().contains("at most 50"), "{again:?}");
}

#[test]
fn the_log_level_changes_in_every_process() {
    let mut edited = Edited::up("", &[]);
    let said = edited.edit("[telemetry]\nlog_level = \"debug\"\n", "telemetry.log_level not set → \"debug\"");
    assert!(!said.contains("DEBUG"), "{said}");
    edited.cluster.generate(tokens(&[5, 600], 3)).unwrap();
    // Of the router, and of a leader's gRPC threads.
    let ranks = edited.cluster.processes().into_iter().filter(|(_, line)| line.contains(" worker ")).count();
    assert_eq!(ranks, 1);
    edited.cluster.wait_for_line("DEBUG");
    edited.edit("[telemetry]\nlog_level = \"router=loud\"\n", "the running one stays");
}

#[test]
fn what_needs_a_restart_and_a_broken_file_are_refused_and_the_running_configuration_stays() {
    let mut edited = Edited::up("[group]\nkv_tokens = 4096\n", &[]);
    let said = edited.edit(
        "[cluster]\ngroups = 2\n\n[group]\nkv_tokens = 8192\n",
        "cluster.toml:5: group.kv_tokens: 4096 → 8192 needs a restart: groups are started with it",
    );
    assert!(said.contains("the running one stays"), "{said}");
    let said = edited.edit(
        "[router]\ngrpc_lisen = 1\n[router.limits]\nrequests_max = 0\n",
        "did you mean router.grpc_listen",
    );
    assert!(said.contains("cluster.toml:2: router.grpc_lisen"), "{said}");
    // A line of its own, which may come later.
    edited.cluster.wait_for_line("cluster.toml:4: router.limits.requests_max: must be between 1");
    edited.edit("[router\n", "the running one stays: cluster file");
    edited.edit(
        "[group]\nkv_tokens = 4096\n[router]\nkeys_file = \"/nowhere/keys\"\n",
        "cannot read /nowhere/keys",
    );
    edited.cluster.generate(tokens(&[5, 600], 3)).unwrap();
    edited.groups_ready(1);
    // SIGHUP asks at once, also for a file that has not changed.
    let path = edited.path();
    std::fs::write(path, "[group]\nkv_tokens = 4096\n").unwrap();
    edited.cluster.signal(Signal::HUP);
    edited.cluster.wait_for_line("no key has changed");
    edited.cluster.generate(tokens(&[5, 600], 3)).unwrap();
}

/// As Kubernetes does with a ConfigMap: the file is a link to one in a directory, which is a link that is turned.
#[test]
fn a_link_that_is_turned_counts_as_a_change() {
    use std::os::unix::fs::symlink;
    let directory = tempfile::tempdir().unwrap();
    let version = |name: &str, text: &str| {
        std::fs::create_dir(directory.path().join(name)).unwrap();
        std::fs::write(directory.path().join(name).join("cluster.toml"), text).unwrap();
    };
    version("..1", "[router.limits]\nprompt_bytes_max = 1000\n");
    version("..2", "[router.limits]\nprompt_bytes_max = 50\n");
    symlink("..1", directory.path().join("..data")).unwrap();
    symlink("..data/cluster.toml", directory.path().join("cluster.toml")).unwrap();
    let config = format!("--config={}", directory.path().join("cluster.toml").display());
    let mut cluster = Cluster::up(&[&config]);
    cluster.generate(text(100)).unwrap();
    symlink("..2", directory.path().join("..next")).unwrap();
    std::fs::rename(directory.path().join("..next"), directory.path().join("..data")).unwrap();
    cluster.wait_for_line("router.limits.prompt_bytes_max 1000 → 50");
    let refused = cluster.wait("a refusal", |cluster| cluster.generate(text(100)).err());
    assert!(refused.message().contains("at most 50"), "{refused:?}");
}
