//! Directories of the host that the command sees: read from the command line, and compared with the
//! host.
//!
//! Called by `check`. A directory is only looked at here; who serves it opens it.

use std::{
    io,
    path::{Path, PathBuf},
};

use pericarp_api::share::{MAX_SHARES, PlaceError, check_place};

use crate::input::problem::Problem;

const OPTION: &str = "--volume";
const FORM: &str = "write HOST:GUEST or HOST:GUEST:ro, such as /srv/data:/data:ro";

/// A directory that the command sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Absolute, without links.
    pub(crate) host: PathBuf,
    /// Where the command sees it: absolute, normal.
    pub(crate) guest: String,
    pub(crate) read_only: bool,
}

/// Reads and checks all of them. They come back in an order in which one that lies in another
/// follows it.
pub(crate) fn check(texts: &[String], problems: &mut Vec<Problem>) -> Vec<Volume> {
    if texts.len() > MAX_SHARES {
        let rule = format!(
            "there are {} volumes, and a container takes {MAX_SHARES}",
            texts.len()
        );
        let cure = "use fewer, or one of a directory above";
        problems.push(Problem::new(OPTION, None, rule, cure));
        return Vec::new();
    }
    let mut volumes: Vec<Volume> = Vec::new();
    for text in texts {
        match read(text) {
            Ok(volume) if volumes.iter().any(|other| other.guest == volume.guest) => {
                let rule = format!("there is another volume at '{}'", volume.guest);
                let cure = "give each a place of its own";
                problems.push(Problem::new(OPTION, text.clone(), rule, cure));
            }
            Ok(volume) => volumes.push(volume),
            Err(problem) => problems.push(problem),
        }
    }
    // By parts, as paths compare.
    volumes.sort_by(|one, other| Path::new(&one.guest).cmp(Path::new(&other.guest)));
    volumes
}

fn read(text: &str) -> Result<Volume, Problem> {
    let problem = |rule: String, cure: &str| Problem::new(OPTION, text.to_owned(), rule, cure);
    let colon = || {
        let rule = "has a colon in a path";
        let cure = "name a symbolic link to the directory, by a path without one";
        problem(rule.into(), cure)
    };
    let parts: Vec<&str> = text.split(':').collect();
    let (host, guest, read_only) = match parts[..] {
        [_] => return Err(problem("names no place for the command".into(), FORM)),
        [host, guest] => (host, guest, false),
        [host, guest, "ro"] => (host, guest, true),
        [host, guest, "rw"] => (host, guest, false),
        [_, _, access] if !access.contains('/') => {
            let rule = format!("has the unknown access '{access}'");
            return Err(problem(rule, "use ro or rw, or leave it out"));
        }
        _ => return Err(colon()),
    };
    if host.is_empty() {
        return Err(problem("names no directory of this host".into(), FORM));
    }
    check_place(guest).map_err(|error| {
        let cure = match error {
            PlaceError::Relative => FORM,
            PlaceError::NotNormal => "write it without these",
            PlaceError::Root => "name a directory below it; '--rootfs' is for a root",
            PlaceError::Kernel(_) => "choose another place, such as /data",
            PlaceError::Long => "choose a shorter one",
        };
        problem(format!("the command's path '{guest}' {error}"), cure)
    })?;
    let host = directory(Path::new(host))
        .map_err(|(rule, cure)| problem(format!("'{host}' {rule}"), cure))?;
    Ok(Volume {
        host,
        guest: guest.to_owned(),
        read_only,
    })
}

fn directory(path: &Path) -> Result<PathBuf, (String, &'static str)> {
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ("does not exist".to_owned(), "make the directory first"),
        _ => (
            format!("cannot be looked at ({error})"),
            "check the path and its permissions",
        ),
    })?;
    if !metadata.is_dir() {
        let cure = "name the directory it is in; only directories are shared";
        return Err(("is not a directory".into(), cure));
    }
    // Reading it needs a right that looking at it does not.
    let read = std::fs::read_dir(path).and_then(|_| std::fs::canonicalize(path));
    let path =
        read.map_err(|error| (format!("cannot be read ({error})"), "check its permissions"))?;
    match path.to_str() {
        Some(_) => Ok(path),
        None => Err((
            "has a path that is not valid UTF-8".into(),
            "rename the directory",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        read(text).unwrap_err().to_string()
    }

    #[test]
    fn a_volume_is_two_paths_and_an_access() {
        let volume = |guest: &str, read_only| Volume {
            host: "/etc".into(),
            guest: guest.into(),
            read_only,
        };
        assert_eq!(read("/etc:/data"), Ok(volume("/data", false)));
        assert_eq!(read("/etc:/data:rw"), Ok(volume("/data", false)));
        assert_eq!(read("/usr/../etc/:/a/b c:ro"), Ok(volume("/a/b c", true)));
    }

    #[test]
    fn each_bad_volume_is_refused_with_its_cure() {
        let link = "name a symbolic link to the directory, by a path without one";
        for (text, message) in [
            ("/etc", format!("names no place for the command; {FORM}")),
            (":/data", format!("names no directory of this host; {FORM}")),
            (
                "/etc:ro",
                format!("the command's path 'ro' is not an absolute path; {FORM}"),
            ),
            (
                "/etc:",
                format!("the command's path '' is not an absolute path; {FORM}"),
            ),
            (
                "/etc:/data:rx",
                "has the unknown access 'rx'; use ro or rw, or leave it out".into(),
            ),
            ("/e:tc:/data", format!("has a colon in a path; {link}")),
            ("/e:tc:/data:ro", format!("has a colon in a path; {link}")),
            (
                "/etc:/",
                "the command's path '/' is the container's root; name a directory below it; \
                 '--rootfs' is for a root"
                    .into(),
            ),
            (
                "/etc:/a/../b",
                "the command's path '/a/../b' has an empty part, '.', '..' or a slash at its \
                 end; write it without these"
                    .into(),
            ),
            (
                "/etc:/dev/shm",
                "the command's path '/dev/shm' lies in the container's own /dev; choose another \
                 place, such as /data"
                    .into(),
            ),
            (
                "/nonexistent:/data",
                "'/nonexistent' does not exist; make the directory first".into(),
            ),
            (
                "/etc/passwd:/data",
                "'/etc/passwd' is not a directory; name the directory it is in; only directories \
                 are shared"
                    .into(),
            ),
            (
                "/etc/passwd/x:/data",
                "'/etc/passwd/x' cannot be looked at (Not a directory (os error 20)); check the \
                 path and its permissions"
                    .into(),
            ),
        ] {
            assert_eq!(refused(text), format!("--volume '{text}': {message}"));
        }
    }

    #[test]
    fn places_are_unique_few_and_in_order() {
        let check = |texts: &[&str]| {
            let mut problems = Vec::new();
            let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
            let volumes = check(&texts, &mut problems);
            let said: Vec<String> = problems.iter().map(ToString::to_string).collect();
            let places: Vec<String> = volumes.into_iter().map(|volume| volume.guest).collect();
            (places, said.join("\n"))
        };
        let (places, said) = check(&["/etc:/a/b", "/usr:/a-b", "/etc:/a:ro"]);
        assert_eq!(
            (places.join(" ").as_str(), said.as_str()),
            ("/a /a/b /a-b", "")
        );
        let (_, said) = check(&["/etc:/a", "/usr:/a:ro", "/nonexistent:/b"]);
        assert_eq!(
            said,
            "--volume '/usr:/a:ro': there is another volume at '/a'; give each a place of its own\n\
             --volume '/nonexistent:/b': '/nonexistent' does not exist; make the directory first"
        );
        let many: Vec<String> = (0..=MAX_SHARES).map(|n| format!("/etc:/v{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(check(&many[1..]).0.len(), MAX_SHARES);
        assert_eq!(
            check(&many).1,
            "--volume: there are 17 volumes, and a container takes 16; use fewer, or one of a \
             directory above"
        );
    }
}
