//! What the compiler does not hold: the arrows between the crates, the size of files, the habits of the house.
//! Each test reads the tree as text and lists every offender at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Which workspace crates a crate may name under `[dependencies]` or `[build-dependencies]`; `cli` may name all.
const ARROWS: [(&str, &[&str]); 15] = [
    ("types", &[]),
    ("trace", &[]),
    ("collectives", &["types"]),
    ("security", &["types"]),
    ("ops", &["types"]),
    ("proto", &["types"]),
    ("engine", &["types"]),
    ("grammar", &["types"]),
    ("model", &["ops", "collectives", "types"]),
    ("ops-cpu", &["ops", "collectives", "types"]),
    ("ops-cuda", &["ops", "collectives", "types"]),
    (
        "worker",
        &[
            "proto",
            "engine",
            "model",
            "ops",
            "ops-cpu",
            "ops-cuda",
            "collectives",
            "grammar",
            "security",
            "trace",
            "types",
        ],
    ),
    ("router", &["proto", "grammar", "security", "trace", "types"]),
    ("settings", &["router", "worker", "model", "security", "trace", "types"]),
    ("cli", &CLI_ARROWS),
];
const CLI_ARROWS: [&str; 14] = [
    "settings",
    "security",
    "trace",
    "router",
    "worker",
    "proto",
    "engine",
    "grammar",
    "model",
    "ops-cuda",
    "ops-cpu",
    "ops",
    "collectives",
    "types",
];

/// The crates no other crate may lean on, not even for its tests.
const TOP_CRATES: [&str; 2] = ["settings", "cli"];

const LONGEST_FILE_LINES: usize = 600;

const TOP_LEVEL: [&str; 12] = [
    "Cargo.toml",
    "Cargo.lock",
    "README.md",
    "LICENSE",
    "crates",
    "deploy",
    "docs",
    "fuzz",
    "helm",
    "proto",
    "target",
    "tests",
];

// ---- the rules ----

#[test]
fn dependency_arrows_only_point_down() {
    let known: BTreeSet<&str> = ARROWS.iter().map(|(name, _)| *name).collect();
    let mut offenders = Vec::new();
    for (krate, manifest) in manifests() {
        match ARROWS.iter().find(|(name, _)| *name == krate) {
            Some((_, allowed)) => offenders.extend(wrong_arrows(&krate, &manifest, allowed, &known)),
            None => offenders.push(format!("crates/{krate} has no line in the table of arrows")),
        }
    }
    report("a crate may only name the crates below it", &offenders);
}

#[test]
fn every_crate_of_the_table_exists_and_is_named_after_its_folder() {
    let manifests = manifests();
    let mut offenders: Vec<String> = ARROWS
        .iter()
        .filter(|(name, _)| !manifests.contains_key(*name))
        .map(|(name, _)| format!("crates/{name}/Cargo.toml is missing"))
        .collect();
    for (folder, manifest) in &manifests {
        let name = package_name(manifest);
        if name.as_deref() != Some(folder) {
            offenders.push(format!("crates/{folder} names its package {name:?}"));
        }
    }
    report("folder and crate carry the same name", &offenders);
}

#[test]
fn no_file_is_longer_than_six_hundred_lines() {
    let mut offenders = Vec::new();
    for file in sources(&["crates", "tests", "fuzz"], &["rs", "cu"]) {
        let lines = read(&file).lines().count();
        if lines > LONGEST_FILE_LINES {
            offenders.push(format!("{} has {lines} lines, {LONGEST_FILE_LINES} at most", shown(&file)));
        }
    }
    report("split the file", &offenders);
}

#[test]
fn every_crate_but_ops_cuda_forbids_unsafe_code() {
    let mut offenders = Vec::new();
    for krate in manifests().into_keys().filter(|name| name != "ops-cuda") {
        let source = root().join("crates").join(&krate).join("src");
        let roots: Vec<PathBuf> =
            ["lib.rs", "main.rs"].iter().map(|name| source.join(name)).filter(|file| file.exists()).collect();
        if roots.is_empty() {
            offenders.push(format!("crates/{krate} has neither src/lib.rs nor src/main.rs"));
        }
        let open =
            roots.iter().filter(|file| !read(file).lines().any(|line| line == "#![forbid(unsafe_code)]"));
        offenders.extend(open.map(|file| format!("{} lacks #![forbid(unsafe_code)]", shown(file))));
    }
    report("only ops-cuda holds unsafe code", &offenders);
}

#[test]
fn no_cargo_feature_chooses_the_backend() {
    let mut offenders = Vec::new();
    let root_manifest = read(&root().join("Cargo.toml"));
    for (name, manifest) in manifests().into_iter().chain([("the workspace".to_owned(), root_manifest)]) {
        offenders
            .extend(cuda_features(&manifest).into_iter().map(|line| format!("Cargo.toml of {name}: {line}")));
    }
    for file in sources(&["crates"], &["rs"]) {
        offenders.extend(lines_with(&file, &["cfg(feature", "cfg!(feature", "cfg_attr(feature"]));
    }
    report("a backend is a crate chosen at run time, never a feature", &offenders);
}

#[test]
fn every_path_in_the_architecture_page_exists() {
    let page = root().join("docs/architecture.md");
    let text = fs::read_to_string(&page).unwrap_or_else(|error| {
        panic!("docs/architecture.md cannot be read: {error}; it walks a request through the code")
    });
    let names: BTreeSet<String> = sources(&["crates", "proto", "tests"], &["rs", "cu", "proto"])
        .iter()
        .filter_map(|file| Some(file.file_name()?.to_str()?.to_owned()))
        .collect();
    let offenders: Vec<String> = backticked(&text)
        .filter(|(_, word)| !path_holds(word, &names))
        .map(|(line, word)| format!("docs/architecture.md:{line} names `{word}`, which is not there"))
        .collect();
    report("the page describes the code as it is", &offenders);
}

#[test]
fn no_test_is_ignored_and_no_long_parameter_list_is_allowed() {
    // Put together here, so that this file does not find itself.
    let ignored = concat!("#[", "ignore");
    let long_lists = concat!("(clippy::", "too_many_arguments");
    let mut offenders = Vec::new();
    for file in sources(&["crates", "tests", "fuzz"], &["rs"]) {
        offenders.extend(lines_with(&file, &[ignored, long_lists]));
    }
    report("a test runs or is deleted; past five parameters stands a named struct", &offenders);
}

#[test]
fn the_top_level_holds_only_what_the_house_knows() {
    let mut offenders: Vec<String> = entries(&root())
        .iter()
        .filter_map(|entry| Some(entry.file_name()?.to_str()?.to_owned()))
        .filter(|name| !name.starts_with('.') && !TOP_LEVEL.contains(&name.as_str()))
        .collect();
    offenders.sort();
    report("unknown top-level entry", &offenders);
}

#[test]
fn only_the_command_line_uses_anyhow() {
    let offenders: Vec<String> = manifests()
        .into_iter()
        .filter(|(name, _)| name != "cli")
        .flat_map(|(name, manifest)| {
            let found = dependencies(&manifest).into_iter().filter(|dep| dep.package == "anyhow");
            found
                .map(move |dep| format!("crates/{name} names anyhow under [{}]", dep.section))
                .collect::<Vec<_>>()
        })
        .collect();
    report("every crate below cli has its own Error", &offenders);
}

// ---- the rules bite ----

#[test]
fn an_arrow_that_points_up_is_named_with_both_ends() {
    let manifest = "[package]\nname = \"ops\"\n[dependencies]\ntypes.workspace = true\nengine.workspace = true\n\
                    [dependencies.model]\npath = \"../model\"\n\
                    [target.'cfg(unix)'.dependencies]\ncards = { package = \"ops-cuda\", workspace = true }\n\
                    [dev-dependencies]\nrouter.workspace = true\nsettings = { workspace = true }\n";
    let known = ARROWS.iter().map(|(name, _)| *name).collect();
    let offenders = wrong_arrows("ops", manifest, &["types"], &known);
    assert_eq!(
        offenders,
        [
            "ops → engine under [dependencies]",
            "ops → model under [dependencies]",
            "ops → ops-cuda under [target.'cfg(unix)'.dependencies]",
            "ops → settings under [dev-dependencies]",
        ]
    );
}

#[test]
fn a_cuda_feature_is_found_where_it_is_defined_and_where_it_is_asked_for() {
    let manifest = "[dependencies]\ncandle-core = { version = \"1\", features = [\"cuda\"] }\n\
                    cudarc = { features = [\"cuda-13000\"] }\n[features]\ncuda = []\nfast = []\n";
    let found = cuda_features(manifest);
    assert_eq!(found, ["candle-core = { version = \"1\", features = [\"cuda\"] }", "cuda = []"]);
}

#[test]
fn a_path_that_is_gone_is_told_from_words_that_are_no_paths() {
    let names = BTreeSet::from(["tidy.rs".to_owned()]);
    for word in [
        "tests/tidy.rs",
        "tests/",
        ".cu",
        "tests/*.rs",
        "crates/*/src/lib.rs",
        "crates/{types,ops}/src",
        "cli/src",
        "tidy.rs",
        "tokens/s",
        "cohort.v1.Cohort/Generate",
        "/readyz",
        "and/or",
        "router/worker",
        "crates/types/src/lib.rs:1",
        "TpRank",
        "target/release/cohort",
    ] {
        assert!(path_holds(word, &names), "{word} is no stale path");
    }
    for word in [
        "tests/gone.rs",
        "crates/gone",
        "crates/{types,gone}",
        "types/gone.rs",
        "types/src/gone",
        "gone.rs",
        "gone/*.rs",
        "tests/gone*",
        "crates/*/gone",
    ] {
        assert!(!path_holds(word, &names), "{word} is not there");
    }
    assert!(
        backticked("a\n`b c` and `d/e`\n```\n`f`\n```").eq([(2, "b"), (2, "c"), (2, "d/e")]),
        "words carry their line"
    );
}

// ---- manifests ----

/// One dependency of a manifest: the section it stands in and the package it names.
struct Dependency {
    section: String,
    package: String,
}

impl Dependency {
    fn is_for_tests(&self) -> bool {
        self.section.ends_with("dev-dependencies")
    }
}

/// The arrows of `krate` that are neither in `allowed` nor harmless, as sentences.
fn wrong_arrows(krate: &str, manifest: &str, allowed: &[&str], known: &BTreeSet<&str>) -> Vec<String> {
    let wrong = |dep: &Dependency| {
        let name = dep.package.as_str();
        let excused = allowed.contains(&name) || (dep.is_for_tests() && !TOP_CRATES.contains(&name));
        known.contains(name) && !excused
    };
    let wrong = dependencies(manifest).into_iter().filter(wrong);
    wrong.map(|dep| format!("{krate} → {} under [{}]", dep.package, dep.section)).collect()
}

/// Every dependency of a manifest, in order. Reads the two forms Cargo knows: `name = …` or `name.workspace = …`
/// in a section, and a section of its own, `[dependencies.name]`.
fn dependencies(manifest: &str) -> Vec<Dependency> {
    let mut found: Vec<Dependency> = Vec::new();
    for (section, line) in lines_by_section(manifest) {
        let (owner, own_section) = match section.rsplit_once('.') {
            Some((owner, name)) if is_dependency_section(owner) => (owner, Some(name)),
            _ => (section, None),
        };
        if !is_dependency_section(owner) {
            continue;
        }
        let key = line.split(['=', '.']).next().unwrap_or(line);
        let name = own_section.unwrap_or(key).trim().trim_matches('"');
        let renamed = line.split_once("package = ").and_then(|(_, rest)| rest.split('"').nth(1));
        let package = renamed.unwrap_or(name).to_owned();
        match found.last_mut() {
            // Further lines of `[dependencies.name]` speak of the same dependency, and may rename it.
            Some(last) if own_section.is_some() && last.section == owner && last.package == name => {
                last.package = package;
            }
            _ => found.push(Dependency { section: owner.to_owned(), package }),
        }
    }
    found
}

fn is_dependency_section(section: &str) -> bool {
    let kind = section.rsplit('.').next().unwrap_or(section);
    matches!(kind, "dependencies" | "dev-dependencies" | "build-dependencies")
}

/// Lines that define a feature named after CUDA, or ask a dependency for its feature `cuda`.
fn cuda_features(manifest: &str) -> Vec<String> {
    lines_by_section(manifest)
        .filter(|(section, line)| {
            (*section == "features" && line.starts_with("cuda")) || line.contains("\"cuda\"")
        })
        .map(|(_, line)| line.to_owned())
        .collect()
}

fn package_name(manifest: &str) -> Option<String> {
    let (_, line) = lines_by_section(manifest)
        .find(|(section, line)| *section == "package" && line.starts_with("name"))?;
    Some(line.split('"').nth(1)?.to_owned())
}

/// Every line that says something, with the `[section]` it stands in.
fn lines_by_section(manifest: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut section = "";
    manifest.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).filter_map(
        move |line| match line.strip_prefix('[') {
            Some(header) => {
                section = header.trim_end_matches(']').trim_start_matches('[');
                None
            }
            None => Some((section, line)),
        },
    )
}

/// The manifest of every crate, by folder name.
fn manifests() -> BTreeMap<String, String> {
    let crates = entries(&root().join("crates"));
    let found: BTreeMap<String, String> = crates
        .iter()
        .filter(|folder| folder.join("Cargo.toml").exists())
        .filter_map(|folder| {
            Some((folder.file_name()?.to_str()?.to_owned(), read(&folder.join("Cargo.toml"))))
        })
        .collect();
    assert!(!found.is_empty(), "no crate under {}", root().join("crates").display());
    found
}

// ---- paths in prose ----

/// Every word between backticks, with its line (from 1). Fenced blocks hold pictures and examples: passed over.
fn backticked(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    let prose = text.lines().enumerate().filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    });
    prose.flat_map(|(index, line)| {
        let spans = line.split('`').skip(1).step_by(2);
        spans.flat_map(str::split_whitespace).map(move |word| (index + 1, word))
    })
}

/// False for a word that reads as a path of this repository and names nothing. Any other word passes.
fn path_holds(word: &str, file_names: &BTreeSet<String>) -> bool {
    let word = word.trim_matches(|c: char| "(),;\"'".contains(c)).trim_end_matches(['.', ':']);
    // `file.rs:12` and `file.rs::item` both mean the file.
    let path = word.split(':').next().unwrap_or(word).trim_end_matches('/');
    let source = [".rs", ".cu", ".proto"].iter().any(|ending| path.ends_with(ending));
    if !path.chars().all(|c| c.is_ascii_alphanumeric() || "/._-*{},".contains(c)) || path.starts_with('/') {
        return true;
    }
    let Some((first, rest)) = path.split_once('/') else {
        // A bare `.rs` is an ending, not a file.
        return !source || path.starts_with('.') || path.contains('*') || file_names.contains(path);
    };
    if TOP_LEVEL.contains(&first) || first == ".ci" {
        // What a build leaves under target/ is not part of the tree.
        return first == "target" || alternatives(path).iter().all(|path| exists(&root(), path));
    }
    let crate_folder = root().join("crates").join(first);
    if crate_folder.is_dir() && (source || rest.starts_with("src")) {
        let here = |path: &String| exists(&crate_folder, path) || exists(&crate_folder.join("src"), path);
        return alternatives(rest).iter().all(here);
    }
    !source
}

/// `a/{b,c}/d` means `a/b/d` and `a/c/d`.
fn alternatives(path: &str) -> Vec<String> {
    let braces = path.split_once('{').and_then(|(head, rest)| Some((head, rest.split_once('}')?)));
    match braces {
        Some((head, (choices, tail))) => {
            choices.split(',').flat_map(|choice| alternatives(&format!("{head}{choice}{tail}"))).collect()
        }
        None => vec![path.to_owned()],
    }
}

/// Whether `path` exists under `base`; one `*` in a part stands for any text.
fn exists(base: &Path, path: &str) -> bool {
    let (part, rest) = path.split_once('/').unwrap_or((path, ""));
    let found: Vec<PathBuf> = match part.split_once('*') {
        None => vec![base.join(part)],
        Some((head, tail)) if base.is_dir() => {
            let fits = |name: &str| {
                name.len() >= head.len() + tail.len() && name.starts_with(head) && name.ends_with(tail)
            };
            entries(base)
                .into_iter()
                .filter(|entry| entry.file_name().is_some_and(|n| fits(&n.to_string_lossy())))
                .collect()
        }
        Some(_) => Vec::new(),
    };
    found.iter().any(|entry| if rest.is_empty() { entry.exists() } else { exists(entry, rest) })
}

// ---- the tree ----

/// The workspace root. This file is a test of `crates/cli`.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The path as a reader of the repository writes it.
fn shown(file: &Path) -> String {
    file.strip_prefix(root()).unwrap_or(file).display().to_string()
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", shown(file)))
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let listing = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", shown(folder)));
    listing.map(|entry| entry.unwrap_or_else(|error| panic!("{}: {error}", shown(folder))).path()).collect()
}

/// Every file under the named top-level folders with one of these endings, sorted; build output is left out.
fn sources(folders: &[&str], endings: &[&str]) -> Vec<PathBuf> {
    let mut open: Vec<PathBuf> =
        folders.iter().map(|name| root().join(name)).filter(|dir| dir.is_dir()).collect();
    let mut found = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in entries(&folder) {
            let ending = entry.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
            if entry.is_dir() {
                if entry.file_name().is_some_and(|name| name != "target") {
                    open.push(entry);
                }
            } else if endings.contains(&ending) {
                found.push(entry);
            }
        }
    }
    found.sort();
    found
}

/// The lines of `file` that hold one of the needles, as `path:line: text`.
fn lines_with(file: &Path, needles: &[&str]) -> Vec<String> {
    let text = read(file);
    let numbered =
        text.lines().enumerate().filter(|(_, line)| needles.iter().any(|needle| line.contains(needle)));
    numbered.map(|(index, line)| format!("{}:{}: {}", shown(file), index + 1, line.trim())).collect()
}

fn report(rule: &str, offenders: &[String]) {
    assert!(offenders.is_empty(), "{rule}:\n  {}", offenders.join("\n  "));
}
