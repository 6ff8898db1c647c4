//! The guest's first file system: the agent, the modules it loads, crun, and a console.
//!
//! Built for each machine from the assets, a few megabytes, so that there is no second copy that could
//! be out of date.

use std::{collections::BTreeSet, fs, io::BufWriter, path::Path};

use crate::{PodError, assets::Assets, cpio::Archive, during};

/// Writes the archive to `path`. The modules for shares and network cards are in it where there are
/// some: loading them costs a boot time.
///
/// # Errors
///
/// A file that cannot be read or written, by name.
pub fn write(
    assets: &Assets,
    (has_shares, has_cards): (bool, bool),
    path: &Path,
) -> Result<(), PodError> {
    let failed = || during(format!("the initramfs '{}'", path.display()));
    let read = |file: &Path| {
        fs::read(file).map_err(during(format!("'{}' cannot be read", file.display())))
    };
    let out = BufWriter::new(fs::File::create_new(path).map_err(failed())?);
    let mut archive = Archive::new(out);
    let agent = read(&assets.agent)?;
    let modules = || assets.load_order(has_shares, has_cards);
    let order: String = modules().map(|name| format!("{name}\n")).collect();
    archive
        .directory("dev")
        // What the kernel opens as the first process's standard streams.
        .and_then(|()| archive.character_device("dev/console", 0o600, (5, 1)))
        .and_then(|()| archive.directory("modules"))
        .and_then(|()| archive.file("modules/order", 0o444, order.as_bytes()))
        .and_then(|()| archive.file("init", 0o755, &agent))
        .map_err(failed())?;
    for name in modules() {
        let contents = read(&assets.modules.join(name))?;
        archive
            .file(&format!("modules/{name}"), 0o444, &contents)
            .map_err(failed())?;
    }
    let mut made = BTreeSet::from([String::from("dev"), String::from("modules")]);
    for (name, path) in &assets.tree {
        for (at, _) in name.match_indices('/') {
            if made.insert(name[..at].to_owned()) {
                archive.directory(&name[..at]).map_err(failed())?;
            }
        }
        // Programs and libraries, and nothing that must not be run.
        archive.file(name, 0o755, &read(path)?).map_err(failed())?;
    }
    archive.finish().map_err(failed())?;
    Ok(())
}
