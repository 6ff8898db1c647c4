//! Finds a network's configuration among the files of a directory, and what of it each
//! plugin gets to read.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, open};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{CniError, PortMapping, is_name, listed};

/// What configurations are called, as libcni has it.
const EXTENSIONS: [&str; 3] = ["conflist", "conf", "json"];
/// A file without a version is of the first.
const FIRST: &str = "0.1.0";
/// Those before 0.3.0 have results of another form.
const KNOWN: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Larger than any configuration.
const MOST: u64 = 1 << 20;
const PORT_MAPPINGS: &str = "portMappings";

/// The plugins that make a network together. Whoever deletes a network has to have what it was
/// made of, so that it can be written down.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct List {
    /// The network's name.
    pub name: String,
    /// The version of the specification that plugins are spoken to in.
    pub version: String,
    /// Where all of this stands.
    pub file: PathBuf,
    pub(super) plugins: Vec<Plugin>,
}

/// One of them, with its part of the configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Plugin {
    pub(super) kind: String,
    config: Map<String, Value>,
}

/// The first configuration in this directory, by the names of the files, of the network with
/// this name.
///
/// # Errors
/// [`CniError::Directory`], [`CniError::NotFound`]. [`CniError::Config`] is about the file
/// that was found: one of another network may be broken.
pub fn find(directory: &Path, name: &str) -> Result<List, CniError> {
    let failed = |source| CniError::Directory {
        path: directory.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if extension.is_some_and(|extension| EXTENSIONS.contains(&extension)) {
            files.push(path);
        }
    }
    files.sort();
    let mut names = Vec::new();
    let mut broken = Vec::new();
    for file in files {
        match read(&file) {
            Ok((found, config)) if found == name => {
                return list(&file, found, &config).map_err(|why| CniError::Config { file, why });
            }
            Ok((found, _)) => names.push(found),
            Err(why) => broken.push(format!("{} is none: {why}", file.display())),
        }
    }
    let mut there = match names.is_empty() {
        true => "there are no others".to_owned(),
        false => format!("those there are called {}", names.join(", ")),
    };
    for broken in broken {
        there.push_str(&format!("; {broken}"));
    }
    Err(CniError::NotFound {
        name: name.to_owned(),
        directory: directory.to_owned(),
        there,
    })
}

/// A file, as far as its name.
fn read(file: &Path) -> Result<(String, Map<String, Value>), String> {
    let failed = |error: io::Error| error.to_string();
    // Without NONBLOCK, a FIFO would keep us until somebody writes to it.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = open(file, flags, Mode::empty());
    let opened = File::from(opened.map_err(|error| failed(error.into()))?);
    let metadata = opened.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err("is no regular file".to_owned());
    }
    if metadata.len() > MOST {
        return Err(format!("has {} bytes", metadata.len()));
    }
    let mut bytes = Vec::new();
    opened.take(MOST).read_to_end(&mut bytes).map_err(failed)?;
    let config: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    let name = config.get("name").and_then(Value::as_str);
    let name = name.ok_or("has no \"name\"")?.to_owned();
    match is_name(&name) {
        true => Ok((name, config)),
        false => Err(format!(
            "its name \"{name}\" is not one of letters and digits"
        )),
    }
}

fn list(file: &Path, name: String, config: &Map<String, Value>) -> Result<List, String> {
    let version = config.get("cniVersion").and_then(Value::as_str);
    let version = version.unwrap_or(FIRST).to_owned();
    if !KNOWN.contains(&version.as_str()) {
        return Err(format!(
            "its \"cniVersion\" is {version}, and those from {} to {} are known",
            KNOWN[0],
            KNOWN[KNOWN.len() - 1]
        ));
    }
    // A file with one plugin is a list with one plugin.
    let plugins = match config.get("plugins") {
        Some(Value::Array(plugins)) => plugins.clone(),
        Some(_) => return Err("its \"plugins\" are no list".to_owned()),
        None => vec![Value::Object(config.clone())],
    };
    if plugins.is_empty() {
        return Err("has no plugins".to_owned());
    }
    let plugins = plugins.into_iter().map(|plugin| {
        let Value::Object(config) = plugin else {
            return Err("one of its plugins is no object".to_owned());
        };
        let kind = config.get("type").and_then(Value::as_str);
        let kind = kind.ok_or("one of its plugins has no \"type\"")?.to_owned();
        match kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
            true => Err(format!("\"{kind}\" is no plugin's name")),
            false => Ok(Plugin { kind, config }),
        }
    });
    Ok(List {
        name,
        version,
        file: file.to_owned(),
        plugins: plugins.collect::<Result<_, _>>()?,
    })
}

impl List {
    /// Whether a plugin wants to be told of ports.
    #[must_use]
    pub fn maps_ports(&self) -> bool {
        self.plugins.iter().any(Plugin::maps_ports)
    }

    /// Whether all of its plugins are in these directories, and those that they have find the
    /// addresses.
    ///
    /// # Errors
    /// [`CniError::Missing`], for the first that is not.
    pub fn installed(&self, dirs: &[PathBuf]) -> Result<(), CniError> {
        for plugin in &self.plugins {
            plugin.find(dirs)?;
            if let Some(kind) = plugin.addresses() {
                find_program(kind, dirs)?;
            }
        }
        Ok(())
    }
}

impl Plugin {
    /// Whether it wants to be told of ports.
    pub(super) fn maps_ports(&self) -> bool {
        let capabilities = self.config.get("capabilities");
        let capability = capabilities.and_then(|all| all.get(PORT_MAPPINGS));
        capability == Some(&Value::Bool(true))
    }

    /// The plugin that it runs itself, to be given addresses.
    fn addresses(&self) -> Option<&str> {
        let kind = self.config.get("ipam")?.get("type")?.as_str()?;
        (!kind.is_empty() && !kind.contains('/')).then_some(kind)
    }

    /// Its program.
    pub(super) fn find(&self, dirs: &[PathBuf]) -> Result<PathBuf, CniError> {
        find_program(&self.kind, dirs)
    }

    /// What it reads: its part of the configuration, and what it is to know of the rest.
    pub(super) fn input(
        &self,
        list: &List,
        ports: &[PortMapping],
        previous: Option<&Value>,
    ) -> Vec<u8> {
        let mut config = self.config.clone();
        config.insert("name".to_owned(), json!(list.name));
        config.insert("cniVersion".to_owned(), json!(list.version));
        if self.maps_ports() && !ports.is_empty() {
            let runtime = json!({ PORT_MAPPINGS: ports });
            config.insert("runtimeConfig".to_owned(), runtime);
        }
        match previous {
            Some(previous) => config.insert("prevResult".to_owned(), previous.clone()),
            None => config.remove("prevResult"),
        };
        Value::Object(config).to_string().into_bytes()
    }
}

fn find_program(kind: &str, dirs: &[PathBuf]) -> Result<PathBuf, CniError> {
    let program = dirs.iter().map(|dir| dir.join(kind)).find(|path| {
        let metadata = fs::metadata(path);
        metadata.is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    });
    program.ok_or_else(|| CniError::Missing {
        plugin: kind.to_owned(),
        searched: listed(dirs),
    })
}
