//! A change of the file, shown before it is made and made as a whole or not at all.

use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use super::{ContainerdError, Runtimes, block};

/// What a file is, and what it is to be; None where it is not there.
#[derive(Debug)]
pub struct Plan {
    path: PathBuf,
    before: Option<String>,
    after: Option<String>,
}

impl Plan {
    /// Has containerd know these runtimes, and no others of ours.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or to which nothing can be added. Nothing is changed.
    pub fn enable(path: &Path, runtimes: &Runtimes) -> Result<Self, ContainerdError> {
        let (path, before) = read(path)?;
        let own = without(&path, before.as_deref())?;
        let after = block::with(own.as_deref(), runtimes)
            .map_err(|(rule, cure)| refused(&path, rule, &cure))?;
        Ok(Self {
            path,
            before,
            after: Some(after),
        })
    }

    /// Has it know none of ours.
    ///
    /// # Errors
    ///
    /// As [`Plan::enable`].
    pub fn disable(path: &Path) -> Result<Self, ContainerdError> {
        let (path, before) = read(path)?;
        let after = without(&path, before.as_deref())?;
        Ok(Self {
            path,
            before,
            after,
        })
    }

    /// What undoes it once it was made.
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self {
            path: self.path.clone(),
            before: self.after.clone(),
            after: self.before.clone(),
        }
    }

    /// Whether there is anything to do.
    #[must_use]
    pub fn changes(&self) -> bool {
        self.before != self.after
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What would change, as a difference of lines. Empty where nothing does.
    #[must_use]
    pub fn difference(&self) -> String {
        if !self.changes() {
            return String::new();
        }
        let name = |text: &Option<String>| match text {
            Some(_) => self.path.display().to_string(),
            None => "/dev/null".to_owned(),
        };
        let lines = |text: &Option<String>| -> Vec<String> {
            let lines = text.iter().flat_map(|text| text.split_inclusive('\n'));
            lines
                .map(|line| line.trim_end_matches('\n').to_owned())
                .collect()
        };
        let (old, new) = (lines(&self.before), lines(&self.after));
        let same = |(one, other): &(&String, &String)| one == other;
        let head = old.iter().zip(&new).take_while(same).count();
        let rest = old.len().min(new.len()) - head;
        let tail = old.iter().rev().zip(new.iter().rev()).take(rest);
        let tail = tail.take_while(same).count();
        let mut text = format!("--- {}\n+++ {}\n", name(&self.before), name(&self.after));
        let (gone, come) = (&old[head..old.len() - tail], &new[head..new.len() - tail]);
        let from = |first: usize, count: usize| if count == 0 { first } else { first + 1 };
        let _ = writeln!(
            text,
            "@@ -{},{} +{},{} @@",
            from(head, gone.len()),
            gone.len(),
            from(head, come.len()),
            come.len()
        );
        for (sign, lines) in [('-', gone), ('+', come)] {
            for line in lines {
                let _ = writeln!(text, "{sign}{line}");
            }
        }
        text
    }

    /// Makes the change. Whoever reads the file sees the old or the new one.
    ///
    /// # Errors
    ///
    /// The file cannot be written, or is not what it was any more; then nothing is changed.
    pub fn apply(&self) -> Result<(), ContainerdError> {
        if !self.changes() {
            return Ok(());
        }
        let (_, now) = read(&self.path)?;
        if now != self.before {
            let rule = "was changed by somebody else a moment ago".to_owned();
            return Err(refused(&self.path, rule, "try once more"));
        }
        let written = match &self.after {
            Some(text) => replace(&self.path, text),
            None => fs::remove_file(&self.path),
        };
        written.map_err(|source| ContainerdError::Write {
            path: self.path.clone(),
            source,
        })
    }
}

fn refused(path: &Path, rule: String, cure: &str) -> ContainerdError {
    ContainerdError::Refused {
        path: path.to_owned(),
        rule,
        cure: cure.to_owned(),
    }
}

/// The file that a path leads to in the end, and what is in it.
fn read(path: &Path) -> Result<(PathBuf, Option<String>), ContainerdError> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    match fs::read_to_string(&path) {
        Ok(text) => Ok((path, Some(text))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok((path, None)),
        Err(source) => Err(ContainerdError::Read { path, source }),
    }
}

fn without(path: &Path, text: Option<&str>) -> Result<Option<String>, ContainerdError> {
    let found = text.map(block::without).transpose();
    let found = found.map_err(|rule| refused(path, rule, "mend it by hand"))?;
    Ok(found.flatten())
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mode = fs::metadata(path).map_or(0o644, |there| there.permissions().mode() & 0o7777);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".pericarp-new");
    let new = path.with_file_name(name);
    // Left by somebody who was killed at it.
    let _ = fs::remove_file(&new);
    let write = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(mode).open(&new)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().inspect_err(|_| drop(fs::remove_file(&new)))?;
    if let Some(parent) = path.parent() {
        // Else the name may be lost, but not the file.
        let _ = File::open(parent).and_then(|directory| directory.sync_all());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use pericarp_config::Config;

    use super::*;

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let name = format!("pericarp-plan-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn ours() -> Runtimes {
        Runtimes::of(&Config::default(), Path::new("/s"), None)
    }

    #[test]
    fn it_is_enabled_once_shown_before_and_undone_to_the_byte() {
        let place = Place::new("file");
        let (real, link) = (place.0.join("real"), place.0.join("link"));
        let text = "version = 2\n# mine";
        fs::write(&real, text).unwrap();
        fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
        symlink(&real, &link).unwrap();
        let plan = Plan::enable(&link, &ours()).unwrap();
        assert_eq!(fs::read_to_string(&real).unwrap(), text);
        let difference = plan.difference();
        assert!(difference.contains("\n@@ -2,0 +3,"), "{difference}");
        assert!(
            difference.lines().skip(3).all(|line| line.starts_with('+')),
            "{difference}"
        );
        plan.apply().unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(
            fs::metadata(&real).unwrap().permissions().mode() & 0o7777,
            0o640
        );
        let again = Plan::enable(&link, &ours()).unwrap();
        assert!(!again.changes() && again.difference().is_empty());
        let other = Runtimes::of(&Config::default(), Path::new("/other"), None);
        let moved = Plan::enable(&link, &other).unwrap();
        assert!(moved.difference().contains("\n-runtime_path = \"/s\""));
        Plan::disable(&link).unwrap().apply().unwrap();
        assert_eq!(fs::read_to_string(&real).unwrap(), text);
        assert!(!Plan::disable(&link).unwrap().changes());
        // Others see no half of it.
        assert_eq!(fs::read_dir(&place.0).unwrap().count(), 2);
    }

    #[test]
    fn a_file_of_ours_alone_comes_and_goes() {
        let place = Place::new("none");
        let path = place.0.join("etc/config.toml");
        Plan::enable(&path, &ours()).unwrap().apply().unwrap();
        assert!(path.is_file());
        let plan = Plan::disable(&path).unwrap();
        assert!(
            plan.difference()
                .starts_with(&format!("--- {}\n+++ /dev/null\n", path.display()))
        );
        plan.apply().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_somebody_else_wrote_meanwhile_is_not_lost() {
        let place = Place::new("race");
        let path = place.0.join("config.toml");
        fs::write(&path, "version = 2\n").unwrap();
        let plan = Plan::enable(&path, &ours()).unwrap();
        fs::write(&path, "version = 3\n").unwrap();
        let error = plan.apply().unwrap_err().to_string();
        assert!(error.contains("by somebody else"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "version = 3\n");
    }
}
