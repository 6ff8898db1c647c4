//! What the command line asks of a running program: `--add-device` and
//! `--remove-device`. `parse` calls it once it has read all options.

use std::collections::HashSet;
use std::path::PathBuf;

use super::draft::Draft;
use super::{BadOption, Command, DeviceOptions, SocketOption, bad};

/// The rings of a running program are made, and confined.
pub(crate) const NOT_LATER: &str =
    "a disk that is added cannot be polled: leave it out, or start a process for the disk";

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A disk more.
    Add(Box<DeviceOptions>),
    /// One less.
    Remove {
        /// Which.
        id: String,
        /// Even with a front end connected.
        force: bool,
    },
}

/// The options of a request, while others are still being read.
#[derive(Debug, Default)]
pub(super) struct Request {
    pub(super) add: Option<Draft>,
    pub(super) remove: Option<String>,
    pub(super) force: bool,
}

impl Request {
    /// The command, if the command line is a request. `seen` are all its
    /// options but `--device`, and `devices` counts these.
    pub(super) fn finish(
        self,
        control: Option<&PathBuf>,
        seen: &HashSet<String>,
        devices: usize,
    ) -> Result<Option<Command>, BadOption> {
        let (option, change) = match (self.add, self.remove) {
            (None, None) if self.force => {
                let rule = "it goes with --remove-device: give that, too";
                return Err(bad("--force", "", rule));
            }
            (None, None) => return Ok(None),
            (Some(_), Some(id)) => {
                let rule = "give either --add-device or --remove-device, not both";
                return Err(bad("--remove-device", id, rule));
            }
            (Some(_), None) if self.force => {
                let rule = "it goes with --remove-device: leave it out";
                return Err(bad("--force", "", rule));
            }
            (Some(draft), None) => {
                let device = draft.finish()?;
                if device.disk.iopoll {
                    return Err(bad("--add-device iopoll", "on", NOT_LATER));
                }
                if control.is_some_and(|c| device.socket == SocketOption::Path(c.clone())) {
                    let rule = "used twice: give the control socket its own";
                    let path = control.map(|c| c.display().to_string());
                    return Err(bad("--control-path", path.unwrap_or_default(), rule));
                }
                ("--add-device", Change::Add(Box::new(device)))
            }
            (None, Some(id)) => {
                let force = self.force;
                ("--remove-device", Change::Remove { id, force })
            }
        };
        let known = [option, "--control-path", "--force"];
        let other = seen.iter().find(|name| !known.contains(&name.as_str()));
        let device = "--device".to_owned();
        if let Some(name) = other.or((devices > 0).then_some(&device)) {
            let rule =
                format!("it belongs to a program that serves, not to {option}: leave it out");
            return Err(bad(name, "", rule));
        }
        let Some(control) = control.cloned() else {
            let rule = "whom to ask is missing: give --control-path of the running program, too";
            return Err(bad(option, "", rule));
        };
        Ok(Some(Command::Ask { control, change }))
    }
}
