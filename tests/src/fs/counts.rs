//! What a server has counted: requests of each class on each queue, by its
//! control socket ([`Options::control`](super::Options::control)).

use std::io::{BufRead, BufReader, Write};
use std::time::Duration;

use serde_json::{Value, json};

use super::Server;
use crate::bounded::poll;
use crate::peer::connect;

/// The control socket is made last.
const STEP: Duration = Duration::from_secs(10);

/// Requests so far.
#[derive(Clone, Debug)]
pub struct Counts(Vec<Value>);

impl Counts {
    /// Of a class, on all queues.
    pub fn of(&self, class: &str) -> u64 {
        self.0.iter().map(|queue| count(queue, class)).sum()
    }

    /// Of all classes, on one queue; 0 is the high priority queue.
    pub fn on(&self, queue: usize) -> u64 {
        let requests = self.0.get(queue).and_then(|q| q["requests"].as_object());
        let classes = requests.into_iter().flatten();
        classes
            .filter_map(|(_, members)| members["count"].as_u64())
            .sum()
    }
}

fn count(queue: &Value, class: &str) -> u64 {
    queue["requests"][class]["count"].as_u64().unwrap_or(0)
}

impl Server {
    /// One line to the control socket, and its answer.
    ///
    /// # Panics
    /// When there is none.
    pub fn operator(&self, request: &Value) -> Value {
        let control = self.control();
        poll(STEP, || control.exists().then_some(())).expect("a control socket");
        let mut stream = connect(&control).expect("somebody listens");
        stream
            .write_all(format!("{request}\n").as_bytes())
            .expect("it takes a line");
        let mut line = String::new();
        BufReader::new(stream)
            .read_line(&mut line)
            .expect("it answers");
        serde_json::from_str(&line).expect("in JSON")
    }

    /// What it has counted.
    ///
    /// # Panics
    /// As [`Server::operator`].
    pub fn counts(&self) -> Counts {
        let stats = self.operator(&json!({"op": "stats"}));
        let queues = stats["devices"][0]["queues"].as_array();
        Counts(queues.expect("queues").clone())
    }
}
