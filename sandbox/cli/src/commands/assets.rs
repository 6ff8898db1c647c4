//! `pericarp assets`: versions of what guests boot from, and which one new machines take.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use pericarp_config::Config;
use pericarp_node::assets::{Holder, Store, StoreError, Version, holders};
use pericarp_oci::digest::Digest;
use pericarp_pod::assets::place::STORE;
use serde_json::{Value, json};

use crate::{
    commands::{
        Refusal, columns, print,
        reader::{Given, Grammar},
        violations,
    },
    failure::Failure,
    input::problem::Problem,
};

const HELP: &str = "\
Keeps versions of what guests boot from: kernel, modules, agent and crun. A new machine takes the
version in use; one that runs keeps its own, which cannot be removed as long as it does.

Usage: pericarp assets list [OPTIONS]
       pericarp assets add [OPTIONS] DIR   copy what is in DIR, as `cargo xtask setup` makes it
       pericarp assets use [OPTIONS] NAME  have new machines take this version
       pericarp assets rm [OPTIONS] NAME   remove one that nobody uses

Options:
      --name NAME      add: what the version is called [the kernel's release and a digest]
      --digest DIGEST  add: refuse what does not have this digest, sha256:...
      --use            add: use it at once
      --check          list: read every file and compare it with its digest
      --store DIR      where versions are kept [/var/lib/pericarp/assets]
      --config FILE    rm: our configuration, whose profiles may name a version
                       [/etc/pericarp/config.toml, if it is there]
      --json           one JSON object
  -h, --help           show this text

A version's digest is that of its manifest.json, which has the digest of each file. A directory
that has one must be as it says.
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp assets",
    help: HELP,
    flags: &[(' ', "use"), (' ', "check"), (' ', "json")],
    options: &[
        (' ', "name", false),
        (' ', "digest", false),
        (' ', "store", false),
        (' ', "config", false),
    ],
    ends_at_operand: false,
};
/// Which action an option is for, where it is not for all.
const ONLY: [(&str, &str); 5] = [
    ("name", "add"),
    ("digest", "add"),
    ("use", "add"),
    ("check", "list"),
    ("config", "rm"),
];
/// Of a digest, in a table.
const SHOWN: usize = "sha256:".len() + 12;

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    let store = Store::at(Path::new(given.value("store").unwrap_or(STORE)));
    let words: Vec<&str> = given.operands.iter().map(String::as_str).collect();
    if let Some(action) = words.first() {
        let used = |option: &str| given.flag(option) || given.value(option).is_some();
        let odd = ONLY
            .iter()
            .filter(|(option, of)| used(option) && of != action)
            .map(|(option, of)| {
                let rule = format!("is for 'assets {of}' alone");
                Problem::new(&format!("--{option}"), None, rule, "leave it out")
            });
        let odd: Vec<Problem> = odd.collect();
        if !odd.is_empty() {
            return Err(Refusal::Input(odd));
        }
    }
    match words[..] {
        ["list"] => list(&given, &store),
        ["add", directory] => add(&given, &store, Path::new(directory)),
        ["use", name] => {
            let before = store.take(name).map_err(refusal)?;
            let version = store.version(name).map_err(refusal)?;
            say(&given, &version, "use", &json!({ "before": before }))
        }
        ["rm", name] => {
            store
                .remove(name, &named(given.value("config"))?)
                .map_err(refusal)?;
            match given.flag("json") {
                true => print(&(json!({ "removed": name }).to_string() + "\n"))?,
                false => print(&format!("{name}\n"))?,
            }
            Ok(0)
        }
        _ => Err(GRAMMAR.missing("ACTION", "is missing: list, add DIR, use NAME or rm NAME")),
    }
}

fn add(given: &Given, store: &Store, directory: &Path) -> Result<i32, Refusal> {
    let wanted = given.value("digest").map(|text| {
        text.parse::<Digest>()
            .map_err(|error| Problem::whole("--digest", &error.to_string()))
    });
    let added = store.add(directory, given.value("name"), wanted.transpose()?);
    let (mut version, new) = added.map_err(refusal)?;
    if given.flag("use") {
        store.take(&version.name).map_err(refusal)?;
        version = store.version(&version.name).map_err(refusal)?;
    }
    say(given, &version, "add", &json!({ "added": new }))
}

/// Says what holds of a version now: its name alone, or everything to a program.
fn say(given: &Given, version: &Version, action: &str, more: &Value) -> Result<i32, Refusal> {
    if !given.flag("json") {
        print(&format!("{}\n", version.name))?;
        return Ok(0);
    }
    let mut object = as_json(version);
    object["action"] = action.into();
    for (key, value) in more.as_object().into_iter().flatten() {
        object[key] = value.clone();
    }
    print(&format!("{object}\n"))?;
    Ok(0)
}

fn as_json(version: &Version) -> Value {
    json!({
        "name": version.name,
        "digest": version.digest,
        "bytes": version.bytes,
        "files": version.files,
        "kernel": version.kernel,
        "current": version.current,
    })
}

fn list(given: &Given, store: &Store) -> Result<i32, Refusal> {
    let mut damaged = false;
    let mut rows = Vec::new();
    let current = store.current();
    for (name, version) in store.list().map_err(refusal)? {
        let checked = match given.flag("check") && version.is_ok() {
            true => store.verify(&name),
            false => version,
        };
        let (version, problem) = match checked {
            Ok(version) => (Some(version), None),
            // What can be said of it is, all the same.
            Err(error) => (store.version(&name).ok(), Some(error.to_string())),
        };
        damaged |= problem.is_some();
        rows.push(Row {
            users: holders(&store.directory(&name)),
            current: current.as_ref() == Some(&name),
            name,
            version,
            problem,
        });
    }
    let text = match given.flag("json") {
        true => {
            let versions: Vec<Value> = rows.iter().map(row_as_json).collect();
            let root = store.root().display().to_string();
            json!({"store": root, "current": store.current(), "versions": versions}).to_string()
                + "\n"
        }
        false => table(&rows),
    };
    print(&text)?;
    Ok(i32::from(damaged))
}

struct Row {
    name: String,
    current: bool,
    /// None where its list of files is damaged.
    version: Option<Version>,
    users: Vec<Holder>,
    problem: Option<String>,
}

fn row_as_json(row: &Row) -> Value {
    let mut object = match &row.version {
        Some(version) => as_json(version),
        None => json!({"name": row.name, "current": row.current}),
    };
    let users = row
        .users
        .iter()
        .map(|user| json!({"pid": user.pid, "program": user.program, "pod": user.pod}));
    object["users"] = users.collect();
    object["problem"] = json!(row.problem);
    object
}

fn table(rows: &[Row]) -> String {
    let head = ["NAME", "KERNEL", "MIB", "DIGEST", "USED BY", "NEW PODS"].map(str::to_owned);
    let cells = rows.iter().map(|row| {
        let users: Vec<String> = row.users.iter().map(ToString::to_string).collect();
        let state = match (&row.problem, row.current) {
            (Some(problem), _) => problem.clone(),
            (None, true) => "take it".to_owned(),
            (None, false) => String::new(),
        };
        let of = |say: fn(&Version) -> String| row.version.as_ref().map(say).unwrap_or_default();
        [
            row.name.escape_debug().to_string(),
            of(|version| version.kernel.clone().unwrap_or_default()),
            of(|version| version.bytes.div_ceil(1 << 20).to_string()),
            of(|version| version.digest.chars().take(SHOWN).collect()),
            users.join(", "),
            state,
        ]
    });
    let all: Vec<[String; 6]> = std::iter::once(head).chain(cells).collect();
    columns(&all)
}

/// The directories that profiles name.
fn named(config: Option<&str>) -> Result<Vec<(String, PathBuf)>, Refusal> {
    let config = Config::load(config.map(Path::new)).map_err(violations)?;
    let of = |profile: &pericarp_config::Profile| {
        let assets = profile.settings().assets.clone()?;
        Some((profile.name().to_owned(), assets))
    };
    Ok(config.profiles().filter_map(of).collect())
}

/// What cannot be is bad input, all else is a failure.
fn refusal(error: StoreError) -> Refusal {
    match error {
        StoreError::Refused { value, rule, cure } => {
            Problem::new("assets", value, rule, cure).into()
        }
        StoreError::System { .. } => Failure::Node(error.to_string()).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_who_uses_what() {
        let version = Version {
            name: "1".into(),
            digest: format!("sha256:{}", "ab".repeat(32)),
            bytes: 15 << 20,
            files: 6,
            kernel: Some("6.12.1".into()),
            current: true,
        };
        let user = Holder {
            pid: 7,
            program: "containerd-shim-pericarp-v2".into(),
            pod: Some("default/web".into()),
        };
        assert_eq!(
            table(&[
                Row {
                    name: "1".into(),
                    current: true,
                    version: Some(version),
                    users: vec![user],
                    problem: None,
                },
                Row {
                    name: "2".into(),
                    current: false,
                    version: None,
                    users: Vec::new(),
                    problem: Some("'2' has no list".into()),
                },
            ]),
            "NAME  KERNEL  MIB  DIGEST               USED BY              NEW PODS\n\
             1     6.12.1  15   sha256:abababababab  the pod default/web  take it\n\
             2                                                            '2' has no list\n"
        );
    }
}
