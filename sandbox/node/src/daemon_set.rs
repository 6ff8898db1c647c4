//! What a cluster is told so that its nodes prepare themselves: a DaemonSet whose pods install what an
//! image brings along (`install`) and have containerd know it, and the recipe of such an image.
//!
//! Text, with the reasons beside what they are for: whoever applies it gives a pod a node's rights, and
//! is to see why.

use std::fmt;

use crate::install::{PREFIX, PROGRAMS};

/// The namespace, and the beginning of names in it.
const NAME: &str = "pericarp";
/// Where the pod has the node's file system.
const HOST: &str = "/host";
/// There once the node is prepared.
const READY: &str = "/run/pericarp-ready";
/// The unit that is restarted unless another is named.
pub const UNIT: &str = "containerd";
const LONGEST_LABEL: usize = 63;
const LONGEST_PREFIX: usize = 253;

/// The label of nodes that are to have machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector {
    key: String,
    value: String,
}

impl Default for Selector {
    fn default() -> Self {
        Self {
            key: "io.pericarp/node".to_owned(),
            value: "true".to_owned(),
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.key, self.value)
    }
}

impl Selector {
    /// Reads `KEY=VALUE`. None if Kubernetes would not take it for a label.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (key, value) = text.split_once('=')?;
        let (prefix, name) = key.rsplit_once('/').unwrap_or(("", key));
        let prefix_is_one = prefix.is_empty() && !key.contains('/')
            || prefix.len() <= LONGEST_PREFIX && prefix.split('.').all(is_domain_part);
        let is_label = prefix_is_one && is_word(name) && (value.is_empty() || is_word(value));
        is_label.then(|| Self {
            key: key.to_owned(),
            value: value.to_owned(),
        })
    }

    /// As lines of YAML.
    pub(crate) fn line(&self, indent: usize) -> String {
        let value = quoted(&self.value);
        format!("{:indent$}{}: {value}\n", "", self.key)
    }
}

fn is_word(text: &str) -> bool {
    let ends = |c: char| c.is_ascii_alphanumeric();
    let inside = |c: char| ends(c) || "-_.".contains(c);
    text.len() <= LONGEST_LABEL
        && text.starts_with(ends)
        && text.ends_with(ends)
        && text.chars().all(inside)
}

fn is_domain_part(text: &str) -> bool {
    let ends = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.starts_with(ends) && text.ends_with(ends) && text.chars().all(|c| ends(c) || c == '-')
}

/// Whether this may be the name of an image.
#[must_use]
pub fn is_image(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/:@+".contains(c);
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(allowed)
        && text.len() <= 512
}

/// Whether this may be the name of a systemd unit.
#[must_use]
pub fn is_unit(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-:@\\".contains(c);
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(allowed)
        && text.len() <= 255
}

/// A JSON string is one of YAML, too.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A namespace and the DaemonSet in it, as one YAML stream. `unit` is what runs containerd.
#[must_use]
pub fn daemon_set(image: &str, selector: &Selector, unit: &str) -> String {
    let command = |action: &str, more: &[String], indent: usize| -> String {
        let program = format!("{PREFIX}/bin/pericarp");
        let words = [program, "node".to_owned(), action.to_owned()];
        let own = [format!("--host={HOST}"), format!("--restart={unit}")];
        words
            .iter()
            .chain(&own)
            .chain(more)
            .map(|word| format!("{:indent$}- {}\n", "", quoted(word)))
            .collect()
    };
    let more = [format!("--ready-file={READY}"), "--wait".to_owned()];
    format!(
        r#"---
apiVersion: v1
kind: Namespace
metadata:
  name: {NAME}
  labels:
    app.kubernetes.io/part-of: {NAME}
    # For the DaemonSet below, which says why.
    pod-security.kubernetes.io/enforce: privileged
---
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: {NAME}-node
  namespace: {NAME}
  labels:
    app.kubernetes.io/name: {NAME}-node
    app.kubernetes.io/part-of: {NAME}
spec:
  selector:
    matchLabels:
      app.kubernetes.io/name: {NAME}-node
  updateStrategy:
    type: RollingUpdate
    rollingUpdate:
      maxUnavailable: 1
  template:
    metadata:
      labels:
        app.kubernetes.io/name: {NAME}-node
        app.kubernetes.io/part-of: {NAME}
    spec:
      # kubectl label node NAME {selector}
      nodeSelector:
        kubernetes.io/os: linux
        kubernetes.io/arch: amd64
{selector_line}      # Nodes are chosen by their label, whatever keeps other pods away from them.
      tolerations:
        - operator: Exists
      priorityClassName: system-node-critical
      # It asks the API server for nothing.
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 60
      containers:
        - name: install
          image: {image}
          # Copies programs and guest files to the node, has containerd know the handlers, waits.
          command:
{install}          # containerd forgets the handlers. Programs and guest files stay for pods that run.
          lifecycle:
            preStop:
              exec:
                command:
{uninstall}          readinessProbe:
            exec:
              command: ["test", "-e", "{READY}"]
            periodSeconds: 5
          # A node's rights, since that is what it is about: it changes the node's programs and
          # containerd's configuration, opens /dev/kvm to see what the node can do, and has
          # systemd restart containerd. Whoever may do that is root there; a shorter list of
          # rights would be no wall. It needs neither the node's network nor its processes.
          securityContext:
            privileged: true
            runAsUser: 0
          resources:
            requests:
              cpu: 10m
              memory: 32Mi
          volumeMounts:
            - name: host
              mountPath: {HOST}
              mountPropagation: HostToContainer
      volumes:
        # {PREFIX}, /var/lib/pericarp and /etc/containerd are written; the rest is for the
        # node's own programs, which are run with this as their root.
        - name: host
          hostPath:
            path: /
            type: Directory
"#,
        image = quoted(image),
        selector_line = selector.line(8),
        install = command("install", &more, 12),
        uninstall = command("uninstall", &[], 18),
    )
}

/// How an image that [`daemon_set`] can name is made, for `docker build` and its like, out of a build
/// directory. Programs run on the node, whose C library must not be older than the builder's.
#[must_use]
pub fn image_recipe() -> String {
    let programs: String = PROGRAMS
        .iter()
        .map(|name| format!("    release/{name} \\\n"))
        .collect();
    format!(
        "# What `pericarp node manifests --daemon-set IMAGE` installs on a node.\n\
         #\n\
         #   cargo build --release --workspace --bins && cargo xtask setup\n\
         #   target/release/pericarp node manifests --image-recipe | docker build -t IMAGE -f - target\n\
         #\n\
         # The programs run on the nodes, and need a C library there that is not older than the\n\
         # builder's. In the image itself they only copy themselves.\n\
         FROM debian:12-slim\n\
         COPY {} {PREFIX}/bin/\n\
         COPY assets/pericarp-agent {PREFIX}/assets/\n\
         COPY assets/guest {PREFIX}/assets/guest/\n\
         COPY assets/kernel {PREFIX}/assets/kernel/\n\
         ENTRYPOINT [\"{PREFIX}/bin/pericarp\"]\n",
        programs
            .trim_start()
            .trim_end_matches("\\\n")
            .trim_end()
            .to_owned()
            + " \\\n   ",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_images_and_units_are_what_kubernetes_and_systemd_take() {
        for good in ["io.pericarp/node=true", "a=", "a.b/c_d=1.0", "pool=x-1"] {
            let read = Selector::parse(good).unwrap();
            assert_eq!(read.to_string(), good);
        }
        for bad in [
            "a", "=b", "a b=c", "/a=b", "A.b/c=d", "a/b/c=d", "a=-b", "a=b\n", "-a=b",
        ] {
            assert_eq!(Selector::parse(bad), None, "{bad:?}");
        }
        assert!(is_image("registry:5000/a/b@sha256:00") && is_image("a:1"));
        assert!(!is_image("a b") && !is_image("-a") && !is_image("a\"b") && !is_image(""));
        assert!(is_unit("k3s.service") && !is_unit("-x") && !is_unit("a b"));
    }

    #[test]
    fn what_is_mounted_is_what_is_worked_on() {
        let selector = Selector::default();
        let text = daemon_set("here/node:1", &selector, "containerd");
        let count = |part: &str| text.matches(part).count();
        // The command and the hook work on the place where the node's root is mounted.
        assert_eq!(count("- \"--host=/host\"\n"), 2);
        assert_eq!(count("mountPath: /host\n"), 1);
        assert_eq!(count("- name: host\n"), 2);
        assert_eq!(count("            path: /\n"), 1);
        assert_eq!(count("- \"--ready-file=/run/pericarp-ready\"\n"), 1);
        assert_eq!(count("\"/run/pericarp-ready\"]\n"), 1);
        assert_eq!(count("image: \"here/node:1\"\n"), 1);
        assert_eq!(count("        io.pericarp/node: \"true\"\n"), 1);
        assert_eq!(count("      app.kubernetes.io/name: pericarp-node\n"), 2);
        assert_eq!(count("- \"--restart=containerd\"\n"), 2);
        // Each line but comments and text in brackets is a key, or an entry of a list.
        for line in text.lines().map(str::trim_start) {
            let known = line == "---" || line.starts_with(['#', '-']) || line.contains(':');
            assert!(known && !line.contains('\t'), "{line}");
        }
    }

    #[test]
    fn an_image_has_all_programs_where_the_daemon_set_calls_them() {
        let text = image_recipe();
        for program in PROGRAMS {
            assert!(text.contains(&format!("release/{program} \\\n")), "{text}");
        }
        assert!(text.contains("    /opt/pericarp/bin/\n"), "{text}");
        assert!(text.contains("ENTRYPOINT [\"/opt/pericarp/bin/pericarp\"]\n"));
        assert!(!text.contains("\\\n\\") && !text.contains("\n\n"), "{text}");
    }
}
