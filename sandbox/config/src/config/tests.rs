//! Files, how they add up, and what is refused.

use super::*;
use crate::{sizing::Policy, testing::Directory};

/// Loads one text as a file.
pub(crate) fn load(text: &str) -> Result<Config, String> {
    load_all(&[("config.toml", text)])
}

/// Loads `config.toml`, with others beside it.
pub(crate) fn load_all(files: &[(&str, &str)]) -> Result<Config, String> {
    let thread = std::thread::current()
        .name()
        .unwrap_or("x")
        .replace("::", "-");
    let directory = Directory::new(&format!("load-{thread}"));
    for (name, text) in files {
        directory.write(name, text);
    }
    Config::load(Some(&directory.path("config.toml")))
        .map_err(|violations| directory.without_name(&violations.to_string()))
}

#[test]
fn without_a_file_pods_run_as_pericarp_run_has_it() {
    let config = Config::default();
    let handlers: Vec<_> = config.handlers().map(|(name, _)| name).collect();
    assert_eq!(
        handlers,
        [
            "pericarp",
            "kata-mshv-vm-isolation",
            "kata-vm-isolation",
            "kata"
        ]
    );
    let settings = config.profile("kata").unwrap().settings();
    assert_eq!(*settings, Settings::default());
    assert_eq!(settings.sizing, Policy::AksPreview);
    assert_eq!(settings.hypervisor, pericarp_hypervisor::Wanted::Auto);
    assert_eq!(settings.share_cache.name(), "auto");
    assert_eq!(config.state_directory(), Path::new("/var/lib/pericarp"));
    // An empty file says the same.
    let empty = load("").unwrap();
    let names: Vec<_> = empty.handlers().map(|(name, _)| name).collect();
    assert_eq!(names, handlers);
}

#[test]
fn a_full_file_is_read() {
    let config = load(
        r#"
features = ["cpu-pinning"]
state-directory = "/srv/state"

[profiles.pericarp]
hypervisor = "qemu-kvm"
assets = "/opt/assets"
boot-timeout = 2.5
max-vcpus = 16
max-memory = "64G"
share-cache = "never"
volume-iops = 5_000
volume-bandwidth = 104857600
cpus = "2-7"
annotations = ["vcpus", "cpus"]

[profiles.small]
sizing = "kata"
cpu-requests = "counted"
aliases = ["kata"]
"#,
    )
    .unwrap();
    let profile = config.profile("pericarp").unwrap();
    let settings = profile.settings();
    assert_eq!(settings.assets.as_deref(), Some(Path::new("/opt/assets")));
    assert_eq!(settings.boot_timeout.unwrap().as_millis(), 2500);
    assert_eq!(settings.max_vcpus, Some(16));
    assert_eq!(settings.max_memory, Some(64 << 30));
    assert_eq!(settings.volume_iops, Some(5000));
    assert_eq!(settings.volume_bandwidth, Some(100 << 20));
    let allowed: Vec<_> = profile.annotations().iter().map(|key| key.name()).collect();
    assert_eq!(allowed, ["cpus", "vcpus"]);
    // An alias that another profile has is not the default one's.
    assert_eq!(config.profile("kata").unwrap().name(), "small");
    assert_eq!(
        config.profile("kata-vm-isolation").unwrap().name(),
        "pericarp"
    );
    assert_eq!(
        config.profile("kata").unwrap().settings().cpu_requests,
        CpuRequests::Counted
    );
    assert_eq!(config.state_directory(), Path::new("/srv/state"));
    // The article's own mistake (its text swaps two letters of the name).
    let typo = config.profile("kata-mhsv-vm-isolation").unwrap_err();
    assert_eq!(
        typo.to_string(),
        "'kata-mhsv-vm-isolation': unknown handler; did you mean 'kata-mshv-vm-isolation'?"
    );
}

#[test]
fn a_profile_may_have_the_name_of_a_usual_alias() {
    let config = load("[profiles.kata-vm-isolation]\nsizing = \"aks-ga\"\n").unwrap();
    let profile = config.profile("kata-vm-isolation").unwrap();
    assert_eq!(profile.settings().sizing, Policy::AksGa);
    assert_eq!(config.profile("pericarp").unwrap().aliases().len(), 2);
    // An empty table is a profile, too.
    let config = load("[profiles.large]\n").unwrap();
    assert_eq!(config.profile("large").unwrap().name(), "large");
    let config = load("[profiles.pericarp]\naliases = []\n").unwrap();
    assert_eq!(config.handlers().count(), 1);
}

#[test]
fn later_files_replace_single_keys() {
    let config = load_all(&[
        (
            "config.toml",
            "[profiles.pericarp]\nmax-vcpus = 1\nsizing = \"kata\"\n",
        ),
        (
            "config.toml.d/20-b.toml",
            "[profiles.pericarp]\nmax-vcpus = 3\n",
        ),
        (
            "config.toml.d/10-a.toml",
            "[profiles.pericarp]\n\nmax-vcpus = 2\nshare-cache = \"never\"\n",
        ),
        ("config.toml.d/30-c.toml~", "nonsense"),
        ("config.toml.d/.30-d.toml", "nonsense"),
    ])
    .unwrap();
    let profile = config.profile("pericarp").unwrap();
    let settings = profile.settings();
    assert_eq!(settings.max_vcpus, Some(3));
    assert_eq!(
        (settings.sizing, settings.share_cache.name()),
        (Policy::Kata, "never")
    );
    let names: Vec<_> = config
        .files()
        .iter()
        .map(|path| path.file_name().unwrap())
        .collect();
    assert_eq!(names, ["config.toml", "10-a.toml", "20-b.toml"]);
    let place = &profile.places["share-cache"];
    assert!(
        place.to_string().ends_with("config.toml.d/10-a.toml:4"),
        "{place}"
    );
}

#[test]
fn everything_wrong_in_any_file_is_reported_with_its_line() {
    let refused = load_all(&[
        (
            "config.toml",
            "sizing = \"kata\"\n\
             state-directory = \"var\"\n\
             feature = []\n\
             [profiles.pericarp]\n\
             sizing = \"aks-prevew\"\n\
             max-vcpus = 0\n\
             max-memory = 1.5\n\
             boot-timeout = \"20\"\n\
             vcpus = 2\n\
             hypervisr = \"auto\"\n\
             features = []\n\
             annotations = [\"vcpus\", \"sizeing\", \"vcpus\"]\n\
             [profiles.Large]\n",
        ),
        (
            "config.toml.d/1.toml",
            "[profiles.small]\naliases = [\"-\"]\nvolume-iops = 0x10\ncpus = true\n",
        ),
        ("config.toml.d/2.toml", "[profiles.small\n"),
    ])
    .unwrap_err();
    let expected = [
        "config.toml:1: 'sizing': unknown key; it belongs into a profile, such as \
         [profiles.pericarp]",
        "config.toml:2: state-directory 'var': is not an absolute path; begin it with '/'",
        "config.toml:3: 'feature': unknown key; did you mean 'features'?",
        "config.toml:5: profiles.pericarp.sizing 'aks-prevew': is none of its values; did you mean \
         'aks-preview'?",
        "config.toml:6: profiles.pericarp.max-vcpus '0': is out of range; write a whole number \
         from 1 to 255",
        "config.toml:7: profiles.pericarp.max-memory '1.5': is out of range; write a number and a \
         unit, such as 512M or 1.5G, from 128 MiB to 1024 TiB",
        "config.toml:8: profiles.pericarp.boot-timeout '20': is a string; write a number, without \
         quotes",
        "config.toml:9: 'profiles.pericarp.vcpus': unknown key; a pod says it, by the annotation \
         io.pericarp/vcpus",
        "config.toml:10: 'profiles.pericarp.hypervisr': unknown key; did you mean 'hypervisor'?",
        "config.toml:11: 'profiles.pericarp.features': unknown key; it belongs to the top of the \
         file, before any table",
        "config.toml:12: profiles.pericarp.annotations 'sizeing': is unknown; did you mean \
         'sizing'?",
        "config.toml:12: profiles.pericarp.annotations 'vcpus': is given twice; leave one out",
        "config.toml:13: profiles 'Large': is no name of a handler; use lower-case letters, digits \
         and '-' inside, at most 63 characters",
        "config.toml.d/1.toml:2: profiles.small.aliases '-': is no name of a handler; use \
         lower-case letters, digits and '-' inside, at most 63 characters",
        "config.toml.d/1.toml:3: profiles.small.volume-iops 'a number that is not decimal': is of \
         another type; write a whole number, without quotes",
        "config.toml.d/1.toml:4: profiles.small.cpus 'true or false': is of another type; write a \
         string such as \"0-3,8\"",
    ];
    for line in expected {
        assert!(
            refused.lines().any(|l| l == line),
            "{line}\nis not in\n{refused}"
        );
    }
    assert_eq!(refused.lines().count(), expected.len() + 1, "{refused}");
    let last = refused.lines().last().unwrap();
    assert!(
        last.starts_with("config.toml.d/2.toml:1: is not TOML: "),
        "{last}"
    );
}

#[test]
fn what_no_key_alone_breaks_is_refused() {
    let refused = load(
        "[profiles.pericarp]\n\
         cpus = \"1\"\n\
         annotations = [\"kernel-parameters\"]\n\
         aliases = [\"a\", \"b\", \"pericarp\"]\n\
         cpu-requests = \"counted\"\n\
         max-memory = \"1G\"\n\
         [profiles.b]\n\
         aliases = [\"a\"]\n\
         sizing = \"kata\"\n\
         max-memory = \"1G\"\n",
    )
    .unwrap_err();
    let feature = |name: &str| {
        format!(
            "is experimental, and the feature '{name}' is not asked for; add '{name}' to \
             'features', or leave the key out"
        )
    };
    let lines: Vec<&str> = refused.lines().collect();
    assert_eq!(
        lines,
        [
            "config.toml:8: profiles.b.aliases 'a': is an alias of the profile 'pericarp', too; \
             leave it out of one of them",
            &format!(
                "config.toml:2: profiles.pericarp.cpus '1': {}",
                feature("cpu-pinning")
            ),
            &format!(
                "config.toml:3: profiles.pericarp.annotations 'kernel-parameters': {}",
                feature("kernel-parameters")
            ),
            "config.toml:4: profiles.pericarp.aliases 'a': is an alias of the profile 'b', too; \
             leave it out of one of them",
            "config.toml:4: profiles.pericarp.aliases 'b': is the name of a profile; leave it out",
            "config.toml:4: profiles.pericarp.aliases 'pericarp': is the name of a profile; leave \
             it out",
            "config.toml:5: profiles.pericarp.cpu-requests 'counted': has no meaning under the \
             policy 'aks-preview'; leave it out, or set 'sizing' to kata",
            "config.toml:6: profiles.pericarp.max-memory '1 GiB': is less than the 2 GiB of the \
             smallest machine under the policy 'aks-preview'; raise it, or set 'sizing' to another \
             policy",
        ]
    );
}

#[test]
fn files_that_are_none_are_refused() {
    let directory = Directory::new("config-none");
    let path = directory.path("config.toml");
    let refused = |path: &Path| {
        let violations = Config::load(Some(path)).unwrap_err();
        directory.without_name(&violations.to_string())
    };
    assert_eq!(
        refused(&path),
        "'config.toml': does not exist; check the path, or leave it out for the built-in \
         configuration"
    );
    fs::write(&path, [0xff]).unwrap();
    assert_eq!(
        refused(&path),
        "'config.toml': is not valid UTF-8; mend or remove it"
    );
    fs::write(&path, " ".repeat((1 << 20) + 1)).unwrap();
    assert_eq!(
        refused(&path),
        "'config.toml': is larger than 1048576 bytes; is it a configuration?"
    );
    fs::write(&path, "").unwrap();
    directory.write("config.toml.d/x.toml/y", "");
    let line = refused(&path);
    assert!(
        line.starts_with("'config.toml.d/x.toml': cannot be read ("),
        "{line}"
    );
    fs::remove_dir_all(directory.path("config.toml.d")).unwrap();
    directory.write("config.toml.d", "");
    let line = refused(&path);
    assert!(
        line.starts_with("'config.toml.d': cannot be read ("),
        "{line}"
    );
}

#[test]
fn a_config_path_names_a_file_and_a_handler() {
    let parsed = |path: Option<&str>, handler: &str| ConfigPath {
        path: path.map(PathBuf::from),
        handler: handler.into(),
    };
    for (text, expected) in [
        ("", parsed(None, "pericarp")),
        ("#kata", parsed(None, "kata")),
        ("/etc/x.toml", parsed(Some("/etc/x.toml"), "pericarp")),
        ("/etc/x.toml#small", parsed(Some("/etc/x.toml"), "small")),
        (
            "/etc/a#b.toml#small",
            parsed(Some("/etc/a#b.toml"), "small"),
        ),
    ] {
        assert_eq!(ConfigPath::parse(text), Ok(expected), "{text}");
    }
    for text in ["x.toml", "/etc/x.toml#", "/etc/x.toml#A b", "/etc/a#b.toml"] {
        assert!(ConfigPath::parse(text).is_err(), "{text}");
    }
}
