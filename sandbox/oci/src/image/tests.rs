//! Tests of opening: both forms, the choice of a manifest, and everything that can be wrong.

use serde_json::{Value, json};

use super::*;
use crate::testing::{Builder, Dir, entry};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn small() -> Builder {
    let mut builder = Builder::new().layer(&[entry::file("a", "1")]);
    builder.config = json!({"Cmd": ["sh"], "Env": ["A=1"]});
    builder
}

fn at(path: &Path, name: Option<&str>) -> Location {
    Location {
        path: path.to_owned(),
        name: name.map(str::to_owned),
    }
}

fn failure(builder: &Builder) -> ImageError {
    builder.open(&Dir::new("image")).unwrap_err()
}

#[test]
fn both_forms_give_the_same_image() {
    let dir = Dir::new("image");
    let builder = small().whole();
    builder.write_layout(&dir.path().join("layout"));
    let one = Image::open(&at(&dir.path().join("layout"), None)).unwrap();
    let other = builder.open(&dir).unwrap();
    assert_eq!(one.digest(), other.digest());
    assert_eq!(one.defaults(), other.defaults());
    assert_eq!(one.defaults().cmd, ["sh"]);
    assert_eq!(one.layers().len(), 1);
    assert_eq!(one.stored_bytes(), 2048);
}

#[test]
fn a_name_ends_the_path_at_the_first_colon_that_can_be() {
    let dir = Dir::new("location");
    let path = dir.path().join("a:b.tar");
    std::fs::write(&path, "").unwrap();
    let text = path.to_str().unwrap();
    assert_eq!(Location::parse(text), at(&path, None));
    let named = Location::parse(&format!("{text}:docker.io/x/y:1"));
    assert_eq!(named, at(&path, Some("docker.io/x/y:1")));
    assert_eq!(
        Location::parse("/nonexistent:x"),
        at(Path::new("/nonexistent:x"), None)
    );
}

#[test]
fn of_several_images_one_has_to_be_named() {
    let dir = Dir::new("several");
    let mut builder = small();
    let mut first = builder.manifest();
    first["annotations"] = json!({"org.opencontainers.image.ref.name": "one"});
    builder.config = json!({"Cmd": ["other"]});
    let mut second = builder.manifest();
    second["annotations"] = json!({
        "io.containerd.image.name": "docker.io/two:latest",
        "org.opencontainers.image.ref.name": "latest",
    });
    builder.index(&json!([first, second]));
    let error = builder.open(&dir).unwrap_err().to_string();
    assert!(
        error.contains("several images: one, docker.io/two:latest; say which"),
        "{error}"
    );
    let path = dir.path().join("image.tar");
    let digest = first["digest"].as_str().unwrap().to_owned();
    for (name, cmd) in [
        ("one", "sh"),
        ("docker.io/two:latest", "other"),
        ("latest", "other"),
        (&digest, "sh"),
    ] {
        let image = Image::open(&at(&path, Some(name))).unwrap();
        assert_eq!(image.defaults().cmd, [cmd], "{name}");
    }
    let error = Image::open(&at(&path, Some("three")))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no image 'three'; it holds: one, docker"),
        "{error}"
    );
}

#[test]
fn the_platform_is_found_in_nested_indexes() {
    let mut builder = small();
    let manifest = builder.manifest();
    let with = |os: &str, architecture: &str, variant: Option<&str>| {
        let mut manifest = manifest.clone();
        manifest["platform"] = json!({"os": os, "architecture": architecture, "variant": variant});
        manifest
    };
    let mut arm = with("linux", "arm64", Some("v8"));
    arm["digest"] = json!(Digest::of(b"not here").to_string());
    let mut fast = with("linux", "amd64", Some("v3"));
    fast["digest"] = json!(Digest::of(b"not here either").to_string());
    let mut record = with("unknown", "unknown", None);
    record["digest"] = json!(Digest::of(b"a build record").to_string());
    let list = json!({"manifests": [arm, record, fast, with("linux", "amd64", None)]});
    let index = builder.descriptor(INDEX, &list);
    builder.index(&json!([index]));
    let dir = Dir::new("platform");
    let image = builder.open(&dir).unwrap();
    assert_eq!(
        Some(&image.digest().to_string()[..]),
        manifest["digest"].as_str()
    );

    let list = json!({"manifests": [arm, record]});
    let index = builder.descriptor(INDEX, &list);
    builder.index(&json!([index]));
    let error = failure(&builder).to_string();
    assert!(
        error.starts_with("the image is for linux/arm64/v8; only linux/amd64"),
        "{error}"
    );
}

#[test]
fn indexes_do_not_nest_without_end() {
    let mut builder = small();
    let mut inner = builder.manifest();
    for _ in 0..8 {
        inner = builder.descriptor(INDEX, &json!({"manifests": [inner]}));
    }
    builder.index(&json!([inner]));
    assert!(matches!(failure(&builder), ImageError::TooMany { .. }));
}

#[test]
fn what_is_no_image_says_what_it_is() {
    let dir = Dir::new("no-image");
    let open = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        Image::open(&at(&path, None)).unwrap_err()
    };
    let whole = small().whole();
    assert!(matches!(
        open("text", b"hello"),
        ImageError::NotAnImage { .. }
    ));
    assert!(matches!(open("empty", b""), ImageError::NotAnImage { .. }));
    let gzip = crate::testing::compress("gzip", &whole.archive());
    let error = open("x.tar.gz", &gzip).to_string();
    assert!(error.contains("compressed with gzip as a whole"), "{error}");
    let cut = whole.archive();
    let error = open("cut", &cut[..cut.len() - 2000]);
    assert!(matches!(error, ImageError::Archive { .. }), "{error}");
    let other = crate::testing::tar_of(&[entry::file("etc/passwd", "x")]);
    assert!(matches!(
        open("other.tar", &other),
        ImageError::NotAnImage { .. }
    ));
    let docker = crate::testing::tar_of(&[entry::file("manifest.json", "[]")]);
    let error = open("docker.tar", &docker).to_string();
    assert!(error.contains("skopeo copy docker-archive:"), "{error}");
    let missing = Image::open(&at(&dir.path().join("missing"), None)).unwrap_err();
    assert!(matches!(missing, ImageError::Read { .. }));
    let error = Image::open(&at(dir.path(), None)).unwrap_err().to_string();
    assert!(
        error.contains("a directory without an index.json"),
        "{error}"
    );
    let error = Image::open(&at(Path::new("/dev/null"), None)).unwrap_err();
    assert!(matches!(error, ImageError::Read { .. }), "{error}");
}

type Break<'a> = &'a dyn Fn(&mut Builder);

/// One thing wrong at a time.
#[test]
fn every_broken_part_has_its_message() {
    let manifest_of = |builder: &mut Builder, change: &dyn Fn(&mut Value)| {
        let descriptor = builder.manifest();
        let digest: Digest = descriptor["digest"].as_str().unwrap().parse().unwrap();
        let bytes = builder
            .files
            .remove(&format!("blobs/sha256/{}", digest.hex()));
        let mut document: Value = serde_json::from_slice(&bytes.unwrap()).unwrap();
        change(&mut document);
        let changed = builder.descriptor(descriptor["mediaType"].as_str().unwrap(), &document);
        builder.index(&json!([changed]));
    };
    let cases: &[(&str, Break<'_>)] = &[
        ("the image has no file oci-layout", &|it| {
            drop(it.files.remove("oci-layout"))
        }),
        ("oci-layout says version '2.0.0'", &|it| {
            it.file("oci-layout", r#"{"imageLayoutVersion": "2.0.0"}"#);
        }),
        ("file index.json is not what", &|it| {
            it.file("index.json", "{")
        }),
        ("at most 4194304 are read", &|it| {
            it.file("index.json", &" ".repeat(5 << 20))
        }),
        ("has no manifest in its index", &|it| it.index(&json!([]))),
        ("has no manifest sha256:", &|it| {
            let digest = Digest::of(b"nowhere").to_string();
            it.index(&json!([{"mediaType": INDEX.replace("index", "manifest"), "digest": digest, "size": 7}]));
        }),
        ("media type 'text/plain'; manifests and indexes", &|it| {
            let descriptor = it.descriptor("text/plain", &json!({}));
            it.index(&json!([descriptor]));
        }),
        ("is not of the form sha256:", &|it| {
            it.index(&json!([{"mediaType": INDEX, "digest": "sha512:00", "size": 7}]));
        }),
        (
            "media type 'application/x'; it is no container image",
            &|it| {
                manifest_of(it, &|it| it["config"]["mediaType"] = json!("application/x"));
            },
        ),
        (
            "is read as tar, tar+gzip and tar+zstd".trim_start_matches("is "),
            &|it| {
                manifest_of(it, &|it| {
                    it["layers"][0]["mediaType"] =
                        json!("application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
                });
            },
        ),
        ("manifest has 2 layers and its configuration 1", &|it| {
            manifest_of(it, &|it| {
                let layer = it["layers"][0].clone();
                it["layers"] = json!([layer, layer]);
            });
        }),
        ("has no layer sha256:", &|it| {
            manifest_of(it, &|it| {
                it["layers"][0]["digest"] = json!(Digest::of(b"x").to_string())
            });
        }),
        ("has 2048 bytes and not 9", &|it| {
            manifest_of(it, &|it| it["layers"][0]["size"] = json!(9));
        }),
        ("the image is for linux/s390x; only", &|it| {
            it.platform = json!({"os": "linux", "architecture": "s390x"});
            let manifest = it.manifest();
            it.index(&json!([manifest]));
        }),
        ("manifest sha256:", &|it| {
            let descriptor = it.manifest();
            let digest: Digest = descriptor["digest"].as_str().unwrap().parse().unwrap();
            let name = format!("blobs/sha256/{}", digest.hex());
            it.files.get_mut(&name).unwrap()[5] ^= 1;
        }),
    ];
    for (expected, breaks) in cases {
        let mut builder = small().whole();
        breaks(&mut builder);
        let error = failure(&builder).to_string();
        assert!(
            error.contains(expected),
            "expected '{expected}', got '{error}'"
        );
        assert!(error.len() < 700, "{error}");
    }
}

#[test]
fn text_of_an_image_cannot_control_the_terminal() {
    let mut builder = small();
    builder.platform = json!({"os": "linux\u{1b}[2J", "architecture": "x".repeat(10_000)});
    let error = failure(&builder.whole()).to_string();
    assert!(
        error.contains("linux?[2J/xxx") && error.len() < 400,
        "{error}"
    );
}
