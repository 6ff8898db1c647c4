//! Reads the options of the small commands.
//!
//! A command names its flags and its options with values; what is left are its operands. As with
//! podman, options end at the first operand when a command line of somebody else follows.

use std::ffi::OsString;

use lexopt::Arg;

use crate::{
    commands::Refusal,
    input::problem::{Problem, nearest},
};

/// What a command takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grammar {
    /// `pericarp exec`, for messages.
    pub(crate) command: &'static str,
    pub(crate) help: &'static str,
    /// Without a value: letter (blank for none) and name.
    pub(crate) flags: &'static [(char, &'static str)],
    /// With a value; those marked true may be repeated.
    pub(crate) options: &'static [(char, &'static str, bool)],
    /// All that follows the first operand belongs to it.
    pub(crate) ends_at_operand: bool,
}

/// What was given.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Given {
    flags: Vec<String>,
    options: Vec<(String, String)>,
    pub(crate) operands: Vec<String>,
}

impl Given {
    pub(crate) fn flag(&self, name: &str) -> bool {
        self.flags.iter().any(|flag| flag == name)
    }

    /// The value of an option that is given at most once.
    pub(crate) fn value<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        self.values(name).next()
    }

    pub(crate) fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.options
            .iter()
            .filter(move |(option, _)| option == name)
            .map(|(_, value)| value.as_str())
    }
}

impl Grammar {
    /// Reads the arguments after the command's name.
    pub(crate) fn read(&self, arguments: Vec<OsString>) -> Result<Given, Refusal> {
        let mut given = Given::default();
        let mut problems = Vec::new();
        let mut parser = lexopt::Parser::from_args(arguments);
        loop {
            let name = match parser.next() {
                Ok(None) => break,
                Ok(Some(Arg::Long("help") | Arg::Short('h'))) => {
                    return Err(Refusal::Help(self.help));
                }
                Ok(Some(Arg::Long(name))) => self.by_name(name).ok_or(format!("--{name}")),
                Ok(Some(Arg::Short(letter))) => self.by_letter(letter).ok_or(format!("-{letter}")),
                Ok(Some(Arg::Value(value))) => {
                    let mut operands = vec![value];
                    if self.ends_at_operand
                        && let Ok(rest) = parser.raw_args()
                    {
                        operands.extend(rest);
                        // The end of our options may be marked all the same.
                        if operands.get(1).is_some_and(|second| second == "--") {
                            operands.remove(1);
                        }
                    }
                    for operand in operands {
                        match operand.into_string() {
                            Ok(text) => given.operands.push(text),
                            Err(odd) => problems.push(self.not_text(&odd.to_string_lossy())),
                        }
                    }
                    continue;
                }
                Err(error) => {
                    problems.push(Problem::new(
                        self.command,
                        None,
                        error.to_string(),
                        self.see_help(),
                    ));
                    break;
                }
            };
            match name {
                Err(unknown) => {
                    let known = self.names().map(|name| format!("--{name}"));
                    let known: Vec<String> = known.collect();
                    let near = nearest(&unknown, known.iter().map(String::as_str));
                    let help = format!("{} --help", self.command);
                    problems.push(Problem::unknown("option", &unknown, near, &help));
                    // Its value, if it has one, must not be taken for an operand.
                    let _ = parser.optional_value();
                }
                Ok((name, takes_value, repeats)) => {
                    let shown = format!("--{name}");
                    let twice = given.flag(name) || given.value(name).is_some();
                    if twice && !repeats {
                        problems.push(Problem::new(
                            &shown,
                            None,
                            "is given twice",
                            "leave one out",
                        ));
                    }
                    if !takes_value {
                        given.flags.push(name.to_owned());
                        continue;
                    }
                    match parser.value().map(OsString::into_string) {
                        Ok(Ok(value)) if !value.is_empty() => {
                            given.options.push((name.to_owned(), value));
                        }
                        Ok(Ok(_)) => {
                            problems.push(Problem::new(&shown, None, "is empty", self.see_help()));
                        }
                        Ok(Err(odd)) => problems.push(self.not_text(&odd.to_string_lossy())),
                        Err(_) => {
                            let rule = "needs a value";
                            problems.push(Problem::new(&shown, None, rule, self.see_help()));
                        }
                    }
                }
            }
        }
        if problems.is_empty() {
            Ok(given)
        } else {
            Err(Refusal::Input(problems))
        }
    }

    /// A missing operand.
    pub(crate) fn missing(&self, operand: &str, rule: &str) -> Refusal {
        Problem::new(operand, None, rule, self.see_help()).into()
    }

    fn see_help(&self) -> String {
        format!("see `{} --help`", self.command)
    }

    fn not_text(&self, text: &str) -> Problem {
        let cure = "write it as UTF-8";
        Problem::new(self.command, text.to_owned(), "is not valid UTF-8", cure)
    }

    fn by_name(&self, name: &str) -> Option<(&'static str, bool, bool)> {
        self.all()
            .find(|(_, known, ..)| *known == name)
            .map(|(_, name, takes_value, repeats)| (name, takes_value, repeats))
    }

    fn by_letter(&self, letter: char) -> Option<(&'static str, bool, bool)> {
        self.all()
            .find(|(known, ..)| *known == letter && letter != ' ')
            .map(|(_, name, takes_value, repeats)| (name, takes_value, repeats))
    }

    fn all(&self) -> impl Iterator<Item = (char, &'static str, bool, bool)> {
        let flags = self
            .flags
            .iter()
            .map(|(letter, name)| (*letter, *name, false, false));
        let options = self
            .options
            .iter()
            .map(|(letter, name, repeats)| (*letter, *name, true, *repeats));
        flags.chain(options)
    }

    fn names(&self) -> impl Iterator<Item = &'static str> {
        self.all().map(|(_, name, ..)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRAMMAR: Grammar = Grammar {
        command: "pericarp test",
        help: "help",
        flags: &[('i', "interactive"), ('t', "tty")],
        options: &[('e', "env", true), ('w', "workdir", false)],
        ends_at_operand: true,
    };

    fn read(line: &[&str]) -> Result<Given, Vec<String>> {
        match GRAMMAR.read(line.iter().map(OsString::from).collect()) {
            Ok(given) => Ok(given),
            Err(Refusal::Input(problems)) => {
                Err(problems.iter().map(ToString::to_string).collect())
            }
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn letters_names_and_a_command_are_read() {
        let given = read(&[
            "-it",
            "-e",
            "A=1",
            "--env=B=2",
            "-w",
            "/x",
            "web",
            "sh",
            "-c",
            "-t",
        ])
        .unwrap();
        assert!(given.flag("interactive") && given.flag("tty"));
        assert_eq!(given.values("env").collect::<Vec<_>>(), ["A=1", "B=2"]);
        assert_eq!(given.value("workdir"), Some("/x"));
        assert_eq!(given.operands, ["web", "sh", "-c", "-t"]);
        let given = read(&["web", "--", "-x"]).unwrap();
        assert_eq!(given.operands, ["web", "-x"]);
    }

    #[test]
    fn all_problems_are_reported() {
        let problems = read(&["--enw", "A=1", "-w", "/", "-w", "/", "-x", "-e"]).unwrap_err();
        assert_eq!(
            problems[0],
            "'--enw': unknown option; did you mean '--env'?"
        );
        let problems = read(&["-w", "/", "--workdir=/", "-x", "-e"]).unwrap_err();
        assert_eq!(
            problems,
            [
                "--workdir: is given twice; leave one out",
                "'-x': unknown option; see `pericarp test --help`",
                "--env: needs a value; see `pericarp test --help`",
            ]
        );
    }
}
