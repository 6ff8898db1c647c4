//! The block itself: how it is written, found and taken out.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use pericarp_config::{Config, annotation::PATTERN};
use toml::{Table, Value};

const BEGIN: &str = "# pericarp: begin";
const END: &str = "# pericarp: end\n";
/// Follows [`BEGIN`] where the file was not there before.
const WITH_FILE: &str = " (and this file)";
/// Follows [`BEGIN`] where the last line before it had no end.
const WITH_LINE_END: &str = " (and the end of the line before)";
const RUNTIME: &str = "io.containerd.pericarp.v2";
/// The plugin that knows runtimes, by the version of the file.
const PLUGINS: [(i64, &str); 2] = [
    (2, "io.containerd.grpc.v1.cri"),
    (3, "io.containerd.cri.v1.runtime"),
];

/// What containerd is to know.
#[derive(Debug, Clone)]
pub struct Runtimes {
    handlers: Vec<String>,
    shim: PathBuf,
    config: Option<PathBuf>,
}

impl Runtimes {
    /// A runtime for each handler of `config`, which is the file at `path`; `shim` is the program.
    #[must_use]
    pub fn of(config: &Config, shim: &Path, path: Option<&Path>) -> Self {
        Self {
            handlers: config.handlers().map(|(name, _)| name.to_owned()).collect(),
            shim: shim.to_owned(),
            config: path.map(Path::to_owned),
        }
    }

    /// The names.
    #[must_use]
    pub fn handlers(&self) -> &[String] {
        &self.handlers
    }

    fn tables(&self, plugin: &str) -> String {
        let mut text = String::new();
        // JSON's strings are TOML's, too.
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let config = self.config.as_ref().map(|path| path.display().to_string());
        for handler in &self.handlers {
            // A label, which is a bare key. How this handler is called the shim is told here alone.
            let table = format!("plugins.{}.containerd.runtimes.{handler}", quoted(plugin));
            let path = format!("{}#{handler}", config.as_deref().unwrap_or_default());
            let _ = write!(
                text,
                "[{table}]\n\
                 runtime_type = {}\n\
                 runtime_path = {}\n\
                 privileged_without_host_devices = true\n\
                 privileged_without_host_devices_all_devices_allowed = true\n\
                 pod_annotations = [{}]\n\
                 [{table}.options]\n\
                 ConfigPath = {}\n",
                quoted(RUNTIME),
                quoted(&self.shim.display().to_string()),
                quoted(PATTERN),
                quoted(&path),
            );
        }
        text
    }
}

/// The file without our block: what was there before. None if the file was ours altogether.
pub(super) fn without(text: &str) -> Result<Option<String>, String> {
    let Some(begin) = text.find(BEGIN) else {
        return Ok(Some(text.to_owned()));
    };
    let (before, block) = text.split_at(begin);
    let Some(end) = block.find(END) else {
        return Err(format!("has a '{BEGIN}' without its end"));
    };
    let after = &block[end + END.len()..];
    if after.contains(BEGIN) {
        return Err(format!("has '{BEGIN}' twice"));
    }
    let first = block.lines().next().unwrap_or_default();
    let alone = before.is_empty() && after.is_empty();
    if first.ends_with(WITH_FILE) && alone {
        return Ok(None);
    }
    let before = match first.ends_with(WITH_LINE_END) {
        true => before.strip_suffix('\n').unwrap_or(before),
        false => before,
    };
    Ok(Some([before, after].concat()))
}

/// The same with a block for these; `before` is what [`without`] says.
pub(super) fn with(before: Option<&str>, runtimes: &Runtimes) -> Result<String, (String, String)> {
    let Some(before) = before else {
        let (version, plugin) = PLUGINS[0];
        let tables = runtimes.tables(plugin);
        return Ok(format!(
            "{BEGIN}{WITH_FILE}\nversion = {version}\n{tables}{END}"
        ));
    };
    let migrate = "`containerd config migrate` writes one that is";
    let table: Table = before.parse().map_err(|error: toml::de::Error| {
        (
            format!("is no TOML: {}", error.message()),
            String::from("mend it"),
        )
    })?;
    let version = table
        .get("version")
        .and_then(Value::as_integer)
        .unwrap_or(1);
    let Some((_, plugin)) = PLUGINS.iter().find(|(known, _)| *known == version) else {
        let rule = format!("is of version {version}, not of 2 or 3");
        return Err((rule, migrate.to_owned()));
    };
    if let Some(handler) = runtimes
        .handlers
        .iter()
        .find(|name| has(&table, plugin, name))
    {
        let rule = format!("has a runtime '{handler}' that is not ours");
        return Err((rule, "rename one of them".to_owned()));
    }
    let (note, line_end) = match before.ends_with('\n') || before.is_empty() {
        true => ("", ""),
        false => (WITH_LINE_END, "\n"),
    };
    let tables = runtimes.tables(plugin);
    let after = format!("{before}{line_end}{BEGIN}{note}\n{tables}{END}");
    // Tables that are written in one line take no more.
    let read: Result<Table, _> = after.parse();
    let there = |table: &Table| {
        runtimes
            .handlers
            .iter()
            .all(|name| has(table, plugin, name))
    };
    if !read.is_ok_and(|table| there(&table)) {
        let rule = "has its runtimes in a form to which nothing can be added";
        let cure = "write them as tables of their own ([plugins...runtimes.runc])";
        return Err((rule.to_owned(), cure.to_owned()));
    }
    Ok(after)
}

fn runtimes<'a>(table: &'a Table, plugin: &str) -> Option<&'a Table> {
    let mut table = table.get("plugins")?.as_table()?.get(plugin)?.as_table()?;
    for name in ["containerd", "runtimes"] {
        table = table.get(name)?.as_table()?;
    }
    Some(table)
}

fn has(table: &Table, plugin: &str, handler: &str) -> bool {
    runtimes(table, plugin).is_some_and(|all| all.contains_key(handler))
}

/// The handlers for which there are runtimes of ours.
pub(super) fn handlers(text: &str) -> Vec<String> {
    let Ok(table) = text.parse::<Table>() else {
        return Vec::new();
    };
    let all = PLUGINS
        .iter()
        .filter_map(|(_, plugin)| runtimes(&table, plugin));
    let ours = |value: &Value| value.get("runtime_type").and_then(Value::as_str) == Some(RUNTIME);
    all.flatten()
        .filter(|(_, value)| ours(value))
        .map(|(name, _)| name.clone())
        .collect()
}

/// Whether the plugin for Kubernetes is switched off.
pub(super) fn cri_is_off(text: &str) -> bool {
    let table: Table = text.parse().unwrap_or_default();
    let off = table.get("disabled_plugins").and_then(Value::as_array);
    let names = off.into_iter().flatten().filter_map(Value::as_str);
    let cri = ["cri", PLUGINS[0].1, PLUGINS[1].1];
    names.into_iter().any(|name| cri.contains(&name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ours() -> Runtimes {
        Runtimes::of(&Config::default(), Path::new("/opt/s \"x\""), None)
    }

    #[test]
    fn a_block_is_added_once_and_taken_out_to_the_byte() {
        let debian = "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    \
                      [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n";
        let three = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n\
                     runtime_type = \"io.containerd.runc.v2\"";
        for before in [debian, three, "version = 2"] {
            let after = with(Some(before), &ours()).unwrap();
            assert!(after.starts_with(before), "{after}");
            assert_eq!(without(&after).unwrap().as_deref(), Some(before));
            let again = without(&after).unwrap();
            assert_eq!(with(again.as_deref(), &ours()).unwrap(), after);
            let mut found = handlers(&after);
            let mut expected = ours().handlers;
            found.sort();
            expected.sort();
            assert_eq!(found, expected);
        }
        let alone = with(None, &ours()).unwrap();
        assert_eq!(without(&alone).unwrap(), None);
        // What somebody has added since stays.
        let more = format!("{alone}[debug]\n");
        assert_eq!(without(&more).unwrap().as_deref(), Some("[debug]\n"));
        assert_eq!(without("x").unwrap().as_deref(), Some("x"));
    }

    #[test]
    fn each_runtime_says_which_handler_it_is() {
        let config = Path::new("/etc/p.toml");
        let runtimes = Runtimes::of(&Config::default(), Path::new("/s"), Some(config));
        let text = with(None, &runtimes).unwrap();
        for handler in runtimes.handlers() {
            let line = format!("ConfigPath = \"/etc/p.toml#{handler}\"");
            assert!(text.contains(&line), "{text}");
        }
        assert!(
            with(None, &ours())
                .unwrap()
                .contains("ConfigPath = \"#pericarp\"")
        );
    }

    #[test]
    fn what_cannot_be_added_to_is_left_as_it_is() {
        let inline = "version = 2\nplugins = {\"io.containerd.grpc.v1.cri\" = {containerd = {}}}\n";
        let taken = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]\n\
                     runtime_type = \"io.containerd.kata.v2\"\n";
        for (before, said) in [
            ("version = 1\n", "is of version 1"),
            ("[plugins]\n", "is of version 1"),
            ("version = ", "is no TOML"),
            (taken, "has a runtime 'kata' that is not ours"),
            (inline, "has its runtimes in a form"),
        ] {
            let (rule, cure) = with(Some(before), &ours()).unwrap_err();
            assert!(rule.starts_with(said), "{rule}");
            assert!(!cure.is_empty());
        }
        for broken in [
            "# pericarp: begin\n",
            "# pericarp: begin\n# pericarp: end\n# pericarp: begin",
        ] {
            without(broken).unwrap_err();
        }
    }

    #[test]
    fn a_node_without_kubernetes_is_known() {
        assert!(cri_is_off("disabled_plugins = [\"cri\"]"));
        assert!(!cri_is_off("disabled_plugins = [\"aufs\"]"));
        assert!(!cri_is_off("disabled_plugins = 5"));
    }

    proptest! {
        #[test]
        fn any_comment_around_it_is_kept(before in "(#[ a-z]*\n){0,3}(#[ a-z]*)?", after in "(#[ b-z]*\n){0,2}") {
            let before = format!("version = 2\n{before}");
            let changed = with(Some(&before), &ours()).unwrap() + &after;
            let left = without(&changed).unwrap().unwrap();
            prop_assert_eq!(left, before + &after);
        }
    }
}
