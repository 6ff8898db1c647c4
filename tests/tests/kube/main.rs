//! `pericarp node serve` under an unmodified kubectl: what a newcomer types, and what happens.
//!
//! Containerd has namespaces of its own, in which the server runs beside it. Cases that need no
//! machine share one node and run their pods under runc.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod api;
mod article;
mod manifests;
mod pods;
mod restarts;
mod stage;
mod streams;
mod terminal;
mod why;

use std::sync::{Mutex, PoisonError};

use pericarp_tests::cri::Handler;
use stage::Stage;

/// One node at a time: each test has the machine's CPUs to itself, as far as this program goes.
static TURN: Mutex<()> = Mutex::new(());

/// One case after the other on one node, since a node takes longer than most of them.
#[test]
fn a_node_serves_kubectl() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut stage) = Stage::start("a_node_serves_kubectl", vec![Handler::runc("runc")], &[])
    else {
        return;
    };
    for (name, case) in [
        (
            "who has no certificate is not heard",
            api::strangers as fn(&mut Stage),
        ),
        ("objects", api::objects),
        ("wrong manifests", manifests::wrong_manifests),
        ("what is not done", manifests::what_is_not_done_is_said),
        ("watches", api::watches),
        ("namespaces", api::namespaces),
        ("pods are what they say", pods::pods_are_what_they_say),
        ("logs, exec, attach, cp", streams::a_container_is_spoken_to),
        ("a terminal", streams::a_terminal_and_files),
        ("ports", streams::ports_are_forwarded),
        ("many at once", streams::many_at_once),
        ("restarts", restarts::a_restart_loses_nothing),
        ("two servers", restarts::two_servers_keep_apart),
    ] {
        println!("case: {name}");
        case(&mut stage);
        stage.delete_all_pods();
    }
    stage.end();
}

#[test]
fn the_articles_commands() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    article::play();
}

#[test]
fn what_goes_wrong_is_said() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    why::play();
}
