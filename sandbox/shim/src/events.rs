//! What containerd is told of its own accord: one event after the other, in the order in which they
//! came about.
//!
//! A thread of its own sends them, so that a containerd that is being restarted holds nobody up. What
//! waits is bounded. Who comes with one more waits for room: that thread waits for nobody but
//! containerd, and gives each event up in the end. What a guest brings about as often as it likes is
//! left out long before (`publish_if_few_wait`), so all room is for what containerd has asked for.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    EventsClient,
    shim::{event::Envelope, events::ForwardRequest},
    topics,
};
use protobuf::{
    MessageDyn, MessageField, MessageFull,
    well_known_types::{any::Any, timestamp::Timestamp},
};

use crate::error::{ShimError, during};

/// Where containerd takes events, in the environment.
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
const CALL_LIMIT_NS: i64 = 5_000_000_000;
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(500);
/// A connection that is not needed is closed: a ttrpc client wakes up all the time.
const IDLE: Duration = Duration::from_secs(2);

/// How many may wait.
const MOST: usize = 4096;
/// From how many on the guest's own are left out.
const MANY: usize = MOST / 4;

type Event = (&'static str, Any, SystemTime);

/// The way to containerd.
#[derive(Debug)]
pub(crate) struct Events {
    queue: Mutex<Option<SyncSender<Event>>>,
    waiting: Arc<AtomicUsize>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Events {
    /// To the service at `address`; an empty one takes nothing.
    pub(crate) fn to(address: String, namespace: String) -> Result<Arc<Self>, ShimError> {
        let (queue, events) = sync_channel(MOST);
        let waiting = Arc::new(AtomicUsize::new(0));
        let taken = Arc::clone(&waiting);
        let send = move || {
            let next = |limit: Option<Duration>| -> Result<Event, RecvTimeoutError> {
                let event = match limit {
                    Some(limit) => events.recv_timeout(limit)?,
                    None => events.recv()?,
                };
                taken.fetch_sub(1, Ordering::Relaxed);
                Ok(event)
            };
            send_all(next, &address, &namespace);
        };
        let thread = thread::Builder::new()
            .name("events".into())
            .spawn(send)
            .map_err(during("a thread"))?;
        Ok(Arc::new(Self {
            queue: Mutex::new(Some(queue)),
            waiting,
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// Tells containerd, soon.
    pub(crate) fn publish(&self, event: &(impl Topic + MessageFull)) {
        let queue = self.queue.lock();
        // Without the lock: this may wait for room, and `finish` must not wait for this.
        let queue = queue.unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(queue) = queue {
            self.waiting.fetch_add(1, Ordering::Relaxed);
            // It takes events as long as there is a queue.
            let _ = queue.send((event.topic(), packed(event), SystemTime::now()));
        }
    }

    /// Tells containerd, soon, unless it has much to be told already.
    pub(crate) fn publish_if_few_wait(&self, event: &(impl Topic + MessageFull)) {
        if self.waiting.load(Ordering::Relaxed) < MANY {
            self.publish(event);
        }
    }

    /// Waits until everything has been told, or given up. Nothing more is.
    pub(crate) fn finish(&self) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        drop(queue.take());
        drop(queue);
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            let _ = thread.join();
        }
    }
}

/// As containerd packs what it knows by name: without the host of an address.
pub(crate) fn packed(message: &impl MessageFull) -> Any {
    let message: &dyn MessageDyn = message;
    Any {
        type_url: message.descriptor_dyn().full_name().to_owned(),
        value: message.write_to_bytes_dyn().unwrap_or_default(),
        ..Any::default()
    }
}

/// A moment as containerd writes it.
pub(crate) fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(time))
}

fn send_all(
    next: impl Fn(Option<Duration>) -> Result<Event, RecvTimeoutError>,
    address: &str,
    namespace: &str,
) {
    let mut client = None;
    loop {
        let (topic, event, time) = match next(Some(IDLE)) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => {
                client = None;
                match next(None) {
                    Ok(event) => event,
                    Err(_) => return,
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if address.is_empty() {
            continue;
        }
        let request = ForwardRequest {
            envelope: MessageField::some(Envelope {
                timestamp: timestamp(time),
                namespace: namespace.to_owned(),
                topic: topic.to_owned(),
                event: MessageField::some(event),
                ..Envelope::default()
            }),
            ..ForwardRequest::default()
        };
        for attempt in 1..=TRIES {
            match send(&mut client, address, &request) {
                Ok(()) => break,
                Err(error) if attempt == TRIES => {
                    log::error!("containerd does not take the event {topic}: {error}");
                }
                Err(_) => thread::sleep(PAUSE),
            }
            client = None;
        }
    }
}

fn send(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    if client.is_none() {
        let address = match address.contains("://") {
            true => address.to_owned(),
            false => format!("unix://{address}"),
        };
        *client = Some(EventsClient::new(ttrpc::Client::connect(&address)?));
    }
    let context = ttrpc::context::with_timeout(CALL_LIMIT_NS);
    match client {
        Some(client) => client.forward(context, request).map(drop),
        None => Ok(()),
    }
}

/// What kind of event a message is.
pub(crate) trait Topic {
    fn topic(&self) -> &'static str;
}

macro_rules! topics {
    ($($event:ident: $topic:ident,)*) => {$(
        impl Topic for containerd_shim_protos::events::task::$event {
            fn topic(&self) -> &'static str {
                topics::$topic
            }
        }
    )*};
}

topics! {
    TaskCreate: TASK_CREATE_EVENT_TOPIC,
    TaskStart: TASK_START_EVENT_TOPIC,
    TaskExecAdded: TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted: TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskExit: TASK_EXIT_EVENT_TOPIC,
    TaskOOM: TASK_OOM_EVENT_TOPIC,
    TaskDelete: TASK_DELETE_EVENT_TOPIC,
    TaskPaused: TASK_PAUSED_EVENT_TOPIC,
    TaskResumed: TASK_RESUMED_EVENT_TOPIC,
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use containerd_shim_protos::events::task::{TaskExit, TaskOOM};

    use super::*;

    #[test]
    fn events_carry_the_name_that_containerd_knows() {
        let event = TaskOOM {
            container_id: "a".into(),
            ..TaskOOM::default()
        };
        assert_eq!(packed(&event).type_url, "containerd.events.TaskOOM");
        assert_eq!(event.topic(), "/tasks/oom");
    }
    #[test]
    fn a_guest_does_not_fill_the_queue() {
        // Nobody takes anything, and each is tried for seconds.
        let events = Events::to("/nowhere/pericarp.ttrpc".into(), "n".into()).unwrap();
        let begin = Instant::now();
        for _ in 0..2 * MOST {
            events.publish_if_few_wait(&TaskOOM::default());
        }
        assert!(events.waiting.load(Ordering::Relaxed) <= MANY);
        events.publish(&TaskExit::default());
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
}
