//! The operations of the control socket that every device of ours has:
//! `stats` and `limits`, and the text of `metrics`.

use std::sync::Arc;

use pericarp_control::{Answer, Arguments, Operations, only};
use serde_json::{Map, Value, json};

use super::Oversight;
use crate::clock;
use crate::limiter::Limits;
use crate::stats;

/// A device by its name.
#[derive(Debug, Clone)]
pub struct Overseen {
    /// What the operator calls it.
    pub id: String,
    /// What there is to see and to set.
    pub oversight: Arc<Oversight>,
    /// What its driver has of it at this moment ([`Device::held`](crate::Device::held)).
    pub held: Vec<(&'static str, u64)>,
}

/// Adds `stats` and `limits` to a program's operations. `devices` are those
/// there are at the time; `wake` makes the workers look at their limits again.
#[must_use]
pub fn with_operations(
    operations: Operations,
    devices: impl Fn() -> Vec<Overseen> + Clone + Send + 'static,
    wake: impl Fn() + Send + 'static,
) -> Operations {
    let watched = devices.clone();
    operations
        .with("stats", move |arguments| show_stats(&watched(), arguments))
        .with("limits", move |arguments| {
            limits(&devices(), arguments, &wake)
        })
}

/// The text of `metrics`.
pub fn metrics_of(devices: &[Overseen]) -> String {
    let counted: Vec<_> = devices
        .iter()
        .filter_map(|d| Some((d.id.as_str(), d.oversight.stats.as_ref()?)))
        .collect();
    let held: Vec<_> = devices
        .iter()
        .map(|d| (d.id.as_str(), d.held.as_slice()))
        .collect();
    stats::prometheus(&counted, &held)
}

fn show_stats(devices: &[Overseen], arguments: &Arguments) -> Answer {
    only(arguments, &["device", "histograms"])?;
    let whole = match arguments.get("histograms") {
        None => false,
        Some(Value::Bool(whole)) => *whole,
        Some(other) => return Err(format!("histograms {other}: use true or false")),
    };
    let chosen: Vec<&Overseen> = if arguments.contains_key("device") {
        vec![&devices[device_named(devices.iter().map(|d| d.id.as_str()), arguments)?]]
    } else {
        devices.iter().collect()
    };
    let shown: Vec<Value> = chosen
        .into_iter()
        .map(|device| {
            let queues = device.oversight.stats.as_ref();
            let queues = queues.map(|queues| stats::json(queues, whole));
            let mut shown = json!({
                "id": device.id,
                "limits": limits_of(&device.oversight),
                "queues": queues.unwrap_or(Value::Array(Vec::new())),
            });
            if !device.held.is_empty() {
                shown["held"] = device.held.iter().copied().collect();
            }
            shown
        })
        .collect();
    Ok(Map::from_iter([(
        "devices".to_owned(),
        Value::Array(shown),
    )]))
}

fn limits_of(oversight: &Oversight) -> Value {
    let shown = oversight
        .limited()
        .flat_map(|(names, lane)| names.iter().copied().zip(lane.get().numbers()))
        .map(|(name, number)| (name.to_owned(), json!(number)));
    Value::Object(shown.collect())
}

/// Gets the limits of a device, after setting those that are given.
fn limits(devices: &[Overseen], arguments: &Arguments, wake: &impl Fn()) -> Answer {
    let device = match device_named(devices.iter().map(|d| d.id.as_str()), arguments) {
        Ok(index) => &devices[index],
        Err(why) => return Err(why),
    };
    let lanes: Vec<_> = device.oversight.limited().collect();
    let names = lanes.iter().flat_map(|(names, _)| names.iter().copied());
    let known: Vec<_> = ["device"].into_iter().chain(names).collect();
    only(arguments, &known)?;
    // All are looked at before one is set.
    let mut wanted = Vec::new();
    for (names, lane) in &lanes {
        let mut numbers = lane.get().numbers();
        for (name, number) in names.iter().zip(&mut numbers) {
            if let Some(value) = arguments.get(*name) {
                *number = value.as_u64().ok_or_else(|| {
                    format!("{name} {value}: not a whole number: use 0 for no limit")
                })?;
            }
        }
        // Without a limit its burst means nothing: it goes with it.
        for burst in [1, 3] {
            if numbers[burst - 1] == 0 && !arguments.contains_key(names[burst]) {
                numbers[burst] = 0;
            }
        }
        let limits = Limits::of(numbers);
        limits
            .check(names)
            .map_err(|(burst, rule)| format!("{}: {rule}", names[burst]))?;
        wanted.push(limits);
    }
    let changed = lanes
        .iter()
        .zip(&wanted)
        .any(|((_, lane), wanted)| lane.get() != *wanted);
    if changed {
        for ((_, lane), wanted) in lanes.iter().zip(&wanted) {
            lane.set(wanted, clock::now());
        }
        wake();
    }
    Ok(Map::from_iter([
        ("device".to_owned(), json!(device.id)),
        ("limits".to_owned(), limits_of(&device.oversight)),
    ]))
}

/// The index of the device that `device` names; it may be left out where there
/// is only one.
///
/// # Errors
/// The answer to give when there is none.
pub fn device_named<'a>(
    ids: impl Iterator<Item = &'a str> + Clone,
    arguments: &Arguments,
) -> Result<usize, String> {
    match arguments.get("device") {
        None if ids.clone().count() == 1 => Ok(0),
        None => Err("device: missing: give the id of one".to_owned()),
        Some(Value::String(id)) => ids
            .clone()
            .position(|known| known == id)
            .ok_or_else(|| format!("device {id:?}: no device has this id")),
        Some(other) => Err(format!("device {other}: not a string: give the id of one")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn ask(devices: &[Overseen], arguments: Value) -> Answer {
        let woken = AtomicUsize::new(0);
        let Value::Object(arguments) = arguments else {
            panic!("not an object");
        };
        let before: Vec<_> = devices.iter().map(|d| d.oversight.limits()).collect();
        let answer = limits(devices, &arguments, &|| {
            woken.fetch_add(1, Ordering::Relaxed);
        });
        let changed = devices
            .iter()
            .zip(before)
            .any(|(d, b)| d.oversight.limits() != b);
        assert_eq!(woken.load(Ordering::Relaxed), usize::from(changed));
        answer
    }

    #[test]
    fn directions_have_limits_of_their_own() {
        static NAMES: [[&str; 4]; 2] = [["ra", "rb", "rc", "rd"], ["ta", "tb", "tc", "td"]];
        let limits = [Limits::of([1, 2, 3, 4]), Limits::of([5, 0, 0, 0])];
        let device = Overseen {
            id: "n".to_owned(),
            oversight: Arc::new(Oversight::with_lanes(&NAMES, &limits)),
            held: Vec::new(),
        };
        let devices = [device];
        let answer = ask_without_a_look(&devices, json!({"ta": 0, "tc": 7, "td": 8, "ra": 0}));
        assert_eq!(
            answer.unwrap()["limits"],
            json!({"ra": 0, "rb": 0, "rc": 3, "rd": 4, "ta": 0, "tb": 0, "tc": 7, "td": 8})
        );
        let answer = ask_without_a_look(&devices, json!({"rb": 1}));
        assert_eq!(
            answer.unwrap_err(),
            "rb: there is no limit that a burst could exceed: set ra, too"
        );
    }

    fn ask_without_a_look(devices: &[Overseen], arguments: Value) -> Answer {
        let arguments = arguments.as_object().cloned().unwrap();
        limits(devices, &arguments, &|| {})
    }

    #[test]
    fn limits_are_got_set_and_refused_whole() {
        let devices = ["a", "b"].map(|id| Overseen {
            id: id.to_owned(),
            oversight: Arc::default(),
            held: Vec::new(),
        });
        let set = json!({"device": "b", "iops": 100, "bandwidth": 1000, "bandwidth-burst": 5});
        let answer = ask(&devices, set).unwrap();
        assert_eq!(
            answer["limits"],
            json!({"iops": 100, "iops-burst": 0, "bandwidth": 1000, "bandwidth-burst": 5})
        );
        assert_eq!(ask(&devices, json!({"device": "b"})).unwrap(), answer);
        assert_eq!(devices[0].oversight.limits(), Limits::default());
        for (bad, want) in [
            (json!({}), "device: missing: give the id of one"),
            (
                json!({"device": "c"}),
                "device \"c\": no device has this id",
            ),
            (
                json!({"device": 1}),
                "device 1: not a string: give the id of one",
            ),
            (
                json!({"device": "b", "iops": 7, "bandwidth": -1}),
                "bandwidth -1: not a whole number: use 0 for no limit",
            ),
            (
                json!({"device": "b", "iops": 0, "iops-burst": 3}),
                "iops-burst: there is no limit that a burst could exceed: set iops, too",
            ),
            (
                json!({"device": "b", "speed": 1}),
                "speed: unknown argument: use device, iops, iops-burst, bandwidth, bandwidth-burst",
            ),
        ] {
            assert_eq!(ask(&devices, bad).unwrap_err(), want);
        }
        assert_eq!(devices[1].oversight.limits().iops, 100);
    }
}
