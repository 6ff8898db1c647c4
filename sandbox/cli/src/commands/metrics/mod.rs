//! `pericarp metrics`: what all machines of this host do and cost, as Prometheus reads it.
//!
//! ```text
//! names  every metric there is
//! text   the text
//! serve  HTTP
//! ```

mod names;
mod serve;
mod text;

use std::{
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr},
};

use crate::{
    commands::{Refusal, print, reader::Grammar},
    input::problem::Problem,
    observe::{self, Kept},
};

const HELP: &str = "\
Prints what all machines of this host do and cost in Prometheus' text format: pods of containerd's and
this user's own runs. Requests, bytes and latencies of each volume and card as their sidecars count
them, CPU time and memory of each process, and whether a pod takes more of the host than its profile's
key 'overhead' says, or than is usual: no RuntimeClass is read. As root. METRICS.md lists all names.

Usage: pericarp metrics [OPTIONS]

Options:
      --listen [ADDRESS:]PORT  serve it over HTTP at /metrics, until it is ended; to this machine
                               alone unless there is another address
  -h, --help                   show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp metrics",
    help: HELP,
    flags: &[],
    options: &[(' ', "listen", false)],
    ends_at_operand: false,
};

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    if let Some(odd) = given.operands.first() {
        return Err(GRAMMAR.missing(odd, "is not an option"));
    }
    super::serve::allow_files();
    match given.value("listen") {
        None => print(&text::text(&observe::look(Some(&mut Kept::default()))))?,
        Some(wanted) => serve::serve(address(wanted)?)?,
    }
    Ok(0)
}

fn address(wanted: &str) -> Result<SocketAddr, Problem> {
    let port = wanted.parse::<u16>();
    let here = port.map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    here.or_else(|_| wanted.parse()).map_err(|_| {
        let rule = "is no port and no address with a port";
        let cure = "give one such as 9464, 0.0.0.0:9464 or [::1]:9464";
        Problem::new("--listen", wanted.to_owned(), rule, cure)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_for_this_machine() {
        let said = |wanted: &str| address(wanted).map(|address| address.to_string());
        assert_eq!(said("9464").unwrap(), "127.0.0.1:9464");
        assert_eq!(said("0.0.0.0:1").unwrap(), "0.0.0.0:1");
        assert_eq!(said("[::1]:2").unwrap(), "[::1]:2");
        for odd in ["", "x", "1.2.3.4", "70000", "-1"] {
            let problem = said(odd).unwrap_err().to_string();
            assert!(problem.contains("is no port and no address"), "{problem}");
        }
    }
}
