//! What the control socket answers: how the machine is, and what it is to do. Put
//! together by `main` and served by `pericarp-control`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pericarp_control::{Answer, Operations, Outcome, only};
use serde_json::{Map, Value, json};

use crate::backend::Dial;
use crate::devices::{State, name_of};
use crate::machine::{Machine, Neighbours, Stage};
use crate::options::device_of;

/// The name in answers.
const PROGRAM: &str = "pericarp-vmm";

/// The operations on this machine.
pub fn operations(machine: &Arc<Machine>, neighbours: Neighbours) -> Operations {
    let of = || Arc::clone(machine);
    let (status, stats, metrics) = (of(), of(), of());
    let (pause, resume, stop, reset) = (of(), of(), of(), of());
    let (add, remove) = (of(), of());
    let version = env!("CARGO_PKG_VERSION");
    Operations::new(PROGRAM, version, move || prometheus(&metrics))
        .with("status", move |arguments| {
            only(arguments, &[])?;
            Ok(status_of(&status))
        })
        .with("stats", move |arguments| {
            only(arguments, &[])?;
            Ok(stats_of(&stats))
        })
        .with_errand("pause", move |arguments, _| {
            only(arguments, &[])?;
            done(pause.pause())
        })
        .with_errand("resume", move |arguments, _| {
            only(arguments, &[])?;
            done(resume.resume())
        })
        .with("stop", move |arguments| {
            told(arguments, || stop.remote().stop())
        })
        .with("reset", move |arguments| {
            told(arguments, || reset.remote().reset())
        })
        .with_errand("add-device", move |arguments, _| {
            let options = device_of(arguments)?;
            let socket = neighbours.find(&options.socket)?;
            let unreachable = |e| format!("socket: {}: {e}", options.socket.display());
            let stream = socket.dial().map_err(unreachable)?;
            let place = add.devices().add(&options, stream, Box::new(socket))?;
            let mut members = Map::new();
            members.insert("address".to_owned(), json!(address(place)));
            Ok(members)
        })
        .with_errand("remove-device", move |arguments, _| {
            only(arguments, &["id"])?;
            match arguments.get("id") {
                Some(Value::String(id)) => done(remove.devices().remove(id)),
                _ => Err("id: missing or no string: name a device".to_owned().into()),
            }
        })
}

fn done(result: Result<(), String>) -> Outcome {
    result?;
    Ok(Map::new())
}

fn told(arguments: &Map<String, Value>, tell: impl FnOnce()) -> Answer {
    only(arguments, &[])?;
    tell();
    Ok(Map::new())
}

/// As the guest names it in /sys/bus/pci/devices.
fn address(place: u8) -> String {
    format!("0000:00:{place:02x}.0")
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

fn status_of(machine: &Machine) -> Map<String, Value> {
    let (stage, starts, _) = machine.state();
    let (cpus, memory) = machine.size();
    let device = |state: State| {
        json!({
            "id": state.id,
            "kind": name_of(state.kind),
            "address": address(state.place),
            "connected": state.connected,
            "driver": state.report.driver_ready,
        })
    };
    let devices = machine.devices().states();
    object(json!({
        "state": stage_name(stage),
        "starts": starts,
        "cpus": cpus,
        "memory": memory,
        "devices": devices.into_iter().map(device).collect::<Vec<_>>(),
    }))
}

fn stage_name(stage: Stage) -> &'static str {
    match stage {
        Stage::Starting => "starting",
        Stage::Running => "running",
        Stage::Paused => "paused",
        Stage::Ending => "ending",
    }
}

/// The counters of exits, by name.
fn exits_of(machine: &Machine) -> Vec<(&'static str, u64)> {
    let exits = machine.exits();
    let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    vec![
        ("port", value(&exits.port)),
        ("device", value(&exits.device)),
        ("nothing", value(&exits.nothing)),
        ("called", value(&exits.called)),
        ("other", value(&exits.other)),
    ]
}

fn stats_of(machine: &Machine) -> Map<String, Value> {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let (_, _, entered) = machine.state();
    let exits: Map<String, Value> = exits_of(machine)
        .into_iter()
        .map(|(name, count)| (name.to_owned(), json!(count)))
        .collect();
    let marks: Map<String, Value> = machine
        .ports()
        .marks()
        .into_iter()
        .map(|(mark, time)| (mark.to_string(), json!(micros(time))))
        .collect();
    let device = |state: State| {
        json!({
            "id": state.id,
            "reconnects": state.reconnects,
            "slow-kicks": state.report.slow_kicks,
            "unwired-interrupts": state.report.unwired,
            "driver-mistakes": state.report.mistakes,
            "last-mistake": state.report.last_mistake,
            "features": format!("{:#x}", state.report.features),
        })
    };
    let devices = machine.devices().states();
    object(json!({
        "age-us": micros(machine.age()),
        "entered-us": micros(entered),
        "marks-us": marks,
        "exits": exits,
        "console-dropped": machine.ports().dropped(),
        "unclaimed-ports": machine.ports().unclaimed(),
        "devices": devices.into_iter().map(device).collect::<Vec<_>>(),
    }))
}

fn prometheus(machine: &Machine) -> String {
    use std::fmt::Write;
    let mut text = String::from(
        "# HELP pericarp_vmm_exits_total Times a virtual CPU left the guest for this program.\n\
         # TYPE pericarp_vmm_exits_total counter\n",
    );
    for (name, count) in exits_of(machine) {
        let _ = writeln!(text, "pericarp_vmm_exits_total{{for=\"{name}\"}} {count}");
    }
    text.push_str(
        "# HELP pericarp_vmm_backend_connected Whether a device's backend is there.\n\
         # TYPE pericarp_vmm_backend_connected gauge\n",
    );
    let states = machine.devices().states();
    for state in &states {
        let (id, there) = (&state.id, u8::from(state.connected));
        let _ = writeln!(
            text,
            "pericarp_vmm_backend_connected{{device=\"{id}\"}} {there}"
        );
    }
    text.push_str(
        "# HELP pericarp_vmm_reconnects_total Times a device's backend came back.\n\
         # TYPE pericarp_vmm_reconnects_total counter\n",
    );
    for state in &states {
        let (id, count) = (&state.id, state.reconnects);
        let _ = writeln!(
            text,
            "pericarp_vmm_reconnects_total{{device=\"{id}\"}} {count}"
        );
    }
    text
}
