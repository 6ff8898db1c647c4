//! Who is let in, and that an authority stays.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let name = format!("pericarp-pki-{name}-{}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }

    fn open(&self) -> Certificates {
        let address = "127.0.0.1".parse().unwrap();
        Certificates::open(&self.0, "test", address, "node.example").unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn an_authority_stays_and_its_key_is_roots_alone() {
    let place = Place::new("stays");
    assert!(matches!(
        kubeconfig(&place.0, "test", "127.0.0.1:6443").unwrap(),
        Kubeconfig::NeverServed
    ));
    let first = place.open();
    assert!(first.names.contains(&"node.example".to_owned()));
    let mode = |path: &str| {
        let path = place.0.join(path);
        path.metadata().unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode("ca.key"), 0o600);
    assert_eq!(mode(""), 0o700);
    let second = place.open();
    assert_eq!(first.authority.certificate, second.authority.certificate);
    assert!(second.server().is_ok());
    let Kubeconfig::Text(text) = kubeconfig(&place.0, "test", "127.0.0.1:6443").unwrap() else {
        panic!("it was served");
    };
    assert!(text.contains("server: https://127.0.0.1:6443\n"));
    assert!(text.contains("client-key-data: "));
}

#[test]
fn an_authority_that_ends_soon_is_renewed() {
    let place = Place::new("renewed");
    let first = place.open();
    let kept = keeping::read(&place.0).unwrap().unwrap();
    let soon = keeping::Kept {
        until: SystemTime::now() + DAY,
        ..kept
    };
    keeping::write(&place.0, &soon).unwrap();
    let second = place.open();
    assert_ne!(first.authority.certificate, second.authority.certificate);
}

#[test]
fn a_file_that_is_not_ours_is_named() {
    let place = Place::new("garbled");
    place.open();
    std::fs::write(place.0.join("ca.crt"), "hello").unwrap();
    let address = "127.0.0.1".parse().unwrap();
    let error = Certificates::open(&place.0, "test", address, "n").unwrap_err();
    assert!(
        error.to_string().contains("ca.crt: is cut short"),
        "{error}"
    );
}
