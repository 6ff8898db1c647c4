//! The machine's devices: each a function on the bus, a thread, and a backend
//! somewhere. Held by [`crate::machine`]; the control socket adds and removes.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::actor::{self, Watch};
use crate::backend::{Dial, kind};
use crate::memory::Ram;
use crate::options::DeviceOptions;
use crate::pci::bus::{Bus, lock};
use crate::virtio::function::{Function, Parts, Report};
use crate::wiring::Wiring;

/// How long a backend may take to say what it is.
pub const ANSWER: Duration = Duration::from_secs(10);

/// A device, as the operator knows it.
#[derive(Debug)]
struct Device {
    id: String,
    place: u8,
    watch: Arc<Watch>,
    thread: JoinHandle<()>,
}

/// What the control socket says of a device.
#[derive(Debug, Clone)]
pub struct State {
    /// Its name.
    pub id: String,
    /// Virtio device id.
    pub kind: u16,
    /// Its place on bus 0.
    pub place: u8,
    /// Its backend is there.
    pub connected: bool,
    /// How often the backend came back.
    pub reconnects: u64,
    /// What its function says.
    pub report: Report,
}

/// All of them.
#[derive(Debug)]
pub struct Devices {
    bus: Arc<Bus>,
    ram: Arc<Ram>,
    wiring: Arc<dyn Wiring>,
    cpus: u8,
    known: Mutex<Vec<Device>>,
    /// Held while one is added, which may take the backend's time.
    adding: Mutex<()>,
}

impl Devices {
    /// None yet.
    pub fn new(ram: Arc<Ram>, wiring: Arc<dyn Wiring>, cpus: u8) -> Self {
        Self {
            bus: Arc::default(),
            ram,
            wiring,
            cpus,
            known: Mutex::default(),
            adding: Mutex::default(),
        }
    }

    /// The bus they are on.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    fn known(&self) -> MutexGuard<'_, Vec<Device>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a device on the bus, over a connection to its backend; waits until
    /// that has said what it is. Returns its place.
    ///
    /// # Errors
    /// In a line: the id is taken, the bus is full, the backend does not fit.
    pub fn add(
        &self,
        options: &DeviceOptions,
        stream: UnixStream,
        dialer: Box<dyn Dial>,
    ) -> Result<u8, String> {
        let id = &options.id;
        let _one = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        if self.known().iter().any(|device| device.id == *id) {
            return Err(format!(
                "id: {id}: there is a device of this name: choose another"
            ));
        }
        let place = self.bus.free_place().ok_or("the bus is full: 31 devices")?;
        let failed = |why: String| format!("{id}: {}: {why}", options.socket.display());
        let ram = Arc::clone(&self.ram);
        let started = actor::start(id, options.kind.clone(), stream, dialer, ram)
            .map_err(|e| failed(e.to_string()))?;
        let offer = started.offer(Instant::now() + ANSWER).map_err(failed)?;
        let shown = options
            .kind
            .show(&offer, options.queues, usize::from(self.cpus))
            .map_err(failed)?;
        started.show(shown.config);
        let parts = Parts {
            device_id: options.kind.id(),
            features: shown.features,
            queues: vec![options.queue_size; shown.queues],
            back: Box::new(started.handle),
            mirror: started.mirror,
            changed: started.changed,
        };
        let (ram, wiring) = (Arc::clone(&self.ram), Arc::clone(&self.wiring));
        let function =
            Function::new(place, parts, ram, wiring).map_err(|e| failed(e.to_string()))?;
        self.bus.add(place, Arc::new(Mutex::new(function)));
        self.known().push(Device {
            id: id.clone(),
            place,
            watch: started.watch,
            thread: started.thread,
        });
        Ok(place)
    }

    /// Takes a device off the bus. The guest must have let go of it before: what
    /// it still has there is gone.
    ///
    /// # Errors
    /// There is no such device.
    pub fn remove(&self, id: &str) -> Result<(), String> {
        let mut known = self.known();
        let index = known.iter().position(|device| device.id == id);
        let Some(index) = index else {
            return Err(format!("id: {id}: there is no such device"));
        };
        let device = known.remove(index);
        if let Some(function) = self.bus.remove(device.place) {
            lock(&function).remove();
        }
        Ok(())
    }

    /// What there is to say of each.
    pub fn states(&self) -> Vec<State> {
        let functions = self.bus.devices();
        let state = |device: &Device| {
            let (_, function) = functions.iter().find(|(place, _)| *place == device.place)?;
            let function = lock(function);
            Some(State {
                id: device.id.clone(),
                kind: function.device_id(),
                place: device.place,
                connected: device.watch.is_connected(),
                reconnects: device.watch.reconnects(),
                report: function.report(),
            })
        };
        self.known().iter().filter_map(state).collect()
    }

    /// Resets all of them, for another start.
    pub fn reset(&self) {
        self.bus
            .devices()
            .iter()
            .for_each(|(_, function)| lock(function).reset());
    }

    /// True when no backend touches the guest's memory.
    pub fn are_quiet(&self) -> bool {
        let functions = self.bus.devices();
        functions
            .iter()
            .all(|(_, function)| lock(function).is_quiet())
    }

    /// The hypervisor's machine is another.
    pub fn forget_wiring(&self) {
        self.bus
            .devices()
            .iter()
            .for_each(|(_, function)| lock(function).forget_wiring());
    }

    /// Removes all of them and waits for their ends, but not for long: a backend
    /// that does not answer is left with what it has, which is the kernel's to
    /// take away.
    pub fn remove_all(&self, limit: Duration) {
        let end = Instant::now() + limit;
        for (place, _) in self.bus.devices() {
            if let Some(function) = self.bus.remove(place) {
                lock(&function).remove();
            }
        }
        for device in std::mem::take(&mut *self.known()) {
            while !device.thread.is_finished() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !device.thread.is_finished() {
                log::warn!("{}: its backend does not let go", device.id);
            }
        }
    }
}

/// The name of a kind of device.
pub fn name_of(id: u16) -> &'static str {
    match id {
        kind::NET => "net",
        kind::BLOCK => "disk",
        kind::VSOCK => "vsock",
        kind::FS => "fs",
        _ => "device",
    }
}
