//! The demo model, inside the binary.

use std::path::Path;

use settings::Settings;

/// Name the embedded model is served under.
pub(crate) const NAME: &str = "cohort-demo";

macro_rules! asset {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../assets/demo/", $name)) as &[u8])
    };
}

/// The checkpoint's files.
pub(crate) const FILES: &[(&str, &[u8])] = &[
    asset!("config.json"),
    asset!("generation_config.json"),
    asset!("model.safetensors"),
    asset!("tokenizer.json"),
    asset!("tokenizer_config.json"),
    asset!("chat_template.jinja"),
];

/// The checkpoint these settings name.
pub(crate) fn checkpoint(settings: &Settings) -> model::Files {
    match (&settings.model.path, settings.model.preset) {
        (Some(path), _) => model::Files::Directory(path.clone()),
        (None, Some(preset)) => preset.files(),
        (None, None) => model::Files::Embedded(FILES),
    }
}

/// What the model computes, with the changes these settings ask for.
pub(crate) fn model_config(settings: &Settings) -> Result<model::ModelConfig, model::Error> {
    let mut config = model::ModelConfig::from_files(&checkpoint(settings))?;
    if let Some(keys) = settings.model.window_keys {
        config.window_keys = keys;
    }
    if let Some(layers) = settings.model.layers {
        config.cut(layers as usize)?;
    }
    Ok(config)
}

/// The name it is served under.
pub(crate) fn served_name(settings: &Settings) -> String {
    if let Some(name) = &settings.model.name {
        return name.clone();
    }
    match (&settings.model.path, settings.model.preset) {
        (Some(path), _) => directory_name(path),
        (None, Some(preset)) => preset.name().to_owned(),
        (None, None) => NAME.to_owned(),
    }
}

/// The last part of the path that is a name; `.` and `..` are resolved where they can be.
fn directory_name(path: &Path) -> String {
    let resolved = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = resolved.file_name().unwrap_or(resolved.as_os_str());
    name.to_string_lossy().into_owned()
}

/// The checkpoint's files that turn text into tokens.
pub(crate) fn text_files(settings: &Settings) -> Result<router::ModelFiles, router::Error> {
    if let Some(path) = &settings.model.path {
        return router::ModelFiles::read_dir(path);
    }
    if settings.model.preset.is_some() {
        return Ok(router::ModelFiles::default());
    }
    let file = |name: &str| FILES.iter().find(|(of, _)| *of == name).map(|(_, bytes)| bytes.to_vec());
    let template = file("chat_template.jinja").map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(router::ModelFiles {
        tokenizer_json: file("tokenizer.json"),
        tokenizer_config_json: file("tokenizer_config.json"),
        chat_template: template,
    })
}
