//! Asks CNI plugins to put a pod's interfaces into its namespace, and to take them out again
//! (CNI specification 1.0.0; configurations from 0.3.1 on). The command line calls this for
//! `--network cni:NAME`; under containerd, containerd does it itself.
//!
//! Plugins are programs of the host's administrator, and run as who we are.

mod config;
mod gone;
mod outcome;
mod plugin;

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

pub use config::{List, find};
pub use outcome::{Dns, Outcome};

use config::Plugin;

/// Where Debian's package and everybody else put plugins.
pub const PLUGIN_DIRS: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];
/// How long a plugin may take: some wait for a DHCP server.
const TIME_LIMIT: Duration = Duration::from_secs(60);
/// The same for taking down what was stopped: somebody waits.
const UNDO_LIMIT: Duration = Duration::from_secs(10);

/// Why there is no network. One line each.
#[derive(Debug, Error)]
pub enum CniError {
    /// The directory of configurations.
    #[error(
        "{}: cannot be read, and CNI configurations are looked for there: {source}",
        .path.display()
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No configuration has that name.
    #[error(
        "no CNI configuration in {} has the name {name}; {there}", .directory.display()
    )]
    NotFound {
        /// The name.
        name: String,
        /// Where it was looked for.
        directory: PathBuf,
        /// What is there, and what cannot be read.
        there: String,
    },
    /// A configuration makes no sense.
    #[error("{}: is no CNI configuration: {why}", .file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Something that is passed to plugins has a form that they refuse.
    #[error("{what} \"{value}\": {rule}")]
    Argument {
        /// What it is.
        what: &'static str,
        /// Its value.
        value: String,
        /// What it has to be.
        rule: &'static str,
    },
    /// Nobody would forward the ports.
    #[error(
        "the network {name} forwards no ports: add the plugin portmap, with \
         \"capabilities\": {{\"portMappings\": true}}, to {}", .file.display()
    )]
    NoPortMappings {
        /// The network.
        name: String,
        /// Its configuration.
        file: PathBuf,
    },
    /// A plugin is not installed.
    #[error(
        "the CNI plugin {plugin} is in none of {searched}: install it (apt-get install \
         containernetworking-plugins), or name its directory"
    )]
    Missing {
        /// The plugin.
        plugin: String,
        /// The directories.
        searched: String,
    },
    /// A plugin cannot be run.
    #[error("the CNI plugin {plugin} cannot be run: {source}")]
    Start {
        /// The plugin.
        plugin: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A plugin says no.
    #[error("the CNI plugin {plugin} refuses {command}: {message} (code {code})")]
    Refused {
        /// The plugin.
        plugin: String,
        /// What it was to do.
        command: &'static str,
        /// Its own number: below 100, the specification's.
        code: u64,
        /// Its own words.
        message: String,
    },
    /// A plugin fails and does not say how the specification wants it to.
    #[error("the CNI plugin {plugin} fails with {command}: {how}")]
    Failed {
        /// The plugin.
        plugin: String,
        /// What it was to do.
        command: &'static str,
        /// How it ended, and the end of what it said.
        how: String,
    },
    /// A plugin took too long, and was killed.
    #[error("the CNI plugin {plugin} has not done {command} within {seconds} seconds")]
    TimeLimit {
        /// The plugin.
        plugin: String,
        /// What it was to do.
        command: &'static str,
        /// How long it had.
        seconds: f64,
    },
    /// Whoever asked for it wants it no more.
    #[error("the CNI plugin {plugin} was stopped while it did {command}")]
    Stopped {
        /// The plugin.
        plugin: String,
        /// What it was to do.
        command: &'static str,
    },
}

/// A port of the host that leads to one of the pod's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// The host's port.
    pub host_port: u16,
    /// The pod's port.
    pub container_port: u16,
    /// Of which protocol.
    pub protocol: Protocol,
    /// The host's address, if it is to be one only.
    #[serde(rename = "hostIP", skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// What has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// For whom a network is asked for. The same for `add` and `delete`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invocation {
    /// Where plugins are looked for, the first that has it wins.
    pub plugin_dirs: Vec<PathBuf>,
    /// Names the pod. Letters, digits, and `_.-` after the first.
    pub container_id: String,
    /// The path of the pod's network namespace; empty for `delete` once that is gone.
    pub namespace: PathBuf,
    /// What the interface is to be called there.
    pub interface: String,
    /// Ports to forward.
    pub port_mappings: Vec<PortMapping>,
    /// How long each plugin may take.
    pub time_limit: Duration,
}

impl Invocation {
    /// An interface `eth0`, by the plugins in the usual directories, without forwarded ports.
    #[must_use]
    pub fn new(container_id: impl Into<String>, namespace: impl Into<PathBuf>) -> Self {
        Self {
            plugin_dirs: PLUGIN_DIRS.map(PathBuf::from).to_vec(),
            container_id: container_id.into(),
            namespace: namespace.into(),
            interface: "eth0".to_owned(),
            port_mappings: Vec::new(),
            time_limit: TIME_LIMIT,
        }
    }

    /// What libcni checks before it runs a plugin.
    fn check(&self) -> Result<(), CniError> {
        let bad = |what, value: &str, rule| {
            let value = value.to_owned();
            Err(CniError::Argument { what, value, rule })
        };
        if !is_name(&self.container_id) {
            let rule = "has to be letters and digits, and _ . - after the first";
            return bad("the container id", &self.container_id, rule);
        }
        let name = self.interface.as_str();
        let fits = (1..libc::IFNAMSIZ).contains(&name.len()) && name != "." && name != "..";
        if !fits || name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
            let rule = "has to be a name of 1 to 15 bytes without / : and spaces";
            return bad("the interface", name, rule);
        }
        Ok(())
    }
}

/// The specification's form of container ids and networks' names.
fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(good)
}

impl List {
    /// Has the plugins make the network, one after the other. Nothing is left of it if one
    /// of them fails.
    ///
    /// # Errors
    /// [`CniError`]. [`CniError::Argument`], [`CniError::NoPortMappings`] and
    /// [`CniError::Missing`] come before anything is run.
    pub fn add(&self, invocation: &Invocation) -> Result<Outcome, CniError> {
        self.add_until(invocation, &mut || false)
    }

    /// The same, until `stop` says true, which it is asked every few milliseconds.
    ///
    /// # Errors
    /// As [`List::add`], and [`CniError::Stopped`] once all is taken down again, for which each
    /// plugin then has ten seconds.
    pub fn add_until(
        &self,
        invocation: &Invocation,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<Outcome, CniError> {
        invocation.check()?;
        if !invocation.port_mappings.is_empty() && !self.maps_ports() {
            return Err(CniError::NoPortMappings {
                name: self.name.clone(),
                file: self.file.clone(),
            });
        }
        self.installed(&invocation.plugin_dirs)?;
        let mut previous = None;
        for plugin in &self.plugins {
            let command = plugin::Command::Add;
            match self.run(plugin, command, invocation, previous.as_ref(), stop) {
                Ok(result) => previous = Some(result),
                Err(error) => {
                    let mut undo = invocation.clone();
                    if matches!(error, CniError::Stopped { .. }) {
                        undo.time_limit = undo.time_limit.min(UNDO_LIMIT);
                    }
                    if let Err(error) = self.delete(&undo, previous.as_ref()) {
                        log::warn!("after a failure: {error}");
                    }
                    return Err(error);
                }
            }
        }
        Ok(Outcome::of(previous.unwrap_or_default()))
    }

    /// Has the plugins take the network down, the last first. `previous` is what
    /// [`Outcome::raw`] was, if it is still known. May be done again, and after a failed `add`.
    ///
    /// # Errors
    /// The first [`CniError`]; every plugin is run nevertheless.
    pub fn delete(
        &self,
        invocation: &Invocation,
        previous: Option<&Value>,
    ) -> Result<(), CniError> {
        self.delete_until(invocation, previous, &mut || false)
    }

    /// The same, until `stop` says true, which it is asked every few milliseconds. The plugins
    /// whose turn has not come are not run then.
    ///
    /// # Errors
    /// As [`List::delete`], and [`CniError::Stopped`].
    pub fn delete_until(
        &self,
        invocation: &Invocation,
        previous: Option<&Value>,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<(), CniError> {
        invocation.check()?;
        let mut result = Ok(());
        for plugin in self.plugins.iter().rev() {
            let deleted = self.run(plugin, plugin::Command::Del, invocation, previous, stop);
            if matches!(deleted, Err(CniError::Stopped { .. })) {
                return deleted.map(drop);
            }
            result = result.and(deleted.map(drop));
        }
        result
    }

    fn run(
        &self,
        plugin: &Plugin,
        command: plugin::Command,
        invocation: &Invocation,
        previous: Option<&Value>,
        stop: plugin::Stop<'_>,
    ) -> Result<Value, CniError> {
        let program = plugin.find(&invocation.plugin_dirs)?;
        let input = plugin.input(self, &invocation.port_mappings, previous);
        plugin::run(&program, &plugin.kind, command, invocation, &input, stop)
    }
}

/// What programs say, as part of one line.
fn one_line(text: &str) -> String {
    const MOST: usize = 1000;
    let words: Vec<_> = text.split_whitespace().collect();
    let line = words.join(" ");
    let start = line.len().saturating_sub(MOST);
    let start = (start..=line.len()).find(|&at| line.is_char_boundary(at));
    line[start.unwrap_or_default()..].to_owned()
}

/// Directories in a sentence.
fn listed(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    match paths.is_empty() {
        true => "no directory at all".to_owned(),
        false => paths.join(", "),
    }
}

/// How the plugins get their path of directories.
fn joined(paths: &[PathBuf]) -> std::ffi::OsString {
    let mut joined = std::ffi::OsString::new();
    for path in paths {
        if !joined.is_empty() {
            joined.push(":");
        }
        joined.push(Path::as_os_str(path));
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_plugins_would_refuse_is_refused() {
        let good = Invocation::new("pod-1", "/run/netns/pod-1");
        assert!(good.check().is_ok());
        for id in ["", "-pod", "a b", "a/b", "ä"] {
            let bad = Invocation::new(id, "/run/netns/pod-1");
            assert!(bad.check().is_err(), "{id:?}");
        }
        for interface in ["", "..", "a:b", "a/b", "a b", "0123456789abcdef"] {
            let interface = interface.to_owned();
            let bad = Invocation {
                interface,
                ..good.clone()
            };
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn lines_are_lines() {
        assert_eq!(one_line(" a\n\tb \n"), "a b");
        assert_eq!(one_line(&"ä".repeat(2000)).len(), 1000);
        assert_eq!(listed(&[]), "no directory at all");
    }
}
