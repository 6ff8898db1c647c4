//! The guest's first file system: our first process, the modules it loads, and a console.
//!
//! Built for each run from the assets, a few megabytes, so that there is no second copy that could
//! be out of date.

use std::{fs, io::BufWriter, path::Path};

use crate::{
    assets::Assets,
    cpio::Archive,
    failure::{Failure, during},
};

/// Writes the archive to `path`.
pub(crate) fn write(assets: &Assets, path: &Path) -> Result<(), Failure> {
    let failed = || during(format!("the initramfs '{}'", path.display()));
    let read = |file: &Path| {
        fs::read(file).map_err(during(format!("'{}' cannot be read", file.display())))
    };
    let out = BufWriter::new(fs::File::create_new(path).map_err(failed())?);
    let mut archive = Archive::new(out);
    let init = read(&assets.init)?;
    let mut order = assets.order.join("\n");
    order.push('\n');
    archive
        .directory("dev")
        // What the kernel opens as the first process's standard streams.
        .and_then(|()| archive.character_device("dev/console", 0o600, (5, 1)))
        .and_then(|()| archive.directory("modules"))
        .and_then(|()| archive.file("modules/order", 0o444, order.as_bytes()))
        .and_then(|()| archive.file("init", 0o755, &init))
        .map_err(failed())?;
    for name in &assets.order {
        let contents = read(&assets.modules.join(name))?;
        archive
            .file(&format!("modules/{name}"), 0o444, &contents)
            .map_err(failed())?;
    }
    archive.finish().map_err(failed())?;
    Ok(())
}
